"""Examples of images, decoded as they are read; others stand in for a few that cannot be read."""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from binlatent.data.images import EncodedImages, UnreadableImage, read_image
from binlatent.runtime.errors import UserError
from binlatent.runtime.locks import in_turn

log = logging.getLogger(__name__)

T = TypeVar("T")


class StandIns:
    """Reads numbered images; the next readable one stands in for one that is not.

    Which one that is does not depend on the threads. What cannot be read is named once, in the log
    and in the file `report`, if any; a larger share than `max_broken` stops the run.
    """

    def __init__(
        self,
        count: int,
        max_broken: float,
        report: Path | None = None,
        key: str = "config.data.max_broken",  # by which a user sets the share, for the message
    ):
        self._count, self._max_broken, self._report, self._key = count, max_broken, report, key
        self._limit = min(max_broken * count, count - 1)
        self._bad: set[int] = set()
        self._last = ""
        self._lock = threading.Lock()

    @property
    def num_unreadable(self) -> int:
        """How many images were found that cannot be read."""
        return len(self._bad)

    def read(self, index: int, decode: Callable[[int], T]) -> T:
        """Returns `decode(index)`, or of the next index for which it is not UnreadableImage."""
        index = range(self._count)[index]  # raises IndexError past the end
        while True:
            if index not in self._bad:
                try:
                    return decode(index)
                except UnreadableImage as error:
                    self._note(index, str(error))
            if len(self._bad) > self._limit:
                named = f"; {self._report} names them" if self._report else ""
                raise UserError(
                    f"{len(self._bad)} of {self._count} images cannot be read{named}, which is "
                    f"more than {self._key} = {self._max_broken:g} allows: replace or remove "
                    f"them, or raise it. The last: {self._last}"
                )
            index = (index + 1) % self._count

    def _note(self, index: int, message: str) -> None:
        with self._lock:
            if index in self._bad:
                return
            self._last = message
            self._bad.add(index)
            log.warning("Skipped: %s", message)
            if self._report is not None:
                add_lines(self._report, [message])


def locate(examples: Any, index: int, position: float = 0.5) -> tuple[int, dict[str, Any]]:
    """Returns an example, and the number of the image that it is of, be it a stand-in.

    Args:
      examples: of a source; those of images and codes know of stand-ins, by their own `locate`.
      index: of the example.
      position: where an image is cropped, as of `DecodedImages.read`.
    """
    if hasattr(examples, "locate"):
        return examples.locate(index, position)
    return range(len(examples))[index], examples[index]


def add_lines(report: Path, lines: Sequence[str]) -> None:
    """Adds lines to a file, but for those that it has."""
    report.parent.mkdir(parents=True, exist_ok=True)
    # An evaluation may write it beside a training.
    with report.open("a+") as file, in_turn(file):
        file.seek(0)
        known = set(file.read().splitlines())
        file.writelines(f"{line}\n" for line in lines if line not in known)
        file.flush()


class DecodedImages:
    """Examples {'image', 'label'}, with `StandIns` for those that cannot be read."""

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
        self._stand_ins = StandIns(encoded.count, max_broken, report)

    def __len__(self) -> int:
        return self._encoded.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    @property
    def num_unreadable(self) -> int:
        """How many images were found that cannot be read."""
        return self._stand_ins.num_unreadable

    def read(self, index: int, position: float = 0.5) -> dict[str, Any]:
        """Returns an example, cropped at a position along its longer side, in [0, 1]."""
        return self.locate(index, position)[1]

    def locate(self, index: int, position: float = 0.5) -> tuple[int, dict[str, Any]]:
        """Returns what `read` does, and the number of the image that it is of."""
        return self._stand_ins.read(index, lambda i: (i, self._decode(i, position)))

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
