"""What each of the two stages plugs into the training loop."""

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from binlatent import build, checks
from binlatent.autoencoder import lpips
from binlatent.data import codes, loader
from binlatent.data.sources import Source
from binlatent.data.transforms import to_float
from binlatent.evaluation import comparison, pictures, quality, report
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import processes
from binlatent.runtime.devices import parallel, parallel_for_debugging, replicate
from binlatent.runtime.errors import UserError
from binlatent.training.state import TrainState, skip_nonfinite

log = logging.getLogger(__name__)

Config = ml_collections.ConfigDict


class Stage(NamedTuple):
    """What the loop needs of a stage."""

    name: str
    train: Config  # its `train` section
    state: TrainState  # before the first step
    step: Callable[[TrainState, Any, int], tuple[TrainState, dict]]  # pmapped; the int: of steps
    batches: Any  # a Grain iterator
    source: str  # fingerprint of the images
    encoder: str  # fingerprint of the frozen encoder, "" for stage 1
    evaluate: Callable[[Any], dict[str, float]]  # EMA parameters -> metrics
    preview: Callable[[Any], np.ndarray]  # EMA parameters -> a picture
    judge: Callable[[Any], dict[str, float]] | None = None  # EMA parameters -> metrics of samples


def with_classes(config: Config, source: Source) -> Config:
    """Returns a copy of the config whose data.num_classes is a number, -1 replaced.

    Raises:
      UserError: if the config names another number than the data has.
    """
    log.info("%d training images, %d classes", len(source.examples), source.num_classes)
    config = copy.deepcopy(config)
    asked = config.data.num_classes
    if asked == -1:
        config.data.num_classes = source.num_classes
    elif asked not in (0, source.num_classes):
        raise UserError(
            f"config.data.num_classes is {asked}, but the data has {source.num_classes} classes; "
            f"set it to that, to 0 to ignore labels, or to -1."
        )
    return config


def check_batch(config: Config, stage: str) -> None:
    """Refuses a batch that the devices, and the parts in which each takes its share, cannot split.

    Raises:
      UserError: with the numbers.
    """
    devices, train = jax.device_count(), config[stage].train
    num = max(train.accumulate, 1)
    if train.batch_size % (devices * num):
        parts = f", each in {num} parts (accumulate)" if num > 1 else ""
        raise UserError(
            f"config.{stage}.train.batch_size, {train.batch_size}, must be a multiple of "
            f"{devices * num}: {devices} {'device' if devices == 1 else 'devices'}{parts}."
        )


def _batches(source: Source, train: Config, config: Config, num_threads: int | None = None):
    """Returns this process's share of the global batches."""
    processes.check_same("the number of training images", str(len(source.examples)))
    return loader.train_batches(
        source,
        train.batch_size // jax.process_count(),
        config.seed,
        num_threads,
        shard=(jax.process_index(), jax.process_count()),
        random_crop=config.data.crop == "random",
        random_flip=config.data.flip,
    )


def setup_autoencoder(config: Config, workdir: Path | None = None) -> tuple[Stage, Config]:
    """Returns stage 1 at its first step, and the config with data.num_classes filled in.

    Args:
      config: of the whole run.
      workdir: where images that cannot be read are named; nowhere if None.

    Raises:
      UserError: for a config that cannot be trained, or a missing file, before any work.
    """
    checks.check(config)
    section, networks = config.autoencoder, build.networks(config)
    check_batch(config, "autoencoder")
    lpips_params = lpips.read_vgg16(section.loss.vgg16) if networks.lpips else {}
    source, test = (report.open_data(config, split, workdir) for split in ("train", "test"))
    config = with_classes(config, source)
    lpips_params = replicate(lpips_params)
    with_discriminator, without = (
        _parallel(config, build.autoencoder_step(config, used))
        for used in (networks, networks._replace(discriminator=None))
    )

    def step(state, batch, index):
        # Until its start the discriminator costs nothing; then the other step is compiled.
        started = networks.discriminator and index >= section.loss.start_step
        return (with_discriminator if started else without)(state, batch, lpips_params)

    images = to_float(report.load_images(test, config.evaluate.num_images)[0])
    pipeline = functools.partial(BinaryLatentDiffusion, config)
    stage = Stage(
        name="autoencoder",
        train=section.train,
        state=build.init_autoencoder_state(config),
        step=step,
        batches=_batches(source, section.train, config),
        source=source.fingerprint,
        encoder="",
        evaluate=lambda params: report.autoencoder_metrics(pipeline(params), images),
        preview=lambda params: pictures.reconstructions(pipeline(params), images[:10]),
    )
    return stage, config


