"""Ctrl-C during a command's imports, which take seconds, and during its exit."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(SystemExit):
    """Ends a command that a signal has stopped, with the exit code 128 + the signal's number."""

    def __init__(self, number: int):
        """Takes the number of the signal: 2 for Ctrl-C, 15 for SIGTERM."""
        super().__init__(128 + number)


def end_at_once() -> None:
    """Makes Ctrl-C print one word and exit with code 130; called first in every command.

    A KeyboardInterrupt during imports would print a traceback, or an import could swallow it. Where
    Ctrl-C is ignored, as in a background process, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(*_: Any) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(130)


@contextmanager
def raising() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt in the block, so that open files can be closed."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)
