"""Samples and completions of a prior with classes, judged by the workdir's classifier."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.data import masks
from binlatent.data.splits import load_images, open_split
from binlatent.data.transforms import to_float, to_uint8
from binlatent.evaluation import reference
from binlatent.evaluation.metrics.feature_metrics import Statistics, frechet_distance
from binlatent.experiment import Experiment
from binlatent.pipeline import BinaryLatentDiffusion

_BATCH = 500  # images that the classifier judges at a time
_HALVES = ("top", "bottom", "left", "right")


class Judge:
    """The workdir's classifier of real images, to judge samples by.

    Its `accuracy`, in [0, 1], is that on `images` and `labels` of the test split, uint8 (n, height,
    width, channels) and (n,) int.
    """

    def __init__(self, experiment: Experiment, workdir: Path):
        """Takes an experiment with classes; trains the classifier if the workdir has none yet."""
        self._network = reference.classifier(experiment, workdir)
        test = open_split(experiment.data, "test")
        self.images, self.labels = load_images(test, experiment.evaluate.num_images)
        found = self._network.apply(self.images, _BATCH)
        self._known = Statistics.of(found["pool"])
        self.accuracy = _accuracy(found["logits"], self.labels)

    def sample_quality(
        self, pipeline: BinaryLatentDiffusion, key: jax.Array, **options: Any
    ) -> dict[str, float]:
        """Draws `evaluate.num_samples` samples, classes in turn, by options of `pipeline.sample`.

        Returns `accuracy`, how often a sample with label y is classified as y, and the
        `frechet_distance` between the classifier's features of samples and of real test images, if
        there are two of each.
        """
        wanted = np.arange(pipeline.experiment.evaluate.num_samples) % pipeline.num_classes
        return self._quality(pipeline.sample(len(wanted), key, wanted, **options), wanted)

    def inpainting_quality(
        self, pipeline: BinaryLatentDiffusion, key: jax.Array, **options: Any
    ) -> dict[str, float]:
        """Returns the same numbers of completed halves of the test images, of no given class."""
        halves = [masks.preset(name, *self.images.shape[1:3]) for name in _HALVES]
        keep = np.stack([halves[i % len(halves)] for i in range(len(self.images))])
        results = pipeline.inpaint(to_float(self.images), keep, key, **options)
        return self._quality(results, self.labels)

    def _quality(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        found = self._network.apply(to_uint8(images), _BATCH)
        quality = {"accuracy": _accuracy(found["logits"], labels)}
        if min(self._known.count, len(images)) > 1:
            gaussian = Statistics.of(found["pool"]).gaussian
            quality["frechet_distance"] = frechet_distance(self._known.gaussian, gaussian)
        return quality


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(np.argmax(logits, axis=-1) == labels))
