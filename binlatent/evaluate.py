"""The numbers of a run: what each stage reports while it trains, and report.json at its end."""

import functools
import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from binlatent import build, checkpoint
from binlatent.data import sources
from binlatent.data.sources import Source
from binlatent.data.transforms import to_float, to_uint8
from binlatent.evaluation import metrics
from binlatent.evaluation.classifier import apply_classifier, train_classifier
from binlatent.pipeline import BinaryLatentDiffusion, map_batches
from binlatent.stages import prior

log = logging.getLogger(__name__)

_BCE_DRAWS = 8  # of time and noise for each test image


def open_data(config: ml_collections.ConfigDict, split: str) -> Source:
    """Returns the source of a split, "train" or "test", of `config.data`."""
    data = config.data
    return sources.open_source(data.name, data.path, split, data.image_size, data.channels)


def load_images(source: Source, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images, uint8, and labels, at most `limit`, spread evenly over a source.

    Spread, because a folder lists one class after the other.
    """
    count = len(source.examples)
    examples = [
        source.examples[i] for i in np.linspace(0, count - 1, min(limit, count)).astype(int)
    ]
    labels = np.array([example["label"] for example in examples], np.int32)
    return np.stack([example["image"] for example in examples]), labels


def test_images(config: ml_collections.ConfigDict, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `num` test images, float in [-1, 1], and labels."""
    images, labels = load_images(open_data(config, "test"), num)
    return to_float(images), labels


def autoencoder_metrics(
    pipeline: BinaryLatentDiffusion, images: np.ndarray
) -> dict[str, float | int]:
    """Returns `psnr` in dB and `ssim` of deterministic reconstructions, and the codes' statistics.

    Args:
      pipeline: with the autoencoder to judge.
      images: float in [-1, 1], (n, height, width, channels).
    """
    codes = pipeline.encode(images)
    originals, decoded = to_uint8(images), to_uint8(pipeline.decode(codes))
    return {
        "psnr": float(np.mean(metrics.psnr(originals, decoded))),
        "ssim": float(np.mean(metrics.ssim(originals, decoded))),
        **metrics.code_statistics(codes),
    }


def prior_metrics(
    pipeline: BinaryLatentDiffusion, probs: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Returns `bce`, nats a bit, over eight draws of time, code and noise for each image.

    Args:
      pipeline: with the prior to judge.
      probs: the encoder's y, (n, h, w, c).
      labels: (n,) int.
    """
    denoiser = build.denoiser(pipeline.config)
    probs, labels = (np.concatenate([x] * _BCE_DRAWS) for x in (probs, labels))
    batch_keys = iter(jax.random.split(build.key(0, "bce"), len(probs)))

    def losses(probs, labels):
        return prior.eval_step(
            pipeline.prior_params, probs, labels, next(batch_keys), denoiser=denoiser
        )

    batch_size = pipeline.config.sample.batch_size
    return {"bce": float(np.mean(map_batches(losses, batch_size, probs, labels)))}


def sample_metrics(
    pipeline: BinaryLatentDiffusion, source: Source, test: tuple[np.ndarray, np.ndarray]
) -> tuple[dict[str, float], float]:
    """Judges samples by a classifier that is trained on the real training images.

    Args:
      pipeline: of a prior with classes.
      source: of the training images.
      test: real images, uint8, and their labels, for the Frechet distance and the classifier's
        own accuracy.

    Returns:
      The metrics: `accuracy`, how often a sample with label y is classified as y, and
      `frechet_distance` between the classifier's features of samples and of real test images;
      both again `_unguided`; the settings, and the classifier's own accuracy. And the seconds
      that the guided samples took.
    """
    config = pipeline.config
    images, labels = load_images(source, config.evaluate.classifier_images)
    num_classes = pipeline.num_classes
    log.info("Training a classifier on %d real images", len(images))
    params = train_classifier(images, labels, num_classes, build.key(config.seed, "classifier"))
    classify = functools.partial(apply_classifier, params, num_classes=num_classes)
    predictions, real_features = classify(test[0])
    result = {"classifier_accuracy": float(np.mean(predictions == test[1]))}

    wanted = np.arange(config.evaluate.num_samples) % num_classes
    for suffix, guidance in (("", config.sample.guidance), ("_unguided", 0.0)):
        log.info("Drawing %d samples with guidance %g", len(wanted), guidance)
        start = time.monotonic()
        # The same noise with and without guidance: a paired comparison.
        key = build.key(config.seed, "report")
        samples = pipeline.sample(len(wanted), key, wanted, guidance=guidance)
        if not suffix:
            seconds = time.monotonic() - start
        predictions, features = classify(to_uint8(samples))
        result[f"accuracy{suffix}"] = float(np.mean(predictions == wanted))
        distance = metrics.frechet_distance(real_features, features)
        result[f"frechet_distance{suffix}"] = distance
    result |= {name: config.sample[name] for name in ("steps", "temperature", "guidance")}
    return {**result, "num_samples": len(wanted)}, seconds


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
            seconds[stage] = checkpoints.meta()["seconds"]
    test = load_images(open_data(config, "test"), config.evaluate.num_images)
    images = to_float(test[0])
    content = {
        "autoencoder": autoencoder_metrics(pipeline, images),
        "prior": prior_metrics(pipeline, pipeline.encode_probs(images), test[1]),
    }
    if pipeline.num_classes:
        content["samples"], seconds["sampling"] = sample_metrics(
            pipeline, open_data(config, "train"), test
        )
    content["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    content["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    (workdir / "report.json").write_text(json.dumps(content, indent=2) + "\n")
    return content
