"""Atomic writing of files."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: Path, alone: bool = False) -> Iterator[Path]:
    """Yields a temporary path, which is renamed to `path` if the block succeeds; makes the folder.

    `alone` is for callers that exclude other writers of the same file: the temporary name is then
    fixed, so that the rest of a killed process is overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = "" if alone else f".{secrets.token_hex(4)}"
    unfinished = path.with_name(f"{path.name}{own}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
