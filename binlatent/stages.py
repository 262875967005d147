"""What each of the two stages plugs into the training loop."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.autoencoder.lpips import read_vgg16
from binlatent.data import codes, loader
from binlatent.data.sources import Source
from binlatent.data.splits import load_images, open_split
from binlatent.data.transforms import to_float
from binlatent.evaluation import pictures, quality, report
from binlatent.experiment import Experiment, check_same_model, of_checkpoint
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import processes
from binlatent.runtime.devices import parallel, parallel_for_debugging, replicate
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import key_for
from binlatent.training import loop
from binlatent.training.checkpoint import Checkpoints, exists
from binlatent.training.loop import Stage
from binlatent.training.optimizer import Training
from binlatent.training.state import TrainState, skip_nonfinite

log = logging.getLogger(__name__)


def with_classes(experiment: Experiment, source: Source) -> Experiment:
    """Returns a copy of the experiment that knows how many classes there are."""
    log.info("%d training images, %d classes", len(source.examples), source.num_classes)
    asked = experiment.data.num_classes
    if asked not in (-1, 0, source.num_classes):
        raise UserError(
            f"config.data.num_classes is {asked}, but the data has {source.num_classes} classes; "
            f"set it to that, to 0 to ignore labels, or to -1."
        )
    return experiment.with_classes(source.num_classes) if asked == -1 else experiment


def check_batch(train: Training, stage: str) -> None:
    """Refuses a batch that the devices, and the parts in which each takes its share, cannot split.

    Args:
      train: of a stage.
      stage: its name, for the message.
    """
    devices, num = jax.device_count(), max(train.accumulate, 1)
    if train.batch_size % (devices * num):
        parts = f", each in {num} parts (accumulate)" if num > 1 else ""
        raise UserError(
            f"config.{stage}.train.batch_size, {train.batch_size}, must be a multiple of "
            f"{devices * num}: {devices} {'device' if devices == 1 else 'devices'}{parts}."
        )


def check_prior(experiment: Experiment) -> None:
    """Refuses an autoencoder without bits, or a batch that cannot be split."""
    experiment.autoencoder.check_bits()
    check_batch(experiment.prior.train, "prior")


def check_same_data(here: Experiment, there: Experiment, stage: str) -> None:
    """Refuses other data than a checkpoint's training began with.

    Args:
      here: as given now.
      there: as stored in the checkpoint.
      stage: its name.
    """
    for name in ("name", "texts"):
        now, before = getattr(here.data, name), getattr(there.data, name)
        if now != before:
            raise UserError(
                f"The {stage} in the workdir is being trained on config.data.{name} = {before!r}, "
                f"not {now!r}: use the same, or another --workdir."
            )


def check_resumable(here: Experiment, there: Experiment, stage: str) -> None:
    """Refuses an experiment with which a checkpoint's training cannot go on; as above."""
    check_same_model(here, there, stage)
    now, before = here.autoencoder, there.autoencoder
    critics = now.networks.discriminator, before.networks.discriminator
    if stage != "autoencoder" or critics == (None, None):
        return
    if None in critics:
        raise UserError(
            "The autoencoder in the workdir was trained with config.autoencoder.loss.adversarial = "
            f"{before.objective.adversarial}, so it cannot go on with {now.objective.adversarial}: "
            "only with one above 0 does it have a discriminator. To start one late, set "
            "loss.start_step."
        )
    for name in ("width", "num_layers", "norm"):
        new, old = (getattr(critic, name) for critic in critics)
        if new != old:
            raise UserError(
                f"config.autoencoder.discriminator.{name} was {old!r} and cannot become {new!r}: "
                "use the same, or another --workdir."
            )


def _check_meta(
    experiment: Experiment, stage: str, source: str, directory: Path, meta: dict[str, Any]
) -> None:
    """Refuses a checkpoint's `meta` if training cannot go on; warns if it goes on otherwise."""
    trained = of_checkpoint(meta, directory)
    check_resumable(experiment, trained, stage)
    if meta["data"] is None:  # converted, not trained here
        return
    if meta["source"] != source:
        log.warning(
            "The images, or their labels, are not those that the %s began with: it goes on with "
            "these, from the same place in another order.",
            stage,
        )
    train, before = (getattr(x, stage).train for x in (experiment, trained))
    values = {
        "seed": (experiment.seed, trained.seed),
        f"{stage}.train.batch_size": (train.batch_size, before.batch_size),
        "data.crop": (experiment.data.crop, trained.data.crop),
        "data.flip": (experiment.data.flip, trained.data.flip),
    }
    for name, (here, there) in values.items():
        if here != there:
            log.warning(
                "config.%s was %r and is %r: the %s goes on, but not as it would have.",
                *(name, there, here, stage),
            )


