"""The training loop of both stages."""

import dataclasses
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
import numpy as np

from binlatent.runtime import interrupt, processes
from binlatent.runtime.devices import largest, replicate, shard
from binlatent.runtime.errors import UserError
from binlatent.training.checkpoint import Checkpoints
from binlatent.training.logbook import Logbook
from binlatent.training.optimizer import Training
from binlatent.training.state import TrainState, updates_made

log = logging.getLogger(__name__)


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """Collects the numbers of SIGTERM and SIGINT in a list instead of ending the process."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread receives signals
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, lambda got, _: received.append(got)) for number in signals]
    try:
        yield received
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def _signals(stop: list[int]) -> Callable[[], int]:
    """Returns a function for the largest signal number that any process has received, or 0.

    Call this before a step and the function after it: all processes then stop at the same step, and
    wait only for the step before.
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
      step: the last step of the window.
      saved: step of the last checkpoint, or None.
      finite: the last finite metrics before the window, with their `step`, or {}.
      skip: whether steps with a NaN or infinity were skipped; `skipped` is then their number.
    """
    broken, kept = None, []  # message of the first step that is not finite; finite steps
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
        where = "start (nothing was saved)" if saved is None else f"checkpoint of step {saved}"
        raise UserError(
            f"{broken}. The last good state is the {where}. Lower the learning rate; if training "
            "fails again at once, delete that checkpoint too."
        )
    skipped = len(window) - len(kept)
    if skipped:
        log.warning("Skipped %d of the last %d steps: %s.", skipped, len(window), broken)
    # Of the newest step: a loss that starts in the window is averaged from there on.
    names = kept[-1] if kept else ()
    means = {name: float(np.mean([m[name] for m in kept if name in m])) for name in names}
    return means | ({"skipped": skipped} if skip else {}), finite


def _device_bytes() -> dict[str, int]:
    """Returns the bytes in use on the first device; {} if JAX does not know them, as on CPUs."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")
    return {} if used is None else {"device_bytes": used}


@dataclasses.dataclass(frozen=True)
class Run:
    """How a run logs, saves, and handles a loss or gradient that is NaN or infinite.

    Fields:
      log_every, preview_every, checkpoint_every: in steps.
      keep_checkpoints: the number of checkpoints to keep, the last ones.
      on_nonfinite: "stop" at a step with a NaN or infinity, or "skip" it.
      debug_nans: whether to name the operation that produced a NaN; slow.
    """

    log_every: int
    preview_every: int
    checkpoint_every: int
    keep_checkpoints: int
    on_nonfinite: str
    debug_nans: bool


class Stage(NamedTuple):
    """The interface between a stage and the loop.

    Fields:
      name: of the stage and its folder.
      train: batches, steps and optimiser.
      state: before the first step.
      step: pmapped, (state, batch, number of the step) -> (state, metrics).
      batches: a Grain iterator.
      meta: stored with checkpoints: `config`, `source`, `encoder`, ...
      check_resumable: raises UserError if training cannot resume from a checkpoint's `meta`.
      tell_changes: warns of differences from a checkpoint's `meta` before resuming.
      check_unfinished: raises UserError if training may not resume before its last step.
      evaluate: EMA parameters -> metrics.
      preview: EMA parameters -> a picture.
      judge: EMA parameters -> metrics of samples, every `judge_every` steps, or None.
    """

    name: str
    train: Training
    state: TrainState
    step: Callable[[TrainState, Any, int], tuple[TrainState, dict]]
    batches: Any
    meta: dict[str, Any]
    check_resumable: Callable[[dict[str, Any]], None]
    tell_changes: Callable[[dict[str, Any]], None]
    check_unfinished: Callable[[], None]
    evaluate: Callable[[Any], dict[str, float]]
    preview: Callable[[Any], np.ndarray]
    judge: Callable[[Any], dict[str, float]] | None = None
    judge_every: int = 0


