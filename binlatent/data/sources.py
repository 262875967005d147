"""One split of a dataset as the stages read it, whatever it is made of."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a dataset."""

    # Random access, from several threads: {'image': uint8 (h, w, c), 'label': int or float array}.
    examples: Any
    classes: tuple[str, ...] = ()  # names by number; (): unlabelled, and every label is 0
    fingerprint: str = ""  # tells which images with which labels these are, by their names
    files: tuple[str, ...] = ()  # that they lie in, where these can be changed
    # Reads the captions of each image, () for none; None where the dataset has none.
    captions: Callable[[], list[tuple[str, ...]]] | None = None

    @property
    def num_classes(self) -> int:
        """How many classes there are, 0 if the images are unlabelled."""
        return len(self.classes)


def stamp(files: Sequence[str]) -> str:
    """Returns 16 hexadecimal digits that change with the files: with their sizes or times.

    A file that is missing, as behind a broken link, counts as such.
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
