"""Metrics of pairs of images, such as an image and its reconstruction (Table 4, and LPIPS)."""

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.autoencoder.lpips import ELSEWHERE, LPIPS, MIN_SIZE, read_vgg16
from binlatent.data.transforms import to_float
from binlatent.evaluation.metrics import image_metrics
from binlatent.evaluation.metrics.table import Metric
from binlatent.runtime.devices import map_batches, replicate
from binlatent.runtime.errors import UserError
from binlatent.runtime.weights import sha256

log = logging.getLogger(__name__)


@jax.jit
def _lpips(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return LPIPS().apply(variables, x, y)


def lpips(variables: Any, x: np.ndarray, y: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the LPIPS of each pair, uint8 (n, h, w, 1 or 3), h, w >= 16: float32 (n,)."""
    distance = functools.partial(_lpips, replicate(variables))
    return map_batches(distance, batch_size, to_float(x), to_float(y))


# A metric maps x and y, uint8 (n, h, w, c), to (n,). One that needs "vgg16" takes its variables as
# the first argument, and batch_size. PSNR is in dB.
METRICS = {
    "psnr": Metric(image_metrics.psnr, {"psnr": "PSNR"}),
    "ssim": Metric(image_metrics.ssim, {"ssim": "SSIM"}, smallest=image_metrics.SSIM_WINDOW),
    "lpips": Metric(
        *(lpips, {"lpips": "LPIPS"}, ("vgg16",)),
        settles=lambda vgg16: f"VGG16, {sha256(vgg16)}",
        smallest=MIN_SIZE,
    ),
}


def pair_metrics(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
    *,
    vgg16: str | Path = "",
    instead: str = ELSEWHERE,
    batch_size: int = 16,
) -> tuple[dict[str, float], dict[str, str]]:
    """Returns means and standard deviations (`NAME_std`) over pairs, and how they were measured.

    PSNR is the mean over the pairs that differ. If none differs, it is infinite and has no
    deviation.

    Args:
      pairs: parts of both sets, uint8 (n, h, w, c) each.
      names: of metrics in `METRICS`.
      vgg16: the file of weights for LPIPS.
      instead: what to do without that file, for the message.
      batch_size: of LPIPS.
    """
    measures = {name: METRICS[name].measure for name in names}
    for name in names:
        if "vgg16" in METRICS[name].needs:
            variables = read_vgg16(vgg16, instead)
            measures[name] = functools.partial(measures[name], variables, batch_size=batch_size)
    values: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for x, y in pairs:
        if x.shape[-1] != y.shape[-1]:  # greyscale is expanded to RGB
            x, y = (np.broadcast_to(z, (*z.shape[:-1], 3)) for z in (x, y))
        for name, measure in measures.items():
            if min(x.shape[1:3]) < (smallest := METRICS[name].smallest):
                raise UserError(
                    f"The metric {name} needs images of at least {smallest}x{smallest} pixels, not "
                    f"{x.shape[1]}x{x.shape[2]}: leave it out."
                )
            values[name].append(measure(x, y))
    results, settled = {}, {}
    for name, parts in values.items():
        joined = np.concatenate(parts).astype(np.float64)
        finite = np.isfinite(joined)
        if METRICS[name].settles:
            settled[name] = METRICS[name].settles(vgg16)
        if not finite.all():  # only PSNR
            count = f"{np.sum(~finite)} of {len(joined)} pairs are identical"
            log.warning("%s: their %s is infinite and is left out of the mean.", count, name)
            settled[name] = f"{count}, and left out of the mean"
        results[name] = float(np.mean(joined[finite])) if finite.any() else math.inf
        if finite.any():
            results[f"{name}_std"] = float(np.std(joined[finite]))
    return results, settled