def _open_codes_or_images(
    config: Config, workdir: Path
) -> tuple[BinaryLatentDiffusion, Source, Config]:
    """Returns the encoder, what the prior learns from, and the config with data.num_classes."""
    if config.prior.codes:
        # Of any number of classes, for now: nothing is sampled.
        encoder = BinaryLatentDiffusion.from_workdir(workdir, prior=False)
        source = codes.open_codes(Path(config.prior.codes), encoder.encoder_fingerprint)
    else:
        source = report.open_data(config, "train", workdir)
    config = with_classes(config, source)
    encoder = BinaryLatentDiffusion.from_workdir(workdir, config, prior=False)
    if config.prior.cache_codes and not config.prior.codes:
        folder = codes.encode(encoder, source, workdir / "codes")
        source = codes.open_codes(folder, encoder.encoder_fingerprint)
    return encoder, source, config


def encode(config: Config, workdir: Path) -> Path:
    """Writes the codes of the training images into `codes` of a workdir; returns their folder.

    Raises:
      UserError: if the workdir has no autoencoder with bits, or the images cannot be read.
    """
    checks.check(config)
    checks.check_bits(config)
    source = report.open_data(config, "train", workdir)
    config = with_classes(config, source)
    encoder = BinaryLatentDiffusion.from_workdir(workdir, config, prior=False)
    return codes.encode(encoder, source, workdir / "codes")


def setup_prior(config: Config, workdir: Path) -> tuple[Stage, Config]:
    """Returns stage 2 at its first step, on the codes of the workdir's autoencoder; the config."""
    checks.check(config)
    checks.check_bits(config)
    check_batch(config, "prior")
    encoder, source, config = _open_codes_or_images(config, workdir)
    if build.condition(config).startswith("text") and not config.data.texts:
        raise UserError(
            f"config.prior.condition is {config.prior.condition!r}: set config.data.texts=True, "
            "with the features of a text beside each image of a folder, or learn from other images."
        )
    report.known_labels(config, source, np.asarray(source.examples[0]["label"])[None])
    test = report.open_data(config, "test", workdir)
    cached = "probs" in source.examples[0]
    step = _parallel(config, build.prior_step(config))
    encoder_params = None if cached else replicate(encoder.autoencoder_params)
    images, labels = report.load_images(test, config.evaluate.num_images)
    labels = report.known_labels(config, test, labels)
    probs = encoder.encode_probs(to_float(images))
    pipeline = functools.partial(BinaryLatentDiffusion, config, encoder.autoencoder_params)
    stage = Stage(
        name="prior",
        train=config.prior.train,
        state=build.init_prior_state(config),
        step=lambda state, batch, _: step(state, batch, encoder_params),
        # Python alone reads codes, one at a time: several threads take twice as long, and from JAX.
        batches=_batches(source, config.prior.train, config, num_threads=1 if cached else None),
        source=source.fingerprint,
        encoder=encoder.encoder_fingerprint,
        evaluate=lambda params: report.prior_metrics(pipeline(params), probs, labels),
        preview=lambda params: pictures.samples(
            pipeline(params), build.key(config.seed, "preview")
        ),
        judge=_judge(config, pipeline, workdir),
    )
    return stage, config


def _judge(config: Config, pipeline: Callable, workdir: Path) -> Callable | None:
    """Returns what measures the samples of a prior's parameters, if `config.evaluate` asks for it.

    Raises:
      UserError: for unknown metrics, missing weights or no reference, before any training.
    """
    if not config.evaluate.every:
        return None
    quality.check_while_training(config)
    network = quality.network(config, workdir)
    comparison.check_network(network, config.evaluate.metrics)
    first = jax.process_index() == 0
    known = quality.reference(config, network, workdir)[0] if first else None
    if first:
        quality.check_reference(known, config.evaluate.metrics, network)
    return lambda params: quality.while_training(pipeline(params), network, known, workdir)


def _parallel(config: Config, step: Callable) -> Callable:
    """Returns a stage's step for all devices.

    Raises:
      UserError: if several processes are to look for a NaN.
    """
    if config.on_nonfinite == "skip":
        step = skip_nonfinite(step)
    if not config.debug_nans:
        return parallel(step, num_frozen=1)
    if jax.process_count() > 1:
        raise UserError("config.debug_nans is for one process: start a single one to find the NaN.")
    return parallel_for_debugging(step, num_frozen=1)
