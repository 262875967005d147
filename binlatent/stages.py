"""The two stages: what each of them gives to the training loop."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.autoencoder import lpips
from binlatent.data import classes, codes, loader
from binlatent.data.sources import Source
from binlatent.data.splits import load_images, open_split, spread_indices
from binlatent.data.transforms import to_float
from binlatent.evaluation import pictures, quality, report
from binlatent.experiment import Experiment, of_checkpoint
from binlatent.experiment.resume import changed_keys, check_resumable, check_same_data
from binlatent.experiment.sizes import describe_stage, size_warning
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import paths, processes, strict_json
from binlatent.runtime.devices import parallel, parallel_for_debugging, replicate
from binlatent.runtime.errors import UserError
from binlatent.runtime.keys import key_for
from binlatent.runtime.locks import only_process
from binlatent.runtime.weights import digest
from binlatent.texts.cache import write_features
from binlatent.texts.captioned import check_captions, with_captions
from binlatent.texts.encoder import TextEncoder
from binlatent.training import loop
from binlatent.training.checkpoint import Checkpoints, exists
from binlatent.training.loop import Stage
from binlatent.training.optimizer import Training
from binlatent.training.state import TrainState, skip_nonfinite

log = logging.getLogger(__name__)


def with_classes(experiment: Experiment, source: Source) -> Experiment:
    """Returns a copy of the experiment with the classes of the training images."""
    listed = f": {classes.numbered(source.classes)}" if source.classes else ""
    count = {0: "no classes", 1: "1 class"}.get(source.num_classes, f"{source.num_classes} classes")
    log.info("%d training images, %s%s", len(source.examples), count, listed)
    asked = experiment.data.num_classes
    if asked:
        classes.check_same_classes(source.classes, experiment.prior.conditioning.names, "model")
    if asked not in (-1, 0, source.num_classes):
        raise UserError(
            f"config.data.num_classes is {asked}, but the data has {source.num_classes} classes; "
            f"set it to that number, to 0 to ignore labels, or to -1 to take what the data has."
        )
    return experiment.with_classes(source.num_classes, source.classes) if asked else experiment


def check_batch(train: Training, stage: str) -> None:
    """Refuses a batch size that does not divide evenly over devices and `accumulate` parts.

    Args:
      train: settings of the stage.
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
    """Refuses an autoencoder without bits, or a batch size that does not divide evenly."""
    experiment.autoencoder.check_bits()
    check_batch(experiment.prior.train, "prior")


def _check_meta(experiment: Experiment, stage: str, directory: Path, meta: dict[str, Any]) -> None:
    """Refuses a checkpoint from which training cannot continue; `meta` describes it."""
    check_resumable(experiment, of_checkpoint(meta, directory), stage)


def _tell_changes(
    experiment: Experiment, stage: str, source: str, directory: Path, meta: dict[str, Any]
) -> None:
    """Warns if training continues with other data or settings than the checkpoint's `meta` has."""
    if meta["data"] is None:  # converted, not trained here
        return
    if meta["source"] != source:
        log.warning(
            "The images or labels differ from those that training of the %s began with. Training "
            "continues with the new ones, at the same step.",
            stage,
        )
    trained = of_checkpoint(meta, directory)
    places = trained.data.path, experiment.data.path
    if meta["source"] == source and places[0] != places[1]:
        moved = "The images were moved from %r to %r. The %s continues on the same images."
        log.info(moved, *places, stage)
    changes = changed_keys(experiment, trained, stage)
    if changes:
        pairs = changes.items()
        listed = [f"config.{name} was {old!r} and is {new!r}" for name, (old, new) in pairs]
        log.warning("Training of the %s continues with changes: %s.", stage, "; ".join(listed))


def _batches(
    source: Source,
    train: Training,
    experiment: Experiment,
    num_threads: int | None = None,
    random_caption: bool = False,
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
        random_caption=random_caption,
    )


def _open_test(experiment: Experiment, workdir: Path) -> Source:
    """Returns the test split; warns if it has too few images for a Frechet distance."""
    test = open_split(experiment.data, "test", workdir)
    if len(test.examples) < 2 and experiment.data.num_classes:
        log.warning(
            "There is only one test image, so report.json will have no Frechet distance, which "
            "needs two. Add images."
        )
    return test


