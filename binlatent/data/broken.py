"""Images that cannot be read: others stand in for a few, and too many stop the run."""

import logging
import threading
from pathlib import Path
from typing import Any

from binlatent.data.images import DecodedImages, UnreadableImage
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)


class Tolerant:
    """Examples where the next readable one stands in for one that cannot be read.

    Which one that is does not depend on the threads. What cannot be read is named once, in the log
    and in a file.
    """

    def __init__(self, examples: DecodedImages, max_share: float, report: Path | None):
        """Wraps images; a share of unreadable ones above `max_share` stops the run.

        `report` is the file that names them, "bad_files.txt" of a workdir; None for the log alone.
        """
        self._examples = examples
        self._limit = min(max_share * len(examples), len(examples) - 1)
        self._max_share = max_share
        self._report = report
        self._bad: set[int] = set()
        self._last = ""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def read(self, index: int, position: float = 0.5) -> dict[str, Any]:
        """Returns an example, or the one in its place, as `DecodedImages.read`."""
        index = range(len(self))[index]  # raises IndexError past the end
        while True:
            if index not in self._bad:
                try:
                    return self._examples.read(index, position)
                except UnreadableImage as error:
                    self._note(index, str(error))
            if len(self._bad) > self._limit:
                named = f"; {self._report} names them" if self._report else ""
                raise UserError(
                    f"{len(self._bad)} of {len(self)} images cannot be read{named}, which is more "
                    f"than config.data.max_broken = {self._max_share:g} allows: replace or remove "
                    f"them, or raise it. The last: {self._last}"
                )
            index = (index + 1) % len(self)

    def _note(self, index: int, message: str) -> None:
        with self._lock:
            if index in self._bad:
                return
            self._last = message
            self._bad.add(index)
            log.warning("Skipped: %s", message)
            if self._report is None:
                return
            self._report.parent.mkdir(parents=True, exist_ok=True)
            known = self._report.read_text().splitlines() if self._report.exists() else []
            if message not in known:
                with self._report.open("a") as file:
                    file.write(f"{message}\n")
