"""Decodes images as they are read, and replaces unreadable images by others."""

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
    """Reads images by number, and replaces an unreadable image by the next readable one.

    The replacement does not depend on threads. Each unreadable image is reported once, in the log
    and in the file `report`, if given. A larger share than `max_broken` raises UserError.
    """

    def __init__(
        self,
        count: int,
        max_broken: float,
        report: Path | None = None,
        key: str = "config.data.max_broken",  # the config key of `max_broken`, for the message
    ):
        self._count, self._max_broken, self._report, self._key = count, max_broken, report, key
        self._limit = min(max_broken * count, count - 1)
        self._bad: set[int] = set()
        self._last = ""
        self._lock = threading.Lock()

    @property
    def num_unreadable(self) -> int:
        """The number of unreadable images found so far."""
        return len(self._bad)

    def read(self, index: int, decode: Callable[[int], T]) -> T:
        """Returns `decode(index)`, or that of the next index which raises no UnreadableImage."""
        index = range(self._count)[index]  # raises IndexError if out of range
        while True:
            if index not in self._bad:
                try:
                    return decode(index)
                except UnreadableImage as error:
                    self._note(index, str(error))
            if len(self._bad) > self._limit:
                named = f"; {self._report} names them" if self._report else ""
                raise UserError(
                    f"{len(self._bad)} of {self._count} images cannot be read{named}, more than "
                    f"{self._key} = {self._max_broken:g} allows: replace or remove them, or raise "
                    f"that share. The last error: {self._last}"
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
    """Returns the number of the image that was read, which may be a replacement, and an example.

    Args:
      examples: of a `Source`. Without a method `locate`, they have no replacements.
      index: of the example.
      position: of the crop, as in `DecodedImages.read`.
    """
    if hasattr(examples, "locate"):
        return examples.locate(index, position)
    return range(len(examples))[index], examples[index]


def add_lines(report: Path, lines: Sequence[str]) -> None:
    """Appends the lines that a file does not have yet."""
    report.parent.mkdir(parents=True, exist_ok=True)
    # An evaluation and a training run may write it at the same time.
    with report.open("a+") as file, in_turn(file):
        file.seek(0)
        known = set(file.read().splitlines())
        file.writelines(f"{line}\n" for line in lines if line not in known)
        file.flush()


class DecodedImages:
    """Examples {'image', 'label'}; `StandIns` replace unreadable images."""

    def __init__(
        self,
        encoded: EncodedImages,
        image_size: int,
        channels: int,
        *,
        keep: bool,  # whether decoded images stay in memory
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
        """The number of unreadable images found so far."""
        return self._stand_ins.num_unreadable

    def read(self, index: int, position: float = 0.5) -> dict[str, Any]:
        """Returns an example, cropped at `position`, in [0, 1], along its longer side."""
        return self.locate(index, position)[1]

    def locate(self, index: int, position: float = 0.5) -> tuple[int, dict[str, Any]]:
        """Returns the number of the image that was read, and the example of `read`."""
        return self._stand_ins.read(index, lambda i: (i, self._decode(i, position)))

    def _decode(self, index: int, position: float) -> dict[str, Any]:
        keep = self._keep and position == 0.5
        # No lock: if two threads decode the same image, they get the same values.
        example = self._kept.get(index) if keep else None
        if example is None:
            file, what, label = self._encoded.read(index)
            example = {"image": read_image(file, *self._size, position, what), "label": label}
        if keep:
            self._kept[index] = example
        return dict(example)
