"""Examples of images, decoded as they are read; others stand in for a few that cannot be read."""

import logging
import threading
from pathlib import Path
from typing import Any

from binlatent.data.images import EncodedImages, UnreadableImage, read_image
from binlatent.runtime.errors import UserError
from binlatent.runtime.locks import in_turn

log = logging.getLogger(__name__)


class DecodedImages:
    """Examples {'image', 'label'}, where the next readable one stands in for one that is not.

    Which one that is does not depend on the threads. What cannot be read is named once, in the log
    and in the file `report`, if any; a larger share than `max_broken` stops the run.
    """

    def __init__(
        self,
        encoded: EncodedImages,
        image_size: int,
        channels: int,
        *,
        keep: bool,  # what was decoded, in memory
        max_broken: float = 0.0,
        report: Path | None = None,
    ):
        self._encoded, self._size = encoded, (image_size, channels)
        self._keep, self._kept = keep, {}
        self._max_broken, self._report = max_broken, report
        self._limit = min(max_broken * encoded.count, encoded.count - 1)
        self._bad: set[int] = set()
        self._last = ""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._encoded.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def read(self, index: int, position: float = 0.5) -> dict[str, Any]:
        """Returns an example, cropped at a position along its longer side, in [0, 1]."""
        index = range(len(self))[index]  # raises IndexError past the end
        while True:
            if index not in self._bad:
                try:
                    return self._decode(index, position)
                except UnreadableImage as error:
                    self._note(index, str(error))
            if len(self._bad) > self._limit:
                named = f"; {self._report} names them" if self._report else ""
                raise UserError(
                    f"{len(self._bad)} of {len(self)} images cannot be read{named}, which is more "
                    f"than config.data.max_broken = {self._max_broken:g} allows: replace or remove "
                    f"them, or raise it. The last: {self._last}"
                )
            index = (index + 1) % len(self)

    def _decode(self, index: int, position: float) -> dict[str, Any]:
        keep = self._keep and position == 0.5
        # Two threads may both decode an image: the same values, so no lock is needed.
        example = self._kept.get(index) if keep else None
        if example is None:
            file, what, label = self._encoded.read(index)
            example = {"image": read_image(file, what, *self._size, position), "label": label}
        if keep:
            self._kept[index] = example
        return dict(example)

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
            # An evaluation may write it beside a training.
            with self._report.open("a+") as file, in_turn(file):
                file.seek(0)
                if message not in file.read().splitlines():
                    file.write(f"{message}\n")
                    file.flush()