def _batches(
    source: Source, train: Training, experiment: Experiment, num_threads: int | None = None
) -> Any:
    """Returns this process's share of the global batches."""
    processes.check_same("the number of training images", str(len(source.examples)))
    return loader.train_batches(
        source,
        train.batch_size // jax.process_count(),
        experiment.seed,
        num_threads,
        shard=(jax.process_index(), jax.process_count()),
        random_crop=experiment.data.crop == "random",
        random_flip=experiment.data.flip,
    )


def setup_autoencoder(experiment: Experiment, workdir: Path) -> Stage:
    """Returns stage 1 at its first step.

    Args:
      experiment: of the whole run.
      workdir: of the run; images that cannot be read are named there.
    """
    spec = experiment.autoencoder
    check_batch(spec.train, "autoencoder")
    lpips_params = read_vgg16(spec.vgg16) if spec.networks.lpips else {}
    source, test = (open_split(experiment.data, split, workdir) for split in ("train", "test"))
    experiment = with_classes(experiment, source)
    lpips_params, networks = replicate(lpips_params), spec.networks
    with_discriminator, without = (
        _parallel(experiment, spec.step(used))
        for used in (networks, networks._replace(discriminator=None))
    )

    def step(state, batch, index):
        # Until its start the discriminator costs nothing; then the other step is compiled.
        started = networks.discriminator and index >= spec.start_step
        return (with_discriminator if started else without)(state, batch, lpips_params)

    def check_unfinished():
        if exists(workdir, "prior"):
            raise UserError(
                f"The prior in {workdir} belongs to its autoencoder as it is: copy the folder "
                "autoencoder alone into another workdir to train it on there."
            )

    images = to_float(load_images(test, experiment.evaluate.num_images)[0])
    pipeline = functools.partial(BinaryLatentDiffusion, experiment)
    return Stage(
        name="autoencoder",
        train=spec.train,
        state=spec.init_state(experiment.seed),
        step=step,
        batches=_batches(source, spec.train, experiment),
        meta={"config": experiment.config, "source": source.fingerprint, "encoder": ""},
        check_resumable=functools.partial(
            _check_meta, experiment, "autoencoder", source.fingerprint, workdir / "autoencoder"
        ),
        check_unfinished=check_unfinished,
        evaluate=lambda params: report.autoencoder_metrics(pipeline(params), images),
        preview=lambda params: pictures.reconstructions(pipeline(params), images[:10]),
    )


def _write_codes(encoder: BinaryLatentDiffusion, source: Source, workdir: Path) -> Path:
    return codes.write_codes(
        source,
        workdir / "codes",
        encoder=encoder.encoder_fingerprint,
        encode_probs=encoder.encode_probs,
        code_shape=encoder.code_shape,
        data=encoder.experiment.data,
        batch_size=encoder.experiment.sample.batch_size,
    )


def _open_codes_or_images(
    experiment: Experiment, workdir: Path
) -> tuple[BinaryLatentDiffusion, Source, Experiment]:
    """Returns the encoder, what the prior learns from, and the experiment with its classes."""
    spec = experiment.prior
    if spec.codes:
        # Of any number of classes, for now: nothing is sampled.
        encoder = BinaryLatentDiffusion.from_workdir(workdir, prior=False)
        source = codes.open_codes(Path(spec.codes), encoder.encoder_fingerprint)
    else:
        source = open_split(experiment.data, "train", workdir)
    experiment = with_classes(experiment, source)
    encoder = BinaryLatentDiffusion.from_workdir(workdir, experiment, prior=False)
    if spec.cache_codes and not spec.codes:
        folder = _write_codes(encoder, source, workdir)
        source = codes.open_codes(folder, encoder.encoder_fingerprint)
    return encoder, source, experiment


