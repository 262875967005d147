"""The one training loop, and what each of the two stages plugs into it."""

import copy
import functools
import logging
import math
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

from binlatent import build, checks, codes, evaluate, outputs, weights
from binlatent.checkpoint import Checkpoints, as_config
from binlatent.data import loader
from binlatent.data.sources import Source
from binlatent.data.transforms import to_float
from binlatent.errors import UserError
from binlatent.logbook import Logbook
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.stages import prior as prior_stage
from binlatent.stages.state import (
    TrainState,
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
    encoder: str  # fingerprint of the frozen encoder, "" for stage 1
    evaluate: Callable[[Any], dict[str, float]]  # EMA parameters -> metrics
    preview: Callable[[Any], np.ndarray]  # EMA parameters -> a picture


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


def _check_labels(config: Config, source: Source) -> None:
    """Refuses data without the features of texts for a prior of texts, and the other way round.

    Raises:
      UserError: saying what to change.
    """
    condition, width = config.prior.condition, config.prior.text_width
    shape = np.shape(source.examples[0]["label"]) if config.data.texts else ()
    if len(shape) != {"class": 0, "text_token": 1, "text_cross": 2}[condition]:
        raise UserError(
            f"config.prior.condition is {condition!r}, which needs config.data.texts = "
            f"{condition != 'class'}"
            + (f", but the features beside the images have the shape {shape}." if shape else ".")
        )
    if shape and shape[-1] != width:
        raise UserError(
            f"The features beside the images have {shape[-1]} numbers, but config.prior.text_width "
            f"is {width}."
        )


def _check_batch(train: Config, accumulate: int = 1) -> None:
    """Refuses a batch that the devices, and the parts in which each takes its share, cannot split.

    Raises:
      UserError: with the numbers.
    """
    devices = jax.device_count()
    if train.batch_size % (devices * accumulate):
        parts = f" times {accumulate} parts (accumulate)" if accumulate > 1 else ""
        raise UserError(
            f"The batch size, {train.batch_size}, must be a multiple of the number of devices, "
            f"{devices}{parts}."
        )


def _batches(source: Source, train: Config, seed: int):
    """Returns this host's share of the global batches."""
    return loader.train_batches(
        source,
        train.batch_size // jax.process_count(),
        seed,
        shard=(jax.process_index(), jax.process_count()),
    )


def setup_autoencoder(config: Config) -> tuple[Stage, Config]:
    """Returns stage 1 at its first step, and the config with data.num_classes filled in.

    Raises:
      UserError: for a config that cannot be trained, or a missing file, before any work.
    """
    checks.check(config)
    section, networks = config.autoencoder, build.networks(config)
    _check_batch(section.train, section.train.accumulate)
    lpips_params = weights.read_vgg16(section.loss.vgg16) if networks.lpips else {}
    source, test = (evaluate.open_data(config, split) for split in ("train", "test"))
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
        batches=_batches(source, section.train, config.seed),
        encoder="",
        evaluate=lambda params: evaluate.autoencoder_metrics(pipeline(params), images),
        preview=lambda params: outputs.reconstructions(pipeline(params), images[:10]),
    )
    return stage, config


