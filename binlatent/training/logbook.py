"""The log of a run: progress bar or plain lines, metrics.jsonl, TensorBoard."""

import datetime
import functools
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from binlatent.runtime import png
from binlatent.runtime.errors import UserError
from binlatent.runtime.locks import in_turn
from binlatent.runtime.strict_json import to_json

log = logging.getLogger(__name__)


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Hides stderr of C++ code: importing TensorFlow prints there at every log level."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@functools.cache  # prints its message once
def _summary_writer() -> type | None:
    """Returns the class of clu's TensorBoard writer, or None where TensorFlow is not installed."""
    try:
        with _silenced_stderr():
            import tensorflow as tf
        from clu.metric_writers import SummaryWriter
    except ImportError:
        log.info(
            "TensorBoard files are not written, as TensorFlow or TensorBoard is not installed: "
            'pip install "binlatent[tfds]"'
        )
        return None
    tf.config.set_visible_devices([], "GPU")  # leaves the GPUs to JAX
    return SummaryWriter


def write_scalars(directory: Path, metrics: dict[str, float], step: int = 0) -> None:
    """Writes metrics to TensorBoard only, if TensorFlow is installed."""
    summary_writer = _summary_writer()
    if summary_writer is not None:
        writer = summary_writer(str(directory))
        writer.write_scalars(step, metrics)
        writer.close()


def drop_torn_line(path: Path) -> None:
    """Removes an incomplete last line, which a kill may leave; the file need not exist."""
    if path.exists():
        with path.open("rb+") as file, in_turn(file):
            file.truncate(file.read().rfind(b"\n") + 1)


class Logbook:
    """Records one stage's metrics and pictures; a context manager.

    Shows a tqdm bar on a terminal, and otherwise a line per record.
    """

    def __init__(
        self, workdir: Path, stage: str, step: int, num_steps: int, *, silent: bool = False
    ):
        """Opens the log of `stage`, at `step` of `num_steps`; with `silent`, nothing is written."""
        self._stage = stage
        self._num_steps = num_steps
        self._workdir = workdir
        path = workdir / "metrics.jsonl"
        if not silent:
            drop_torn_line(path)
        self._events = None if silent else workdir / "tensorboard" / stage
        with self._writing():
            if self._events is not None:
                self._events.mkdir(parents=True, exist_ok=True)
            self._file = (Path(os.devnull) if silent else path).open("a")
        self._bar = tqdm.tqdm(
            total=num_steps, initial=step, desc=stage, disable=silent or not sys.stderr.isatty()
        )
        self._redirect = (
            nullcontext() if self._bar.disable else logging_redirect_tqdm([logging.getLogger()])
        )

    @functools.cached_property
    def _writer(self):
        """Opened with the first record: importing TensorFlow takes seconds."""
        summary_writer = None if self._events is None else _summary_writer()
        return summary_writer and summary_writer(str(self._events))

    def __enter__(self) -> "Logbook":
        self._redirect.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        self._redirect.__exit__(*exception)
        with self._writing():  # closing flushes
            self._file.close()
            writer = vars(self).get("_writer")  # there may be no record
            if writer is not None:
                writer.close()

    def tick(self) -> None:
        """Counts one step."""
        self._bar.update()

    def record(
        self, step: int, metrics: dict[str, float], seconds_left: float | None = None
    ) -> None:
        """Writes the metrics of `step`, if any, and shows the time left, if known."""
        if not metrics:
            return
        entry = {"stage": self._stage, "step": step, **metrics}
        with self._writing():
            # An evaluation and a training run may write at the same time.
            with nullcontext() if self._events is None else in_turn(self._file):
                self._file.write(to_json(entry) + "\n")
                self._file.flush()
            if self._writer is not None:
                self._writer.write_scalars(step, metrics)
        text = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if seconds_left is None:
            log.info("%s %d/%d: %s", self._stage, step, self._num_steps, text)
        elif self._bar.disable:
            left = datetime.timedelta(seconds=round(seconds_left))
            log.info("%s %d/%d: %s, %s left", self._stage, step, self._num_steps, text, left)
        else:
            # Short, to fit into 80 columns; metrics.jsonl has the rest. There is no loss if all
            # steps since the last record were skipped.
            loss, speed = metrics.get("loss", math.nan), metrics["images_per_second"]
            self._bar.set_postfix_str(f"loss {loss:.4g}, {speed:.0f} images/s")

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes a picture, uint8 (height, width, channels), to figures/ and TensorBoard."""
        with self._writing():
            path = self._workdir / "figures" / f"{self._stage}_{name}_{step:07d}.png"
            png.save_png(path, image)
            if self._writer is not None:
                self._writer.write_images(step, {name: image[None]})
                self._writer.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of writing, TensorFlow's included, into UserError."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, OSError) and not type(error).__module__.startswith("tensorf"):
                raise
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(
                f"The log in {self._workdir} could not be written: {reason}. The checkpoints are "
                "intact: make room on the disk, or remove the cause, and run the same command "
                "again."
            ) from error
