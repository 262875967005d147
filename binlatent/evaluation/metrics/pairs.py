"""Metrics of pairs of images, an image and what was made of it (Table 4, and LPIPS)."""

import functools
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.autoencoder.lpips import LPIPS, MIN_SIZE, read_vgg16
from binlatent.data.transforms import to_float
from binlatent.evaluation.metrics import image_metrics
from binlatent.runtime.devices import map_batches, replicate
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

METRICS = ("psnr", "ssim", "lpips")


@jax.jit
def _lpips(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return LPIPS().apply(variables, x, y)


def lpips(variables: Any, x: np.ndarray, y: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the LPIPS of each pair, float32 (n,).

    Args:
      variables: of VGG16, as of `read_vgg16`.
      x, y: uint8 (n, h, w, 1 or 3), h and w at least 16.
      batch_size: pairs at a time.
    """
    distance = functools.partial(_lpips, replicate(variables))
    return map_batches(distance, batch_size, to_float(x), to_float(y))


def pair_metrics(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
    *,
    vgg16: str | Path = "",
    batch_size: int = 16,
) -> dict[str, float]:
    """Returns means over all pairs, and standard deviations over them, of metrics in `METRICS`.

    Args:
      pairs: parts of the images and of what was made of them, uint8 (n, h, w, c) both.
      names: of the metrics.
      vgg16: the file of weights for LPIPS.
      batch_size: pairs at a time for LPIPS.

    Returns:
      For example `psnr` and `psnr_std`, in dB; see `psnr`, `ssim` and `LPIPS`.

    Raises:
      UserError: if the images are too small for a metric, or LPIPS has no weights.
    """
    if "lpips" in names and not Path(vgg16).is_file():
        raise UserError(
            f"There is no file {str(vgg16)!r} with VGG16's weights for the metric lpips: leave it "
            "out, or make one by `python -m binlatent.convert vgg16`."
        )
    variables = read_vgg16(vgg16) if "lpips" in names else None
    values: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for x, y in pairs:
        if x.shape[-1] != y.shape[-1]:  # grey is r = g = b
            x, y = (np.broadcast_to(z, (*z.shape[:-1], 3)) for z in (x, y))
        smallest = {"ssim": 11, "lpips": MIN_SIZE}
        for name in names:
            if min(x.shape[1:3]) < smallest.get(name, 1):
                raise UserError(
                    f"The metric {name} needs images of at least {smallest[name]} pixels a side, "
                    f"not {x.shape[1]}x{x.shape[2]}: leave it out."
                )
            if name == "lpips":
                values[name].append(lpips(variables, x, y, batch_size))
            else:
                values[name].append(
                    {"psnr": image_metrics.psnr, "ssim": image_metrics.ssim}[name](x, y)
                )
    results = {}
    for name, parts in values.items():
        joined = np.concatenate(parts).astype(np.float64)
        finite = np.isfinite(joined)
        if not finite.all():  # PSNR's
            log.warning(
                "%d of %d pairs are identical: their %s is infinite, and left out of the mean.",
                *(np.sum(~finite), len(joined), name),
            )
            if not finite.any():
                results[name] = math.inf
                continue
            joined = joined[finite]
        results |= {name: float(np.mean(joined)), f"{name}_std": float(np.std(joined))}
    return results