def write_codes(experiment: Experiment, workdir: Path) -> Path:
    """Writes the codes of the training images into `codes` of a workdir; returns their folder."""
    experiment.autoencoder.check_bits()
    source = open_split(experiment.data, "train", workdir)
    experiment = with_classes(experiment, source)
    encoder = BinaryLatentDiffusion.from_workdir(workdir, experiment, prior=False)
    folder = _write_codes(encoder, source, workdir)
    log.info("The codes are in %s", folder)
    return folder


def setup_prior(experiment: Experiment, workdir: Path) -> Stage:
    """Returns stage 2 at its first step, on the codes of the workdir's autoencoder."""
    check_prior(experiment)
    encoder, source, experiment = _open_codes_or_images(experiment, workdir)
    spec, conditioning = experiment.prior, experiment.prior.conditioning
    if conditioning.of_texts and not experiment.data.texts:
        raise UserError(
            f"config.prior.condition is {conditioning.kind!r}: set config.data.texts=True, with "
            "the features of a text beside each image of a folder, or learn from other images."
        )
    conditioning.known(source, np.asarray(source.examples[0]["label"])[None])
    test = open_split(experiment.data, "test", workdir)
    cached = "probs" in source.examples[0]
    apply = experiment.autoencoder.networks.autoencoder.apply
    encode_probs = functools.partial(apply, method="probs")
    step = _parallel(experiment, spec.step(encode_probs, experiment.run.debug_nans))
    encoder_params = None if cached else replicate(encoder.autoencoder_params)
    images, labels = load_images(test, experiment.evaluate.num_images)
    labels = conditioning.known(test, labels)
    probs = encoder.encode_probs(to_float(images))
    pipeline = functools.partial(BinaryLatentDiffusion, experiment, encoder.autoencoder_params)
    preview_key = key_for(experiment.seed, "preview")
    return Stage(
        name="prior",
        train=spec.train,
        state=spec.init_state(experiment.seed),
        step=lambda state, batch, _: step(state, batch, encoder_params),
        # Python alone reads codes, one at a time: several threads take twice as long, and from JAX.
        batches=_batches(source, spec.train, experiment, num_threads=1 if cached else None),
        meta={
            "config": experiment.config,
            "source": source.fingerprint,
            "encoder": encoder.encoder_fingerprint,
        },
        check_resumable=functools.partial(
            _check_meta, experiment, "prior", source.fingerprint, workdir / "prior"
        ),
        check_unfinished=lambda: None,
        evaluate=lambda params: report.prior_metrics(pipeline(params), probs, labels),
        preview=lambda params: pictures.samples(pipeline(params), preview_key),
        judge=quality.judge_while_training(experiment, workdir, pipeline),
        judge_every=experiment.evaluate.every,
    )


def _parallel(experiment: Experiment, step: Callable) -> Callable:
    """Returns a stage's step for all devices."""
    if experiment.run.on_nonfinite == "skip":
        step = skip_nonfinite(step)
    if not experiment.run.debug_nans:
        return parallel(step, num_frozen=1)
    if jax.process_count() > 1:
        raise UserError("config.debug_nans is for one process: start a single one to find the NaN.")
    return parallel_for_debugging(step, num_frozen=1)


def _train(experiment: Experiment, workdir: Path, stage: str, setup: Callable) -> TrainState:
    """Trains a stage in a workdir, or goes on with it, or finds it done."""
    workdir = Path(workdir)
    if exists(workdir, stage):  # other data is refused before hours go into preparing it
        with Checkpoints.open(workdir, stage) as checkpoints:
            meta = checkpoints.newest(Checkpoints.meta)
        trained = of_checkpoint(meta, workdir / stage)
        if meta["data"] is not None:  # trained here, and not converted alone
            check_same_data(experiment, trained, stage)
    return loop.train(setup(experiment, workdir), experiment.run, workdir)


def train_autoencoder(experiment: Experiment, workdir: Path) -> TrainState:
    """Trains stage 1 in `workdir`, or goes on with it, or finds it done."""
    return _train(experiment, workdir, "autoencoder", setup_autoencoder)


def train_prior(experiment: Experiment, workdir: Path) -> TrainState:
    """Trains stage 2 in `workdir` after stage 1."""
    return _train(experiment, workdir, "prior", setup_prior)
