"""The one training loop of both stages."""

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
from typing import Any

import jax
import ml_collections
import numpy as np

from binlatent import build, checks
from binlatent.runtime import processes
from binlatent.runtime.devices import largest, replicate, shard
from binlatent.runtime.errors import UserError
from binlatent.stages import Stage, setup_autoencoder, setup_prior
from binlatent.training.checkpoint import Checkpoints, as_config, exists
from binlatent.training.logbook import Logbook
from binlatent.training.state import TrainState, updates_made

log = logging.getLogger(__name__)

Config = ml_collections.ConfigDict


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
                due = save or len(window) == config.log_every
                if due:  # waits for the steps
                    skip = config.on_nonfinite == "skip"
                    means, finite = _means(window, step, saved, finite, skip)
                window_seconds += time.monotonic() - tick
                if save:  # before all that may take a while, or fail
                    meta = {
                        "config": config.to_dict(),
                        "data": stage.batches.get_state(),
                        "source": stage.source,
                        "encoder": stage.encoder,
                        "seconds": time.monotonic() - started,
                    }
                    checkpoints.save(state, meta)
                    saved = step
                if due:
                    speed = len(window) / window_seconds
                    means["learning_rate"] = float(learning_rate(max(updates_made(state) - 1, 0)))
                    means["images_per_second"] = speed * stage.train.batch_size
                    means["data_wait"] = waited / window_seconds
                    logbook.record(step, means | _device_bytes(), (num_steps - step) / speed)
                    window, window_seconds, waited = [], 0.0, 0.0
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