def setup_prior(config: Config, workdir: Path) -> tuple[Stage, Config]:
    """Returns stage 2 at its first step, on the codes of the workdir's autoencoder; the config."""
    checks.check(config)
    checks.check_bits(config)
    _check_batch(config.prior.train)
    source, test = (evaluate.open_data(config, split) for split in ("train", "test"))
    config = with_classes(config, source)
    _check_labels(config, source)
    encoder = BinaryLatentDiffusion.from_workdir(workdir, config, prior=False)
    if config.prior.cache_codes:
        source = codes.cached_codes(encoder, source, workdir / "codes")
    model, denoiser = build.autoencoder(config), build.denoiser(config)
    step = functools.partial(
        prior_stage.train_step,
        encode=functools.partial(model.apply, method="probs"),
        denoiser=denoiser,
        objective=build.prior_objective(config),
        optimizer=build.optimizer(config.prior.train),
        ema_decay=config.prior.train.ema_decay,
    )
    step = _parallel(config, step)
    encoder_params = None if config.prior.cache_codes else replicate(encoder.autoencoder_params)
    images, labels = evaluate.load_images(test, config.evaluate.num_images)
    probs = encoder.encode_probs(to_float(images))
    pipeline = functools.partial(BinaryLatentDiffusion, config, encoder.autoencoder_params)
    stage = Stage(
        name="prior",
        train=config.prior.train,
        state=build.init_prior_state(config),
        step=lambda state, batch, _: step(state, batch, encoder_params),
        batches=_batches(source, config.prior.train, config.seed),
        encoder=encoder.encoder_fingerprint,
        evaluate=lambda params: evaluate.prior_metrics(pipeline(params), probs, labels),
        preview=lambda params: outputs.samples(pipeline(params), build.key(config.seed, "preview")),
    )
    return stage, config


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
    trained = as_config(meta["config"])
    trained_here = meta["data"] is not None  # and not converted alone
    checks.check_version(trained, checkpoints.directory)
    checks.check_resumable(config, trained, stage.name, same_data=trained_here)
    checkpoints.check_encoder(stage.encoder)
    if trained_here and config.data.path != trained.data.path:
        log.warning(
            "config.data.path was %r and is %r: it must hold the same data, or the %s goes on "
            "with other images than it began with.",
            trained.data.path,
            config.data.path,
            stage.name,
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
    state, step, seconds = replicate(stage.state), 0, 0.0
    with Checkpoints(workdir / stage.name, config.keep_checkpoints) as checkpoints:
        saved = checkpoints.latest_step()
        if saved is not None:
            resume = functools.partial(_resume, stage, config, state)
            state, meta = checkpoints.newest(resume, set_aside=True)
            step, seconds = checkpoints.latest_step(), meta["seconds"]
            saved = step
            if step >= num_steps:
                log.info("The %s is trained: %d steps in %s.", stage.name, step, workdir)
                return state
            log.info("The %s goes on from step %d in %s.", stage.name, step, workdir)
            if meta["data"] is not None:
                stage.batches.set_state(meta["data"])
        started = time.monotonic() - seconds
        window, window_seconds, waited, finite = [], 0.0, 0.0, {}
        with (
            Logbook(workdir, stage.name, step, num_steps) as logbook,
            _interruption() as stop,
            jax.debug_nans(True) if config.debug_nans else nullcontext(),
        ):
            while step < num_steps:
                tick = time.monotonic()
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
                stopping = bool(stop)  # read once: the signal may come at any line
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
                    checkpoints.check_for_errors()  # before training on for another interval
                else:
                    window_seconds += time.monotonic() - tick
                if save:
                    meta = {
                        "config": config.to_dict(),
                        "data": stage.batches.get_state(),
                        "encoder": stage.encoder,
                        "seconds": time.monotonic() - started,
                    }
                    checkpoints.save(state, meta)
                    saved = step
                if not stopping and (last or step % config.evaluate_every == 0):
                    params = jax.device_get(state.ema_params)
                    logbook.record(step, stage.evaluate(params))
                    logbook.picture(step, "preview", stage.preview(params))
                if stopping or (last and stop):
                    checkpoints.close()
                    log.info("Interrupted: the %s is saved at step %d.", stage.name, step)
                    raise SystemExit(0 if signal.SIGTERM in stop else 130)
    return state


def train_autoencoder(config: Config, workdir: Path) -> TrainState:
    """Trains stage 1 in `workdir`, or goes on with it, or finds it done."""
    stage, config = setup_autoencoder(config)
    return run(stage, config, Path(workdir))


def train_prior(config: Config, workdir: Path) -> TrainState:
    """Trains stage 2 in `workdir` after stage 1."""
    stage, config = setup_prior(config, Path(workdir))
    return run(stage, config, Path(workdir))
