"""Samples and completions of a prior, judged by a network beside real images."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.data import masks
from binlatent.data.splits import load_images, open_split
from binlatent.data.transforms import to_float, to_uint8
from binlatent.evaluation import reference
from binlatent.evaluation.floors import floors
from binlatent.evaluation.metrics.feature_metrics import Statistics, frechet_distance
from binlatent.evaluation.networks import weights
from binlatent.evaluation.networks.features import Network
from binlatent.experiment import Evaluate, Experiment
from binlatent.pipeline import BinaryLatentDiffusion

log = logging.getLogger(__name__)

_BATCH = 500  # images that the classifier judges at a time
_HALVES = ("top", "bottom", "left", "right")


class Judge:
    """The workdir's classifier of real images, or for data without classes `evaluate.network`.

    `images` are uint8 (n, height, width, channels). `labels`, (n,) int, and `accuracy`, that of the
    classifier on them, in [0, 1], are None by another network.
    """

    def __init__(
        self, experiment: Experiment, workdir: Path, split: str = "test", *, named: bool = False
    ):
        """Compares with `evaluate.num_images` images of a split; trains a missing classifier.

        With `named` it is `evaluate.network` that judges, classes or not.
        """
        self._asked, self._workdir, self._split = experiment.evaluate, workdir, split
        source = open_split(experiment.data, split)
        classifies = experiment.evaluate.network == "classifier" if named else source.num_classes
        network = reference.classifier if classifies else reference.network
        self._network = network(experiment, workdir)
        self.images, labels = load_images(source, experiment.evaluate.num_images)
        self.labels = labels if classifies else None
        found = self._network.apply(self.images, _BATCH)
        self._known = Statistics.of(found["pool"])
        has_classes = self.labels is not None
        self.accuracy = _accuracy(found["logits"], self.labels) if has_classes else None
        if self.unjudged:
            log.warning("%s", self.unjudged)

    @property
    def unjudged(self) -> str | None:
        """Why the classifier cannot judge samples, as of `near_chance`; None if it can."""
        if self.labels is None:
            return None
        return near_chance(self._asked, self.accuracy, self.labels)

    def floors(self, pipeline: BinaryLatentDiffusion, num: int | None = None) -> dict[str, float]:
        """Returns what `frechet_distance` is of real images and of reconstructions.

        See `floors.floors`; `num` as of `sample_quality`.
        """
        if self._known.count < 2:
            return {}
        num = pipeline.experiment.evaluate.num_samples if num is None else num
        known = self._known.gaussian
        return floors(pipeline, self._network, self._workdir, known, self._split, num)

    def sample_quality(
        self,
        pipeline: BinaryLatentDiffusion,
        key: jax.Array,
        num: int | None = None,
        texts: np.ndarray | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """Draws samples, classes in turn if the prior has any, by options of `pipeline.sample`.

        Args:
          pipeline: with a prior.
          key: of the samples.
          num: of them, `evaluate.num_samples` if None.
          texts: features of the texts that a prior of texts is asked for, (num, ...); None for
            none.
          **options: of the sampler.

        Returns:
          `frechet_distance` between the network's features of samples and of the real images, if
          there are two of each; of a prior with classes, by the classifier, `accuracy`, how often a
          sample with label y is classified as y.
        """
        num = pipeline.experiment.evaluate.num_samples if num is None else num
        k = pipeline.num_classes
        wanted = np.arange(num) % k if k else None
        images = pipeline.sample(num, key, texts if wanted is None else wanted, **options)
        return self._quality(images, None if self.labels is None else wanted)

    def inpainting_quality(
        self, pipeline: BinaryLatentDiffusion, key: jax.Array, **options: Any
    ) -> dict[str, float]:
        """Returns the same numbers of completed halves of the test images, of no given class."""
        halves = [masks.preset(name, *self.images.shape[1:3]) for name in _HALVES]
        keep = np.stack([halves[i % len(halves)] for i in range(len(self.images))])
        results = pipeline.inpaint(to_float(self.images), keep, key, **options)
        return self._quality(results, self.labels)

    def _quality(self, images: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        found = self._network.apply(to_uint8(images), _BATCH)
        quality = {} if labels is None else {"accuracy": _accuracy(found["logits"], labels)}
        if min(self._known.count, len(images)) > 1:
            gaussian = Statistics.of(found["pool"]).gaussian
            quality["frechet_distance"] = frechet_distance(self._known.gaussian, gaussian)
        return quality


def near_chance(asked: Evaluate, accuracy: float, labels: np.ndarray) -> str | None:
    """Returns why a classifier cannot judge samples, and what to do; None if it can.

    It cannot where it is not better than naming the most frequent class, of share p of the n
    images, by more than three standard errors sqrt(p (1 - p) / n).

    Args:
      asked: `config.evaluate`.
      accuracy: of the classifier on real images, in [0, 1].
      labels: of these, (n,) int.
    """
    n = len(labels)
    share = np.bincount(labels).max() / n
    error = np.sqrt(share * (1 - share) / n)
    if accuracy > share + 3 * error:
        return None
    path = asked.weights or f"{asked.network}.npz"
    instead = "use --metrics=fid with --config.evaluate.network=efficientnet."
    if asked.network != "classifier" and Path(path).is_file():
        instead = "use --metrics=fid."
    elif asked.network == "efficientnet":
        instead = f"use --metrics=fid. {weights.missing(asked.network, path)}"
    return (
        f"The classifier is right about {accuracy:.1%} of {n} real images, and naming their most "
        f"frequent class would be about {share:.1%} ± {error:.1%}, so it cannot judge samples: "
        f"{instead}"
    )


def warn_near_chance(experiment: Experiment, network: Network) -> None:
    """Warns, in process 0, of a network that is a classifier near chance on test images."""
    if network.name != "classifier" or jax.process_index():
        return
    source = open_split(experiment.data, "test", keep=False)
    if not source.num_classes:
        return
    images, labels = load_images(source, experiment.evaluate.num_images)
    found = network.apply(images, experiment.sample.batch_size)
    if told := near_chance(experiment.evaluate, _accuracy(found["logits"], labels), labels):
        log.warning("%s", told)


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(np.argmax(logits, axis=-1) == labels))
