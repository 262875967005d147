"""The common form in which both stages read a split of any dataset."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a dataset."""

    # A sequence of {'image': uint8 (h, w, c), 'label': int or float array}, for several threads.
    examples: Any
    classes: tuple[str, ...] = ()  # names in order of labels; () if unlabelled: all labels are 0
    fingerprint: str = ""  # of the names and labels of all images
    files: tuple[str, ...] = ()  # the files of the images; () if they never change
    # Reads the captions of each image; None if the dataset has no captions.
    captions: Callable[[], list[tuple[str, ...]]] | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 if the images are unlabelled."""
        return len(self.classes)


def stamp(files: Sequence[str]) -> str:
    """Returns a fingerprint of the files' sizes and times, 16 hexadecimal digits.

    Files may be missing, as behind a broken link.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            digest.update(b"missing\n")
            continue
        digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
