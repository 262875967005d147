"""Judges samples and completions of a prior against real images, in the features of a network."""

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
from binlatent.evaluation.networks.features import Network
from binlatent.experiment import Evaluate, Experiment
from binlatent.pipeline import BinaryLatentDiffusion

log = logging.getLogger(__name__)

_BATCH = 500  # images per batch of the classifier
_HALVES = ("top", "bottom", "left", "right")


class Judge:
    """Judges by the workdir's classifier of real images, or, without classes, `evaluate.network`.

    `images` are real images, uint8 (n, height, width, channels). `labels` are their classes, (n,)
    int, and `accuracy` is that of the classifier on them, in [0, 1]; both are None for other
    networks.
    """

    def __init__(
        self, experiment: Experiment, workdir: Path, split: str = "test", *, named: bool = False
    ):
        """Takes `evaluate.num_images` images of a split; trains the classifier if it is missing.

        With `named`, `evaluate.network` judges, even if there are classes.
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
        """The reason of `near_chance` why the classifier cannot judge samples, or None."""
        if self.labels is None:
            return None
        return near_chance(self._asked, self.accuracy, self.labels)

    def floors(self, pipeline: BinaryLatentDiffusion, num: int | None = None) -> dict[str, float]:
        """Returns `frechet_distance` for real images and for reconstructions.

        See `floors.floors`; `num` is as in `sample_quality`.
        """
        if self._known.count < 2:
            return {}
        num = pipeline.experiment.evaluate.num_samples if num is None else num
        known = self._known.gaussian
        return floors(pipeline, self._network, self._workdir, known, self._split, num)[0]

    def sample_quality(
        self,
        pipeline: BinaryLatentDiffusion,
        key: jax.Array,
        num: int | None = None,
        texts: np.ndarray | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """Draws samples, of the classes in turn if there are any, and judges them.

        Args:
          pipeline: with a prior.
          key: of the samples.
          num: how many; None for `evaluate.num_samples`.
          texts: features of texts for a prior of texts, (num, ...); None for no texts.
          **options: of `pipeline.sample`.

        Returns:
          `frechet_distance` between features of samples and of real images, if there are at least
          two of each. For a prior with classes also `accuracy`, the share of samples that the
          classifier assigns to their label.
        """
        num = pipeline.experiment.evaluate.num_samples if num is None else num
        k = pipeline.num_classes
        wanted = np.arange(num) % k if k else None
        images = pipeline.sample(num, key, texts if wanted is None else wanted, **options)
        return self._quality(images, None if self.labels is None else wanted)

    def inpainting_quality(
        self, pipeline: BinaryLatentDiffusion, key: jax.Array, **options: Any
    ) -> dict[str, float]:
        """Returns the same numbers for test images with one half inpainted, without a label."""
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
    """Returns why a classifier cannot judge samples, and what to do instead; None if it can.

    Its accuracy must exceed p, the share of the most frequent class among the n images, by more
    than three standard errors sqrt(p (1 - p) / n).

    Args:
      asked: `config.evaluate`.
      accuracy: of the classifier on real images, in [0, 1].
      labels: of these images, (n,) int.
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
        instead = f"use --metrics=fid, which needs {path} (docs/evaluation.md)."
    return (
        f"The classifier's accuracy on {n} real images is {accuracy:.1%}, and always naming the "
        f"most frequent class gives {share:.1%} ± {error:.1%}, so it cannot judge samples: "
        f"{instead}"
    )


def warn_near_chance(experiment: Experiment, network: Network) -> None:
    """Warns, in process 0, if the network is a classifier near chance on test images."""
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