def setup_autoencoder(experiment: Experiment, workdir: Path) -> Stage:
    """Returns stage 1 before its first step.

    Args:
      experiment: of the run.
      workdir: of the run; a file in it lists the images that cannot be read.
    """
    spec = experiment.autoencoder
    check_batch(spec.train, "autoencoder")
    instead = f"{lpips.ELSEWHERE}, or train without it: --config.autoencoder.loss.perceptual=0"
    lpips_params = lpips.read_vgg16(spec.vgg16, instead) if spec.networks.lpips else {}
    source = open_split(experiment.data, "train", workdir)
    test = _open_test(experiment, workdir)
    experiment = with_classes(experiment, source)
    lpips_params, networks = replicate(lpips_params), spec.networks
    with_discriminator, without = (
        _parallel(experiment, spec.step(used))
        for used in (networks, networks._replace(discriminator=None))
    )

    def step(state, batch, index):
        # Before its start the discriminator costs nothing; at the start another step is compiled.
        started = networks.discriminator and index >= spec.start_step
        return (with_discriminator if started else without)(state, batch, lpips_params)

    def check_unfinished():
        if exists(workdir, "prior"):
            raise UserError(
                f"The prior in {workdir} belongs to its autoencoder as it is: to train the "
                "autoencoder further, copy its folder alone into another workdir."
            )

    images = to_float(load_images(test, experiment.evaluate.num_images)[0])
    pipeline = functools.partial(BinaryLatentDiffusion, experiment)
    return Stage(
        name="autoencoder",
        train=spec.train,
        state=spec.init_state(experiment.seed),
        step=step,
        batches=_batches(source, spec.train, experiment),
        meta={
            "config": experiment.config,
            "source": source.fingerprint,
            "classes": experiment.prior.conditioning.names,
            "encoder": "",
        },
        check_resumable=functools.partial(
            _check_meta, experiment, "autoencoder", workdir / "autoencoder"
        ),
        tell_changes=functools.partial(
            _tell_changes, experiment, "autoencoder", source.fingerprint, workdir / "autoencoder"
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
    """Returns the encoder, the source of codes or images, and the experiment with its classes."""
    spec = experiment.prior
    if spec.codes:
        # The number of classes is set below: nothing is sampled here.
        encoder = BinaryLatentDiffusion.from_workdir(workdir, prior=False)
        source = codes.open_codes(Path(spec.codes), encoder.encoder_fingerprint)
    else:
        source = open_split(experiment.data, "train", workdir)
    experiment = with_classes(experiment, source)
    encoder = BinaryLatentDiffusion.from_workdir(workdir, experiment, prior=False)
    if spec.cache_codes and not spec.codes:
        folder, images = _write_codes(encoder, source, workdir), source
        source = codes.open_codes(folder, encoder.encoder_fingerprint)
        source = dataclasses.replace(source, captions=images.captions, files=images.files)
    return encoder, source, experiment


def _text_encoder(experiment: Experiment, source: Source, workdir: Path) -> TextEncoder:
    """Returns the encoder of captions; refuses a config without one, or images without captions."""
    if not experiment.texts.encoder:
        raise UserError(
            f"config.prior.condition is {experiment.prior.conditioning.kind!r}: set "
            "config.texts.encoder if the images have captions, or config.data.texts=True if there "
            "are files with the features of a text."
        )
    if source.captions is None:
        raise UserError(
            "Captions are read from folders only: set config.data.name=folder, and leave out "
            "config.prior.codes."
        )
    check_captions(source, experiment.data.max_broken, workdir / "bad_files.txt")
    return experiment.texts.load(workdir)


def check_all(experiment: Experiment, workdir: Path) -> None:
    """Checks before stage 1 what stage 2 needs."""
    check_prior(experiment)
    if experiment.prior.conditioning.of_texts and not experiment.data.texts:
        _text_encoder(experiment, open_split(experiment.data, "train", workdir), workdir)


def _with_texts(experiment: Experiment, source: Source, workdir: Path) -> tuple[Experiment, Source]:
    """Returns the experiment with the width of text features, and the source with the features."""
    conditioning = experiment.prior.conditioning
    if not conditioning.of_texts:
        return experiment, source
    if experiment.data.texts:
        width = np.shape(source.examples[0]["label"])[-1:]
        return experiment.with_texts(*width) if width else experiment, source
    encoder = _text_encoder(experiment, source, workdir)
    captions, per_token = source.captions(), conditioning.kind == "text_cross"
    source = with_captions(source, write_features(captions, workdir / "texts", encoder, per_token))
    fingerprint = digest(source.fingerprint, captions)
    source = dataclasses.replace(source, fingerprint=fingerprint)
    return experiment.with_texts(encoder.width(per_token), encoder.sha256), source


def write_codes(experiment: Experiment, workdir: Path) -> Path:
    """Writes the codes of the training images into the folder `codes` of a workdir; returns it."""
    experiment.autoencoder.check_bits()
    source = open_split(experiment.data, "train", workdir)
    experiment = with_classes(experiment, source)
    encoder = BinaryLatentDiffusion.from_workdir(workdir, experiment, prior=False)
    folder = _write_codes(encoder, source, workdir)
    log.info("The codes are in %s", folder)
    return folder


def setup_prior(experiment: Experiment, workdir: Path) -> Stage:
    """Returns stage 2 before its first step, on the codes of the workdir's autoencoder."""
    check_prior(experiment)
    encoder, source, experiment = _open_codes_or_images(experiment, workdir)
    experiment, source = _with_texts(experiment, source, workdir)
    spec, conditioning = experiment.prior, experiment.prior.conditioning
    conditioning.known(source, np.asarray(source.examples[0]["label"])[None])
    test = _open_test(experiment, workdir)
    cached = "probs" in source.examples[0]
    apply = experiment.autoencoder.networks.autoencoder.apply
    encode_probs = functools.partial(apply, method="probs")
    step = _parallel(experiment, spec.step(encode_probs, experiment.run.debug_nans))
    encoder_params = None if cached else replicate(encoder.autoencoder_params)
    params = encoder.autoencoder_params
    pipeline = functools.partial(BinaryLatentDiffusion, experiment, params, workdir=workdir)
    held_out = report.HeldOut.of(pipeline(), test)
    probs, labels = held_out.probs, held_out.labels
    captions = [caption for caption in held_out.captions if caption]
    prompts = [captions[i] for i in spread_indices(len(captions), 10)]
    if prompts and jax.process_index() == 0:
        pictures.write_prompts(workdir, prompts)
    preview_key = key_for(experiment.seed, "preview")
    return Stage(
        name="prior",
        train=spec.train,
        state=spec.init_state(experiment.seed),
        step=lambda state, batch, _: step(state, batch, encoder_params),
        # Reading codes is plain Python: more threads take twice as long and slow JAX down.
        batches=_batches(
            *(source, spec.train, experiment, 1 if cached else None),
            random_caption=bool(experiment.texts.encoder),
        ),
        meta={
            "config": experiment.config,
            "source": source.fingerprint,
            "classes": experiment.prior.conditioning.names,
            "encoder": encoder.encoder_fingerprint,
        },
        check_resumable=functools.partial(_check_meta, experiment, "prior", workdir / "prior"),
        tell_changes=functools.partial(
            _tell_changes, experiment, "prior", source.fingerprint, workdir / "prior"
        ),
        check_unfinished=lambda: None,
        evaluate=lambda params: report.prior_metrics(pipeline(params), probs, labels),
        preview=lambda params: pictures.samples(pipeline(params), preview_key, prompts=prompts),
        judge=quality.judge_while_training(experiment, workdir, pipeline),
        judge_every=experiment.evaluate.every,
    )


def _parallel(experiment: Experiment, step: Callable) -> Callable:
    """Returns the step of a stage, parallel over all devices."""
    if experiment.run.on_nonfinite == "skip":
        step = skip_nonfinite(step)
    if not experiment.run.debug_nans:
        return parallel(step, num_frozen=1)
    if jax.process_count() > 1:
        raise UserError("config.debug_nans works with one process only: start a single one.")
    return parallel_for_debugging(step, num_frozen=1)


def alone_in(workdir: Path) -> AbstractContextManager:
    """Returns a lock that keeps other runs from training in a workdir."""
    if jax.process_index():  # process 0 holds the lock for the run
        return nullcontext()
    return only_process(workdir / ".training.lock", f"{workdir} is being trained")


def _train(experiment: Experiment, workdir: Path, name: str, setup: Callable) -> TrainState:
    """Trains a stage in a workdir, continues it, or finds it complete."""
    workdir = Path(paths.expand(str(workdir), "workdir"))
    with alone_in(workdir):
        if exists(workdir, name):  # refuse other data before preparing it, which can take hours
            with Checkpoints.open(workdir, name) as checkpoints:
                meta = checkpoints.newest(Checkpoints.meta)
            trained = of_checkpoint(meta, workdir / name)
            if meta["data"] is not None:  # None: converted, not trained here
                check_same_data(experiment, trained, name)
                experiment = experiment.with_names(trained.prior.conditioning.names)
        if name == "autoencoder" and (warning := size_warning(experiment)):
            log.warning("%s", warning)
        stage = setup(experiment, workdir)
        num_params = sum(x.size for x in jax.tree.leaves(stage.state.params))
        log.info("%s", describe_stage(experiment, name, num_params))
        if (names := stage.meta["classes"]) and jax.process_index() == 0:
            strict_json.write_json(workdir / "classes.json", names)
        return loop.train(stage, experiment.run, workdir)


def train_autoencoder(experiment: Experiment, workdir: Path) -> TrainState:
    """Trains stage 1 in `workdir`, continues it, or finds it complete."""
    return _train(experiment, workdir, "autoencoder", setup_autoencoder)


def train_prior(experiment: Experiment, workdir: Path) -> TrainState:
    """Trains stage 2 in `workdir` after stage 1."""
    return _train(experiment, workdir, "prior", setup_prior)
