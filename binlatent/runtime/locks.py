"""Locks between processes, of the operating system: they end with the process that holds them.

They are POSIX's (fcntl), which NFS 4, Lustre (mounted with `flock`) and GPFS keep across machines.
"""

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from binlatent.runtime.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

log = logging.getLogger(__name__)

_held: set[Path] = set()  # by this process, which POSIX would give a lock twice
_changing = threading.Lock()


@contextlib.contextmanager
def only_process(path: Path, doing: str) -> Iterator[None]:
    """Refuses to go on while another process is inside, on this machine or on another.

    This process may go in again. Where the file system has no locks, there is a warning and no
    more.

    Args:
      path: of the lock, a file that stays; it names the host and the process that holds it.
      doing: what all that take this lock do, for the message: "{doing} already, by process ...".
    """
    path = path.absolute()
    with _changing:
        again = path in _held
        _held.add(path)
    if again:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # For appending: not to empty what names another process.
        with path.open("a+") as file:
            _lock(file, doing)
            with contextlib.suppress(OSError):  # of a full disk; the lock holds all the same
                file.truncate(0)
                file.write(f"{socket.gethostname()} {os.getpid()}\n")
                file.flush()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    file.truncate(0)
    finally:
        with _changing:
            _held.discard(path)


def _lock(file: IO[str], doing: str) -> None:
    """Takes the lock of a file, or says who has it."""
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            log.warning(
                "The file system of %s has no locks (%s): nothing keeps a second process from "
                "doing the same.",
                *(file.name, error.strerror),
            )
            return
        file.seek(0)
        host, _, process = file.read().strip().partition(" ")
        holder = f"process {process} on {host}" if process else "another process"
        raise UserError(
            f"{doing} already, by {holder}: wait for it, end it, or use another --workdir."
        ) from error


@contextlib.contextmanager
def in_turn(file: IO) -> Iterator[None]:
    """Waits until no other process is inside with the same file, which is open for writing.

    For moments: no message says who waits. Where the file system has no locks, nobody waits.
    """
    locked = False
    if fcntl is not None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: of a file that is closed
            fcntl.lockf(file, fcntl.LOCK_EX)
            locked = True
    try:
        yield
    finally:
        if locked:
            with contextlib.suppress(OSError, ValueError):
                fcntl.lockf(file, fcntl.LOCK_UN)
