"""Files that are written whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: Path, alone: bool = False) -> Iterator[Path]:
    """Yields where to write a file, which becomes `path` once that succeeds; makes its folder.

    With `alone`, where no other process may be writing the same file, what a kill has left of it is
    written over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = "" if alone else f".{secrets.token_hex(4)}"
    unfinished = path.with_name(f"{path.name}{own}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
