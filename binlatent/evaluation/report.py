"""The numbers of a run: what each stage reports while it trains, and report.json at its end."""

import functools
import itertools
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from binlatent import build
from binlatent.data import masks, sources
from binlatent.data.sources import Source
from binlatent.data.transforms import to_float, to_uint8
from binlatent.evaluation.metrics import image_metrics
from binlatent.evaluation.networks.classifier import apply_classifier, train_classifier
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors import step
from binlatent.runtime.devices import map_batches
from binlatent.runtime.errors import UserError
from binlatent.training import checkpoint

log = logging.getLogger(__name__)

_BCE_DRAWS = 8  # of time and noise for each test image


def open_data(
    config: ml_collections.ConfigDict, split: str, workdir: Path | None = None, keep: bool = True
) -> Source:
    """Returns the source of a split, "train" or "test", of `config.data`.

    Images that cannot be read are named in `bad_files.txt` of the workdir, if there is one; `keep`
    as of `sources.open_source`.
    """
    data = config.data
    return sources.open_source(
        *(data.name, data.path, split, data.image_size, data.channels),
        table=data.table,
        texts=data.texts,
        max_broken=data.max_broken,
        bad_files=workdir and workdir / "bad_files.txt",
        keep=keep,
    )


def load_images(source: Source, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images, uint8, and labels, at most `limit`, spread evenly over a source.

    Spread, because a folder lists one class after the other.
    """
    count = len(source.examples)
    examples = [
        source.examples[i] for i in np.linspace(0, count - 1, min(limit, count)).astype(int)
    ]
    labels = np.array([example["label"] for example in examples])
    return np.stack([example["image"] for example in examples]), labels


def known_labels(
    config: ml_collections.ConfigDict, source: Source, labels: np.ndarray
) -> np.ndarray | None:
    """Returns labels as the prior of a config takes them; None if the images have none for it.

    Args:
      config: of the prior; with data.num_classes = -1 its classes are those of the images.
      source: that they are from.
      labels: of some of its images.

    Raises:
      UserError: for classes or features of texts that are not those of the prior.
    """
    condition, texts = build.condition(config), labels.dtype.kind == "f"
    if condition == "none":
        return None
    if condition == "class":
        if config.data.num_classes != -1 and source.num_classes not in (
            0,
            config.data.num_classes,
        ):
            raise UserError(
                f"The prior has {config.data.num_classes} classes, but the images have "
                f"{source.num_classes}: give those that it was trained on."
            )
        return labels if source.num_classes else None
    if not texts:
        return None
    width = config.prior.text_width
    if (
        labels.ndim - 1 != {"text_token": 1, "text_cross": 2}[condition]
        or labels.shape[-1] != width
    ):
        expected = f"({width},)" if condition == "text_token" else f"(tokens, {width})"
        raise UserError(
            f"The features of texts beside the images have the shape {labels.shape[1:]}, but the "
            f"prior, with config.prior.condition = {condition!r}, takes {expected}."
        )
    return labels


def test_images(
    config: ml_collections.ConfigDict, num: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns `num` test images, float in [-1, 1], and their labels, as of `known_labels`."""
    source = open_data(config, "test")
    images, labels = load_images(source, num)
    return to_float(images), known_labels(config, source, labels)


def autoencoder_metrics(
    pipeline: BinaryLatentDiffusion, images: np.ndarray
) -> dict[str, float | int]:
    """Returns `psnr` in dB and `ssim` of deterministic reconstructions, and the codes' statistics.

    Both are means over the images; `psnr_std` and `ssim_std` their standard deviations (Table 4).
    `bit_rate` is bits an image; of real-valued codes, those of float32.

    Args:
      pipeline: with the autoencoder to judge.
      images: float in [-1, 1], (n, height, width, channels).
    """
    codes, aux = pipeline.encode_with_aux(images)
    originals, decoded = to_uint8(images), to_uint8(pipeline.decode(codes))
    psnr, ssim = image_metrics.psnr(originals, decoded), image_metrics.ssim(originals, decoded)
    result = {
        "psnr": float(np.mean(psnr)),
        "psnr_std": float(np.std(psnr)),
        "ssim": float(np.mean(ssim)),
        "ssim_std": float(np.std(ssim)),
    }
    if "probs" in aux:
        return result | image_metrics.code_statistics(codes)
    if "indices" in aux:
        size = pipeline.config.autoencoder.codebook_size
        return result | image_metrics.codebook_statistics(aux["indices"], size)
    return result | {"bit_rate": 32 * math.prod(pipeline.code_shape)}


def prior_metrics(
    pipeline: BinaryLatentDiffusion, probs: np.ndarray, labels: np.ndarray | None
) -> dict[str, float]:
    """Returns `bce`, nats a bit, over eight draws of time, code and noise for each image.

    Args:
      pipeline: with the prior to judge.
      probs: the encoder's y, (n, h, w, c).
      labels: of the images, as of `known_labels`.
    """
    denoiser = build.denoiser(pipeline.config)
    probs = np.concatenate([probs] * _BCE_DRAWS)
    labels = None if labels is None else np.concatenate([labels] * _BCE_DRAWS)
    key, batches = build.key(0, "bce"), itertools.count()

    def losses(probs, labels):
        batch_key = jax.random.fold_in(key, next(batches))
        return step.eval_step(pipeline.prior_params, probs, labels, batch_key, denoiser=denoiser)

    batch_size = pipeline.config.sample.batch_size
    return {"bce": float(np.mean(map_batches(losses, batch_size, probs, labels)))}


def likelihood_metrics(
    pipeline: BinaryLatentDiffusion,
    probs: np.ndarray,
    labels: np.ndarray | None,
    steps: int | None = None,
) -> dict[str, float]:
    """Returns the variational bound on the test codes' length, `bits_per_image` and `bits_per_dim`.

    The codes are drawn from B(y), as those that the prior is trained on, and the bound is summed
    over all T steps unless `steps` are given; see `BinaryLatentDiffusion.code_lengths`.

    Args:
      pipeline: with the prior to judge.
      probs: the encoder's y, (n, h, w, c).
      labels: of the images, as of `known_labels`.
      steps: of the sampler that the bound is about.
    """
    code_key, noise_key = jax.random.split(build.key(0, "likelihood"))
    codes = np.asarray(jax.random.uniform(code_key, probs.shape) < probs, np.float32)
    bits = pipeline.code_lengths(
        codes,
        noise_key,
        labels,
        steps=steps,
        num_draws=pipeline.config.evaluate.bound_draws,
    )
    mean = float(np.mean(bits, dtype=np.float64))
    return {"bits_per_image": mean, "bits_per_dim": mean / math.prod(pipeline.code_shape)}


class Judge:
    """A classifier of real images, to judge samples by.

    Attributes:
      images, labels: of the test split, uint8 (n, height, width, channels) and (n,) int.
      accuracy: of the classifier on them.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        """Trains the classifier on the training images of a config with classes."""
        train_images, train_labels = load_images(
            open_data(config, "train"), config.evaluate.classifier_images
        )
        self.images, self.labels = load_images(
            open_data(config, "test"), config.evaluate.num_images
        )
        log.info("Training a classifier on %d real images", len(train_images))
        num_classes = config.data.num_classes
        key = build.key(config.seed, "classifier")
        params = train_classifier(train_images, train_labels, num_classes, key)
        self.classify = functools.partial(apply_classifier, params, num_classes=num_classes)
        logits, self._features = self.classify(self.images)
        self.accuracy = float(np.mean(np.argmax(logits, axis=-1) == self.labels))

    def sample_quality(
        self, pipeline: BinaryLatentDiffusion, key: jax.Array, **options: Any
    ) -> dict[str, float]:
        """Draws `config.evaluate.num_samples` samples, classes in turn, and judges them.

        Args:
          pipeline: of a prior with the same classes.
          key: a typed PRNG key.
          **options: of `BinaryLatentDiffusion.sample`.

        Returns:
          `accuracy`, how often a sample with label y is classified as y, and `frechet_distance`
          between the classifier's features of samples and of real test images.
        """
        wanted = np.arange(pipeline.config.evaluate.num_samples) % pipeline.num_classes
        samples = pipeline.sample(len(wanted), key, wanted, **options)
        logits, features = self.classify(to_uint8(samples))
        return {
            "accuracy": float(np.mean(np.argmax(logits, axis=-1) == wanted)),
            "frechet_distance": image_metrics.frechet_distance(self._features, features),
        }

    def inpainting_quality(
        self, pipeline: BinaryLatentDiffusion, key: jax.Array, **options: Any
    ) -> dict[str, float]:
        """Completes halves of the test images, of no given class, and judges the results.

        Args:
          pipeline, key: as of `sample_quality`.
          **options: of `BinaryLatentDiffusion.inpaint`.

        Returns:
          The same two numbers, for the classes of the images that the halves are of.
        """
        _, height, width, _ = self.images.shape
        halves = [masks.preset(name, height, width) for name in ("top", "bottom", "left", "right")]
        keep = np.stack([halves[i % 4] for i in range(len(self.images))])
        results = pipeline.inpaint(to_float(self.images), keep, key, **options)
        logits, features = self.classify(to_uint8(results))
        return {
            "accuracy": float(np.mean(np.argmax(logits, axis=-1) == self.labels)),
            "frechet_distance": image_metrics.frechet_distance(self._features, features),
        }


def sample_metrics(pipeline: BinaryLatentDiffusion) -> tuple[dict[str, float], float]:
    """Judges the samples of a prior with classes, as `config.sample` says and without guidance.

    Returns:
      The metrics of `Judge.sample_quality`, and those without guidance as `_unguided`; the
      settings; the classifier's own accuracy. And the seconds that the first samples took.
    """
    config = pipeline.config
    judge = Judge(config)
    result = {"classifier_accuracy": judge.accuracy}
    for suffix, options in (("", {}), ("_unguided", {"guidance": 0.0})):
        log.info("Drawing %d samples%s", config.evaluate.num_samples, suffix.replace("_", ", "))
        start = time.monotonic()
        # The same noise with and without guidance: a paired comparison.
        quality = judge.sample_quality(pipeline, build.key(config.seed, "report"), **options)
        if not suffix:
            seconds = time.monotonic() - start
        result |= {f"{name}{suffix}": value for name, value in quality.items()}
    result |= {name: config.sample[name] for name in ("steps", "temperature", "guidance")}
    return {**result, "num_samples": config.evaluate.num_samples}, seconds


def report(pipeline: BinaryLatentDiffusion, workdir: str | Path) -> dict[str, Any]:
    """Judges a trained autoencoder and prior and writes `report.json`.

    Args:
      pipeline: of both stages.
      workdir: they come from, and the report goes to.

    Returns:
      What it wrote. Without classes there is no `samples` part: the classifier that judges them
      needs labels.

    Raises:
      UserError: if a stage has not been trained.
    """
    workdir = Path(workdir)
    config = pipeline.config
    seconds = {}
    for stage in ("autoencoder", "prior"):
        with checkpoint.Checkpoints.open(workdir, stage) as checkpoints:
            seconds[stage] = checkpoints.newest(checkpoint.Checkpoints.meta)["seconds"]
    images, labels = test_images(config, config.evaluate.num_images)
    probs = pipeline.encode_probs(images)
    log.info("Bounding the length of %d test codes", len(images))
    content = {
        "autoencoder": autoencoder_metrics(pipeline, images),
        "prior": {
            **prior_metrics(pipeline, probs, labels),
            **likelihood_metrics(pipeline, probs, labels),
        },
    }
    if pipeline.num_classes and labels is not None:
        content["samples"], seconds["sampling"] = sample_metrics(pipeline)
    content["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    content["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    (workdir / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    return content
