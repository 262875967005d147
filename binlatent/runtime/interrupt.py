"""Ctrl-C while a command imports what it needs, which takes seconds, and while it ends."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def end_at_once() -> None:
    """Makes Ctrl-C end this process with a word and code 130; a command's first act.

    A KeyboardInterrupt among imports would be a traceback, or be swallowed by one of them. Where
    Ctrl-C is ignored, as by a process in the background, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(*_: Any) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(130)


@contextmanager
def raising() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt inside again, so that what is open can be closed."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)
