"""Features of images, by a network and batch by batch: what image metrics compare.

Dimension legend: `n` images, `h w` their grid, `d` feature width, `k` classes.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from binlatent.evaluation.metrics.feature_metrics import Gaussian, Statistics
from binlatent.evaluation.networks import weights as published_weights
from binlatent.evaluation.networks.classifier import apply_classifier
from binlatent.evaluation.networks.efficientnet import EfficientNetLite0
from binlatent.evaluation.networks.inception import InceptionV3
from binlatent.runtime import weights
from binlatent.runtime.devices import map_batches, replicate
from binlatent.runtime.errors import UserError

# Features kept beside their statistics: precision, recall and kernels compare samples.
MAX_KEPT = 50_000

SUFFIXES = {"inception": "", "efficientnet": "_effnet", "classifier": "_classifier"}
WIDTHS = {"inception": 2048, "efficientnet": 1280}

_AT_ONCE = 1_024  # rows of features that are added to the statistics


class Network(NamedTuple):
    """A network whose features images are judged by.

    Fields:
      name: "inception", "efficientnet" or "classifier".
      width: d, of its features.
      apply: maps uint8 images (n, h, w, 1 or 3), in batches of a size that are spread over this
        process's devices, to `pool` (n, d), `logits` (n, k) and, of Inception alone, `spatial`.
      protocol: what it is, in words: its name, weights, resize, precision.
      logits: whether it has any.
    """

    name: str
    width: int
    apply: Callable[[np.ndarray, int], dict[str, np.ndarray]]
    protocol: dict[str, str]
    logits: bool = True

    @property
    def suffix(self) -> str:
        """Of the metrics' names; "" for those of the literature, which are Inception's."""
        return SUFFIXES[self.name]


class Features(NamedTuple):
    """What is known of the features of a set of images.

    Fields:
      count: n, 0 if it is not known.
      gaussians: by name, `pool` and perhaps `spatial`.
      pool: (m, d) float32, of all images or of MAX_KEPT spread evenly; None if they are not known.
      logits: (n, k) float32, or None.
    """

    count: int
    gaussians: dict[str, Gaussian]
    pool: np.ndarray | None = None
    logits: np.ndarray | None = None


@functools.partial(jax.jit, static_argnames="model")
def _apply(variables: Any, images: jax.Array, *, model: Any) -> dict[str, jax.Array]:
    # The published networks are of float32; TF32, or bfloat16 on TPUs, would change the metrics.
    with jax.default_matmul_precision("highest"):
        return model.apply(variables, images)


def _outputs(model: Any, variables: Any, names: dict[str, str]) -> Callable:
    """Returns the `apply` of a published network, with its outputs under the names of ours."""
    variables = replicate(variables)

    def outputs(images: jax.Array) -> dict[str, jax.Array]:
        found = _apply(variables, images, model=model)
        return {ours: found[theirs] for ours, theirs in names.items()}

    def apply(images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        grey_as_colour = np.broadcast_to(images, (*images.shape[:-1], 3))
        return map_batches(outputs, batch_size, grey_as_colour)

    return apply


def inception(path: str | Path) -> Network:
    """Returns FID's network, with the weights of a file; see `published_weights.read_inception`."""
    variables = published_weights.read_inception(path)
    names, logits = {"pool": "2048", "spatial": "spatial"}, "fc" in variables["params"]
    if logits:
        names["logits"] = "logits_unbiased"
    apply = _outputs(InceptionV3(logits), variables, names)
    protocol = {
        "name": "inception",
        "network": "InceptionV3 of 2015, as FID's",
        "resize": "299x299, TensorFlow 1's bilinear",
        "precision": "float32",
        "weights": weights.sha256(path),
    }
    return Network("inception", WIDTHS["inception"], apply, protocol, logits)


def efficientnet(path: str | Path) -> Network:
    """Returns EfficientNet-lite0, which needs no download; its distance is FD-EffNet, no FID."""
    names = {"pool": "features", "logits": "logits"}
    apply = _outputs(EfficientNetLite0(), published_weights.read_efficientnet_lite0(path), names)
    protocol = {
        "name": "efficientnet",
        "network": "EfficientNet-lite0 of ImageNet",
        "resize": "224x224, antialiased",
        "precision": "float32",
        "weights": weights.sha256(path),
    }
    return Network("efficientnet", WIDTHS["efficientnet"], apply, protocol)


def published(name: str, path: str | Path = "") -> Network:
    """Returns "inception" or "efficientnet", by default with the weights in NAME.npz."""
    return {"inception": inception, "efficientnet": efficientnet}[name](path or f"{name}.npz")


def classifier(params: Any, num_classes: int) -> Network:
    """Returns a classifier of the data's own classes, as of `classifier.train_classifier`."""
    channels, width = params["Conv_0"]["kernel"].shape[2], params["Dense_0"]["kernel"].shape[0]

    def apply(images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        if images.shape[-1] == 1:
            images = np.broadcast_to(images, (*images.shape[:-1], channels))
        if images.shape[-1] != channels:
            raise UserError(
                f"The classifier is of images of {channels} channel, and these have "
                f"{images.shape[-1]}: compare with images of the data, or by another network."
            )
        logits, pool = apply_classifier(params, images, num_classes, batch_size)
        return {"pool": pool, "logits": logits}

    protocol = {
        "name": "classifier",
        "network": "a small classifier of the training images",
        "resize": "none",
        "precision": "float32, the device's default of products",
        "weights": weights.fingerprint(params),
    }
    return Network("classifier", width, apply, protocol)


def kept(count: int) -> np.ndarray:
    """Returns which of so many images have their features kept, sorted, at most MAX_KEPT."""
    return np.linspace(0, count - 1, min(count, MAX_KEPT)).astype(int)


def collect(parts: Iterable[dict[str, np.ndarray]], count: int) -> Features:
    """Adds up the features of a set of images, part by part.

    Args:
      parts: of `Network.apply`, in order.
      count: of images in all parts together, for those to be kept to be spread.

    Raises:
      ValueError: If features are not finite, or the parts are not `count` together.
    """
    wanted, start = kept(count), 0
    statistics: dict[str, Statistics] = {}
    waiting: dict[str, list[np.ndarray]] = {}
    pool: list[np.ndarray] = []
    logits: list[np.ndarray] = []

    def add() -> None:
        for name, rows in waiting.items():
            new = Statistics.of(np.concatenate(rows))
            statistics[name] = statistics[name] + new if name in statistics else new
        waiting.clear()

    for part in parts:
        size = len(part["pool"])
        first, end = np.searchsorted(wanted, (start, start + size))
        pool.append(part["pool"][wanted[first:end] - start])
        if "logits" in part:
            logits.append(part["logits"])
        for name in ("pool", "spatial"):
            if name in part:
                waiting.setdefault(name, []).append(part[name])
        start += size
        if sum(map(len, waiting["pool"])) >= _AT_ONCE:
            add()
    add()
    if start != count:
        raise ValueError(f"expected the features of {count} images, got {start}.")
    gaussians = {name: x.gaussian for name, x in statistics.items()}
    return Features(
        count, gaussians, np.concatenate(pool), np.concatenate(logits) if logits else None
    )