def train(stage: Stage, settings: Run, workdir: Path) -> TrainState:
    """Trains a stage from its newest checkpoint, if there is one, to its last step.

    Returns:
      The state after the last step.

    Raises:
      interrupt.Stopped: after a signal, when the state has been saved. The exit code is 143 for
        SIGTERM and 130 for Ctrl-C.
    """
    num_steps, learning_rate = stage.train.num_steps, stage.train.schedule()
    writes = jax.process_index() == 0  # of metrics and pictures; all processes save checkpoints
    state, step, seconds = replicate(stage.state), 0, 0.0
    with Checkpoints(workdir / stage.name, settings.keep_checkpoints) as checkpoints:
        saved = checkpoints.latest_step()
        processes.check_same(f"the newest checkpoint of the {stage.name}", str(saved))
        if saved is not None:

            def resume(checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
                meta = checkpoints.meta()
                stage.check_resumable(meta)
                checkpoints.check_encoder(stage.meta["encoder"])
                return checkpoints.restore(state), meta

            state, meta = checkpoints.newest(resume, set_aside=True)
            step, seconds = checkpoints.latest_step(), meta["seconds"]
            saved = step
            if step >= num_steps:
                log.info("The %s is trained: %d steps in %s.", stage.name, step, workdir)
                return state
            stage.check_unfinished()
            log.info("The %s resumes at step %d in %s.", stage.name, step, workdir)
            if writes:
                stage.tell_changes(meta)
            if meta["data"] is not None:
                stage.batches.set_state(meta["data"])
        started = time.monotonic() - seconds
        window, finite = [], {}
        timed, window_seconds, waited = 0, 0.0, 0.0  # timed: steps in the window, without the first
        compiling = step + 1  # the first step, which includes compilation
        with (
            _interruption() as stop,
            Logbook(workdir, stage.name, step, num_steps, silent=not writes) as logbook,
            jax.debug_nans(True) if settings.debug_nans else nullcontext(),
        ):
            while step < num_steps:
                tick = time.monotonic()
                received = _signals(stop)
                if len(window) > 1:
                    # One step stays queued, so that no device is idle. More would empty the loader
                    # far ahead of the devices, and count as waiting for data.
                    jax.block_until_ready(window[-2])
                asked = time.monotonic()
                batch = shard(next(stage.batches))
                waited += time.monotonic() - asked
                state, metrics = stage.step(state, batch, step)
                step += 1
                if step == compiling:
                    jax.block_until_ready(metrics)
                window.append(metrics)
                logbook.tick()
                stopping = received()  # read once, as a signal may arrive at any line
                last = step == num_steps
                save = stopping or last or step % settings.checkpoint_every == 0
                due = save or len(window) == settings.log_every
                if due:  # waits for the steps
                    skip = settings.on_nonfinite == "skip"
                    means, finite = _means(window, step, saved, finite, skip)
                if step == compiling and not due:
                    waited = 0.0
                else:
                    timed, window_seconds = timed + 1, window_seconds + time.monotonic() - tick
                if save:  # before anything that takes long or may fail
                    seconds = time.monotonic() - started
                    meta = {"data": stage.batches.get_state(), "seconds": seconds}
                    checkpoints.save(state, stage.meta | meta)
                    saved = step
                if due:
                    speed = timed / window_seconds
                    left = None if step == compiling else (num_steps - step) / speed
                    means["learning_rate"] = float(learning_rate(max(updates_made(state) - 1, 0)))
                    means["images_per_second"] = speed * stage.train.batch_size
                    means["data_wait"] = waited / window_seconds
                    logbook.record(step, means | _device_bytes(), left)
                    window, timed, window_seconds, waited = [], 0, 0.0, 0.0
                if writes and not stopping and (last or step % settings.preview_every == 0):
                    params = jax.device_get(state.ema_params)
                    logbook.record(step, stage.evaluate(params))
                    logbook.picture(step, "preview", stage.preview(params))
                if stage.judge and not stopping and step % stage.judge_every == 0:
                    logbook.record(step, stage.judge(jax.device_get(state.ema_params)))
                if last:  # a signal may have arrived; no process may leave before the others
                    stopping = _signals(stop)()
                if stopping:
                    log.info(
                        "Interrupted: the %s is saved at step %d. Run the same command to resume "
                        "from there.",
                        *(stage.name, step),
                    )
                    raise interrupt.Stopped(stopping)
    return state
