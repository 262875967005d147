"""Progress of loops that may take long: a bar on a terminal, otherwise log lines."""

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger(__name__)

_EVERY = 10.0  # least seconds between lines
_EVERY_INSIDE = 60.0  # of a loop inside another one

_running: list["Progress"] = []


class Progress:
    """Counts what a loop has done, and shows it with the time left.

    The time left counts neither the first update, in which programs are compiled, nor what was
    skipped.
    """

    def __init__(self, total: int, unit: str, bar: tqdm, every: float):
        """Starts at 0 of `total`; `unit` is a plural, such as "images"; `every` is in seconds."""
        self._total, self._unit, self._bar, self._every = total, unit, bar, every
        self._done, self._timed = 0, 0
        self._begun: float | None = None  # the end of the first update
        self._shown = time.monotonic()

    def update(self, num: int = 1, *, skipped: bool = False) -> None:
        """Counts `num` more; `skipped` if they cost no time, as they were done before."""
        self._done += num
        self._bar.update(num)
        now = time.monotonic()
        if skipped:
            return
        if self._begun is None:
            self._begun = now
            return
        self._timed += num
        # A loop of an hour has a line every six minutes.
        every = max(self._every, (now - self._begun) / 10)
        if now - self._shown < every or self._done >= self._total:
            return
        self._shown = now
        if self._bar.disable:
            left = (self._total - self._done) * (now - self._begun) / self._timed
            shown = self._done, self._total, self._unit, datetime.timedelta(seconds=round(left))
            log.info("%d of %d %s, %s left", *shown)


@contextmanager
def progress(
    total: int, unit: str, *, bar: bool = True, silent: bool = False
) -> Iterator[Progress]:
    """Yields the progress of a loop.

    Args:
      total: how many there are to do.
      unit: what they are called, a plural.
      bar: whether a terminal shows a bar.
      silent: whether nothing is shown, as in all processes but the first.
    """
    every = float("inf") if silent else _EVERY_INSIDE if _running else _EVERY
    disable = True if silent or not bar else None  # None: unless it is a terminal
    with tqdm(total=total, unit=f" {unit}", disable=disable) as shown:
        counted = Progress(total, unit, shown, every)
        _running.append(counted)
        try:
            yield counted
        finally:
            _running.remove(counted)  # a generator's loop may end after those inside it
