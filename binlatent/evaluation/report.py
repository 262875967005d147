"""The numbers of a run: metrics of test images, and report.json.

The metrics of test images are the rows of `METRICS` below and of `pairs.METRICS`.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.data.sources import Source
from binlatent.data.splits import load_images, open_split, spread_indices
from binlatent.data.transforms import to_float, to_uint8
from binlatent.evaluation import results
from binlatent.evaluation.judge import Judge
from binlatent.evaluation.metrics import image_metrics, pairs
from binlatent.evaluation.metrics.table import Metric
from binlatent.evaluation.reconstructions import codes_in_words
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import strict_json
from binlatent.runtime.keys import key_for
from binlatent.runtime.weights import fingerprint
from binlatent.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)

_OF_AUTOENCODER = ("psnr", "ssim", "codes")  # Table 4
_DRAWS = 8  # of time, code and noise per image, for the prior's own metrics


def test_images(pipeline: BinaryLatentDiffusion, num: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns `num` test images, float in [-1, 1], and their labels for the prior."""
    test = HeldOut.of(pipeline, open_split(pipeline.experiment.data, "test"), num)
    return to_float(test.images), test.labels


@dataclasses.dataclass
class HeldOut:
    """Images, uint8 (n, height, width, channels), and their codes, which are computed on demand."""

    pipeline: BinaryLatentDiffusion  # that encodes them
    images: np.ndarray
    source_labels: np.ndarray | None = None
    source: Source | None = None

    @classmethod
    def of(
        cls, pipeline: BinaryLatentDiffusion, source: Source, num: int | None = None
    ) -> "HeldOut":
        """Returns `num` images, or `evaluate.num_images`, spread evenly over a source."""
        num = pipeline.experiment.evaluate.num_images if num is None else num
        return cls(pipeline, *load_images(source, num), source)

    @classmethod
    def read(cls, pipeline: BinaryLatentDiffusion, workdir: Path | None = None) -> "HeldOut":
        """Reads images of the test split."""
        return cls.of(pipeline, open_split(pipeline.experiment.data, "test", workdir))

    @functools.cached_property
    def captions(self) -> list[str]:
        """The first caption of each image, "" without one; [] if the prior takes no captions."""
        if not self.pipeline.experiment.texts.encoder or self.source.captions is None:
            return []
        every = self.source.captions()
        return [(*every[i], "")[0] for i in spread_indices(len(every), len(self.images))]

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """The labels for the prior; None if it takes none, or the images have none."""
        if self.captions:
            return self.pipeline.text_features(self.captions)
        return self.pipeline.experiment.prior.conditioning.known(self.source, self.source_labels)

    @functools.cached_property
    def codes(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The deterministic codes, and the auxiliary outputs of the bottleneck."""
        return self._map(self.pipeline.encode_with_aux)

    @functools.cached_property
    def probs(self) -> np.ndarray:
        """The encoder's y, (n, h, w, c)."""
        return self._map(self.pipeline.encode_probs)

    def _parts(self, array: np.ndarray) -> list[np.ndarray]:
        # float32 images take four times the memory of uint8; no part is smaller than a batch.
        n, size = len(array), self.pipeline.experiment.sample.batch_size
        return np.split(array, range(size, n - size + 1, size))

    def _map(self, encode: Callable[[np.ndarray], Any]) -> Any:
        parts = [encode(to_float(part)) for part in self._parts(self.images)]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def reconstructions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields parts of the images and of their reconstructions, uint8."""
        parts = (self._parts(x) for x in (self.images, self.codes[0]))
        for images, codes in zip(*parts, strict=True):
            yield images, to_uint8(self.pipeline.decode(codes))

    @property
    def protocol(self) -> dict[str, Any]:
        """Describes the images, and how they are encoded."""
        unreadable = self.source.examples.num_unreadable
        return {
            "images": self.pipeline.experiment.data.name,
            "split": "test",
            "fingerprint": self.source.fingerprint,
            "count": len(self.images),
            **({"unreadable": unreadable} if unreadable else {}),
            "autoencoder": fingerprint(self.pipeline.autoencoder_params),
            "codes": codes_in_words(self.pipeline.experiment)[0],
        }


def code_use(pipeline: BinaryLatentDiffusion, test: HeldOut) -> dict[str, float | int]:
    """Returns `bit_rate`, bits per image (32 per real value), and statistics of its use."""
    (codes, aux), bottleneck = test.codes, pipeline.experiment.autoencoder.bottleneck
    if "probs" in aux:
        return image_metrics.code_statistics(codes)
    if "indices" in aux:
        return image_metrics.codebook_statistics(aux["indices"], bottleneck.size)
    h, w, _ = pipeline.code_shape
    return {"bit_rate": h * w * bottleneck.bits}


def prior_metrics(
    pipeline: BinaryLatentDiffusion, probs: np.ndarray, labels: np.ndarray | None
) -> dict[str, float]:
    """Returns the prior's own metrics of images, means over eight draws of noise per image.

    For a diffusion that is `bce`, in nats per bit. `probs` are the encoder's y, (n, h, w, c).
    """
    probs = np.concatenate([probs] * _DRAWS)
    labels = None if labels is None else np.concatenate([labels] * _DRAWS)
    metrics = pipeline.image_metrics(probs, labels, key_for(0, "bce"))
    return {name: float(np.mean(values)) for name, values in metrics.items()}


def likelihood_metrics(
    pipeline: BinaryLatentDiffusion, probs: np.ndarray, labels: np.ndarray | None, **options: Any
) -> dict[str, float]:
    """Returns the mean code length under the prior, `bits_per_image` and `bits_per_dim`.

    The codes are drawn from B(y), as in training. The length is exact for autoregressive priors.
    For others it is an upper bound, that of a sampler with the options.
    """
    code_key, noise_key = jax.random.split(key_for(0, "likelihood"))
    codes = np.asarray(jax.random.uniform(code_key, probs.shape) < probs, np.float32)
    num_draws = pipeline.experiment.evaluate.bound_draws
    bits = pipeline.code_lengths(codes, noise_key, labels, num_draws=num_draws, **options)
    mean = float(np.mean(bits, dtype=np.float64))
    return {"bits_per_image": mean, "bits_per_dim": mean / math.prod(pipeline.code_shape)}


def _settled(how: str, pipeline: BinaryLatentDiffusion) -> str:
    return f"{how}, {pipeline.experiment.dtype.name}, prior {fingerprint(pipeline.prior_params)}"


def _how_bounded(pipeline: BinaryLatentDiffusion) -> str:
    draws = f"{pipeline.experiment.evaluate.bound_draws} draws of noise a step"
    exact = pipeline.experiment.prior.prior.exact
    return _settled(f"codes drawn, {'exact' if exact else draws}", pipeline)


# Arguments: a pipeline and `HeldOut`. Needs: a "prior".
METRICS = {
    "codes": Metric(code_use),
    "prior": Metric(
        lambda pipeline, test: prior_metrics(pipeline, test.probs, test.labels),
        {"bce": "BCE"},
        needs=("prior",),
        settles=functools.partial(_settled, f"{_DRAWS} draws of noise an image"),
    ),
    "bound": Metric(
        lambda pipeline, test: likelihood_metrics(pipeline, test.probs, test.labels),
        needs=("prior",),
        settles=_how_bounded,
    ),
}


def measure(
    pipeline: BinaryLatentDiffusion, test: HeldOut, metrics: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the metrics that are in `pairs.METRICS` or `METRICS`, and how they were measured."""
    of_pairs = [name for name in metrics if name in pairs.METRICS]
    values, settings = pairs.pair_metrics(
        test.reconstructions() if of_pairs else (),
        of_pairs,
        vgg16=pipeline.experiment.autoencoder.vgg16,
        batch_size=pipeline.experiment.sample.batch_size,
    )
    for name, metric in METRICS.items():
        if name in metrics:
            values |= metric.measure(pipeline, test)
            if metric.settles:
                settings[name] = metric.settles(pipeline)
    return values, settings


def autoencoder_metrics(
    pipeline: BinaryLatentDiffusion, images: np.ndarray
) -> dict[str, float | int]:
    """Returns PSNR in dB, SSIM and `code_use` of reconstructions of images, float in [-1, 1]."""
    return measure(pipeline, HeldOut(pipeline, to_uint8(images)), _OF_AUTOENCODER)[0]


def sample_metrics(
    pipeline: BinaryLatentDiffusion, workdir: Path, seconds: dict[str, float]
) -> dict[str, Any]:
    """Judges the samples of a prior with classes, drawn as in `config.sample`.

    If `config.sample` has guidance, samples without guidance are judged too. Adds the seconds of
    the first samples to `seconds`, as `sampling`.

    Returns:
      The metrics of `Judge.sample_quality`, with the suffix `_unguided` for those without guidance;
      the floors `frechet_distance_real` and `frechet_distance_reconstructions`; the settings;
      `num_samples`; and `classifier_accuracy` on real images. If the classifier is near chance,
      there are no metrics but `unjudged`, the reason, and a single batch of `num_timed` samples is
      drawn to measure the time.
    """
    experiment = pipeline.experiment
    judge, num_samples = Judge(experiment, workdir), experiment.evaluate.num_samples
    unjudged = judge.unjudged
    if unjudged:
        num_samples = min(num_samples, experiment.sample.batch_size)
    settings, runs = experiment.sample.settings, {"": {}}
    if getattr(settings, "guidance", 0.0) and not unjudged:  # some kinds of prior have none
        runs["_unguided"] = {"guidance": 0.0}
    result = {"classifier_accuracy": judge.accuracy}
    for suffix, options in runs.items():
        log.info("Drawing %d samples%s", num_samples, suffix.replace("_", ", "))
        start = time.monotonic()
        # The same noise with and without guidance, for a paired comparison.
        key = key_for(experiment.seed, "report")
        quality = judge.sample_quality(pipeline, key, num_samples, **options)
        seconds.setdefault("sampling", time.monotonic() - start)
        if not unjudged:
            result |= {f"{name}{suffix}": value for name, value in quality.items()}
    if unjudged:
        result["unjudged"] = unjudged
    else:
        distances = judge.floors(pipeline)
        result |= {f"frechet_distance_{name}": value for name, value in distances.items()}
    shown = [name for name in ("steps", "temperature", "guidance") if hasattr(settings, name)]
    result |= {name: getattr(settings, name) for name in shown}
    return {**result, "num_timed" if unjudged else "num_samples": num_samples}


def report(pipeline: BinaryLatentDiffusion, workdir: str | Path) -> dict[str, Any]:
    """Measures a trained autoencoder and prior; writes `report.json` into the workdir, returns it.

    Without classes there is no `samples` part, because the classifier needs labels. A part that
    fails is left out and named in `failed`; the first error is raised after the rest is written.
    """
    workdir, seconds = Path(workdir), {}
    for stage in ("autoencoder", "prior"):
        with Checkpoints.open(workdir, stage) as checkpoints:
            seconds[stage] = checkpoints.newest(Checkpoints.meta)["seconds"]
    test = HeldOut.read(pipeline)
    log.info("Measuring the length of %d test codes", len(test.images))
    parts = {
        "autoencoder": lambda: measure(pipeline, test, _OF_AUTOENCODER)[0],
        "prior": lambda: measure(pipeline, test, ("prior", "bound"))[0],
    }
    if pipeline.experiment.prior.conditioning.kind == "class" and test.labels is not None:
        parts["samples"] = lambda: sample_metrics(pipeline, workdir, seconds)
    else:
        log.info(
            "report.json has no samples section, because that needs a prior and test images with "
            "classes: measure the samples with --mode=evaluate --metrics=fid."
        )
    content, failed = {}, {}
    for name, part in parts.items():
        try:
            content[name] = part()
        except Exception as error:
            failed[name] = error
    if failed:
        content["failed"] = {name: str(error) for name, error in failed.items()}
    content["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    content["device"] = results.machine()["device"]
    strict_json.write_json(workdir / "report.json", content)
    for error in failed.values():
        raise error
    return content
