"""The one training loop, and what each of the two stages plugs into it."""

import copy
import functools
import logging
import math
import operator
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from binlatent import build, checks, codes, evaluate, outputs, processes, quality, weights
from binlatent.checkpoint import Checkpoints, as_config, exists
from binlatent.data import loader
from binlatent.data.sources import Source
from binlatent.data.transforms import to_float
from binlatent.errors import UserError
from binlatent.evaluation import comparison
from binlatent.logbook import Logbook
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.stages.state import (
    TrainState,
    largest,
    parallel,
    parallel_for_debugging,
    replicate,
    shard,
    skip_nonfinite,
    updates_made,
)

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
            f"{devices * num}: {devices} devices{parts}."
        )


def _batches(source: Source, train: Config, config: Config):
    """Returns this process's share of the global batches."""
    processes.check_same("the number of training images", str(len(source.examples)))
    return loader.train_batches(
        source,
        train.batch_size // jax.process_count(),
        config.seed,
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
    lpips_params = weights.read_vgg16(section.loss.vgg16) if networks.lpips else {}
    source, test = (evaluate.open_data(config, split, workdir) for split in ("train", "test"))
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

    images = to_float(evaluate.load_images(test, config.evaluate.num_images)[0])
    pipeline = functools.partial(BinaryLatentDiffusion, config)
    stage = Stage(
        name="autoencoder",
        train=section.train,
        state=build.init_autoencoder_state(config),
        step=step,
        batches=_batches(source, section.train, config),
        source=source.fingerprint,
        encoder="",
        evaluate=lambda params: evaluate.autoencoder_metrics(pipeline(params), images),
        preview=lambda params: outputs.reconstructions(pipeline(params), images[:10]),
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
        source = evaluate.open_data(config, "train", workdir)
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
    source = evaluate.open_data(config, "train", workdir)
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
    evaluate.known_labels(config, source, np.asarray(source.examples[0]["label"])[None])
    test = evaluate.open_data(config, "test", workdir)
    cached = "probs" in source.examples[0]
    step = _parallel(config, build.prior_step(config))
    encoder_params = None if cached else replicate(encoder.autoencoder_params)
    images, labels = evaluate.load_images(test, config.evaluate.num_images)
    labels = evaluate.known_labels(config, test, labels)
    probs = encoder.encode_probs(to_float(images))
    pipeline = functools.partial(BinaryLatentDiffusion, config, encoder.autoencoder_params)
    stage = Stage(
        name="prior",
        train=config.prior.train,
        state=build.init_prior_state(config),
        step=lambda state, batch, _: step(state, batch, encoder_params),
        batches=_batches(source, config.prior.train, config),
        source=source.fingerprint,
        encoder=encoder.encoder_fingerprint,
        evaluate=lambda params: evaluate.prior_metrics(pipeline(params), probs, labels),
        preview=lambda params: outputs.samples(pipeline(params), build.key(config.seed, "preview")),
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


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """Yields a list to which SIGTERM and SIGINT add their number instead of ending the process."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals reach the main thread only
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, lambda got, _: received.append(got)) for number in signals]
    try:
        yield received
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def _signals(stop: list[int]) -> Callable[[], int]:
    """Returns what tells the largest signal that any process has received, 0 without one.

    Called before a step and read after it, it makes all processes stop at the same step, and waits
    for no more than the step before.
    """
    if jax.process_count() == 1:
        return lambda: max(stop, default=0)
    number = largest(max(stop, default=0))
    return lambda: int(number)


def _means(
    window: list[dict], step: int, saved: int | None, finite: dict[str, float], skip: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the mean of each metric over the last steps, and the last finite metrics.

    Args:
      window: metrics of the steps up to `step`.
      step: the last of them.
      saved: step of the last good checkpoint.
      finite: the last finite metrics before the window, with their `step`; {} without any.
      skip: whether steps that are not finite were skipped; they are counted as `skipped`.

    Raises:
      UserError: if a metric is not finite and `skip` is not set, naming the first step that has it.
    """
    broken, kept = None, []  # the sentence of the first step that is not finite; the others
    for number, metrics in enumerate(jax.device_get(window), step - len(window) + 1):
        wrong = [f"{name} is {x}" for name, x in metrics.items() if not math.isfinite(x)]
        if wrong and not broken:
            shown = (f"{name} {x if name == 'step' else f'{x:.4g}'}" for name, x in finite.items())
            last = ", ".join(shown)
            broken = f"{wrong[0]} at step {number}; the last finite metrics: {last or 'none'}"
        if not wrong:
            finite = {"step": number, **metrics}
            kept.append(metrics)
    if broken and not skip:
        where = "start, nothing was saved yet" if saved is None else f"checkpoint of step {saved}"
        raise UserError(
            f"{broken}. The last good state is the {where}. Lower the learning rate; if it fails "
            "again at once, delete that checkpoint too."
        )
    skipped = len(window) - len(kept)
    if skipped:
        log.warning("Skipped %d of the last %d steps: %s.", skipped, len(window), broken)
    # The newest step's: a loss that starts inside the window is the mean since then.
    names = kept[-1] if kept else ()
    means = {name: float(np.mean([m[name] for m in kept if name in m])) for name in names}
    return means | ({"skipped": skipped} if skip else {}), finite


def _device_bytes() -> dict[str, int]:
    """Returns what the first device's memory holds, if JAX knows it: of a CPU it does not."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")
    return {} if used is None else {"device_bytes": used}


def _resume(
    stage: Stage, config: Config, like: TrainState, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the newest checkpoint, placed as `like`, and its `meta`, if training can go on.

    Raises:
      UserError: if it is of another model, other data or another encoder.
    """
    meta = checkpoints.meta()
    trained = checkpoints.config()
    trained_here = meta["data"] is not None  # and not converted alone
    checks.check_stored(trained, checkpoints.directory)
    checks.check_resumable(config, trained, stage.name)
    checkpoints.check_encoder(stage.encoder)
    if trained_here and meta["source"] != stage.source:
        log.warning(
            "The images, or their labels, are not those that the %s began with: it goes on with "
            "these, from the same place in another order.",
            stage.name,
        )
    for name in ("seed", f"{stage.name}.train.batch_size", "data.crop", "data.flip"):
        here, there = (
            functools.reduce(operator.getitem, name.split("."), x) for x in (config, trained)
        )
        if trained_here and here != there:
            log.warning(
                "config.%s was %r and is %r: the %s goes on, but not as it would have.",
                *(name, there, here, stage.name),
            )
    return checkpoints.restore(like), meta


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


def run(stage: Stage, config: Config, workdir: Path) -> TrainState:
    """Trains a stage from its newest checkpoint, if there is one, to its last step.

    Returns:
      The state after the last step.

    Raises:
      UserError: if the loss is not finite, the checkpoint is of another model, no checkpoint is
        whole, or none can be written.
      SystemExit: after a signal, when the state has been saved: 0 for SIGTERM, 130 for Ctrl-C.
    """
    num_steps, learning_rate = stage.train.num_steps, build.schedule(stage.train)
    writes = jax.process_index() == 0  # metrics and pictures; checkpoints are all processes'
    state, step, seconds = replicate(stage.state), 0, 0.0
    with Checkpoints(workdir / stage.name, config.keep_checkpoints) as checkpoints:
        saved = checkpoints.latest_step()
        processes.check_same(f"the newest checkpoint of the {stage.name}", str(saved))
        if saved is not None:
            resume = functools.partial(_resume, stage, config, state)
            state, meta = checkpoints.newest(resume, set_aside=True)
            step, seconds = checkpoints.latest_step(), meta["seconds"]
            saved = step
            if step >= num_steps:
                log.info("The %s is trained: %d steps in %s.", stage.name, step, workdir)
                return state
            if stage.name == "autoencoder" and exists(workdir, "prior"):
                raise UserError(
                    f"The prior in {workdir} belongs to its autoencoder as it is: copy the folder "
                    "autoencoder alone into another workdir to train it on there."
                )
            log.info("The %s goes on from step %d in %s.", stage.name, step, workdir)
            if meta["data"] is not None:
                stage.batches.set_state(meta["data"])
        started = time.monotonic() - seconds
        window, window_seconds, waited, finite = [], 0.0, 0.0, {}
        with (
            _interruption() as stop,
            Logbook(workdir, stage.name, step, num_steps, silent=not writes) as logbook,
            jax.debug_nans(True) if config.debug_nans else nullcontext(),
        ):
            while step < num_steps:
                tick = time.monotonic()
                received = _signals(stop)
                if len(window) > 1:
                    # One step is still queued, so that no device rests. Were it more, we would
                    # empty the loader far ahead of the devices, and take that for its fault.
                    jax.block_until_ready(window[-2])
                asked = time.monotonic()
                batch = shard(next(stage.batches))
                waited += time.monotonic() - asked
                state, metrics = stage.step(state, batch, step)
                step += 1
                window.append(metrics)
                logbook.tick()
                stopping = received()  # read once: the signal may come at any line
                last = step == num_steps
                save = stopping or last or step % config.checkpoint_every == 0
                if save or len(window) == config.log_every:
                    skip = config.on_nonfinite == "skip"
                    means, finite = _means(window, step, saved, finite, skip)
                    window_seconds += time.monotonic() - tick
                    speed = len(window) / window_seconds
                    means["learning_rate"] = float(learning_rate(max(updates_made(state) - 1, 0)))
                    means["images_per_second"] = speed * stage.train.batch_size
                    means["data_wait"] = waited / window_seconds
                    logbook.record(step, means | _device_bytes(), (num_steps - step) / speed)
                    window, window_seconds, waited = [], 0.0, 0.0
                else:
                    window_seconds += time.monotonic() - tick
                if save:
                    meta = {
                        "config": config.to_dict(),
                        "data": stage.batches.get_state(),
                        "source": stage.source,
                        "encoder": stage.encoder,
                        "seconds": time.monotonic() - started,
                    }
                    checkpoints.save(state, meta)
                    saved = step
                if writes and not stopping and (last or step % config.preview_every == 0):
                    params = jax.device_get(state.ema_params)
                    logbook.record(step, stage.evaluate(params))
                    logbook.picture(step, "preview", stage.preview(params))
                if stage.judge and not stopping and step % config.evaluate.every == 0:
                    logbook.record(step, stage.judge(jax.device_get(state.ema_params)))
                if last:  # one may have come meanwhile; and no process leaves before the others
                    stopping = _signals(stop)()
                if stopping:
                    log.info("Interrupted: the %s is saved at step %d.", stage.name, step)
                    raise SystemExit(0 if stopping == signal.SIGTERM else 130)
    return state


def _check_data(config: Config, workdir: Path, stage: str) -> None:
    """Refuses other data than a stage began with, before hours go into preparing that.

    Raises:
      UserError: naming what differs.
    """
    if not exists(workdir, stage):
        return
    with Checkpoints.open(workdir, stage) as checkpoints:
        meta = checkpoints.newest(Checkpoints.meta)
    trained = as_config(meta["config"])
    checks.check_stored(trained, workdir / stage)
    if meta["data"] is not None:  # trained here, and not converted alone
        checks.check_same_data(config, trained, stage)


def train_autoencoder(config: Config, workdir: Path) -> TrainState:
    """Trains stage 1 in `workdir`, or goes on with it, or finds it done."""
    _check_data(config, Path(workdir), "autoencoder")
    stage, config = setup_autoencoder(config, Path(workdir))
    return run(stage, config, Path(workdir))


def train_prior(config: Config, workdir: Path) -> TrainState:
    """Trains stage 2 in `workdir` after stage 1."""
    _check_data(config, Path(workdir), "prior")
    stage, config = setup_prior(config, Path(workdir))
    return run(stage, config, Path(workdir))
