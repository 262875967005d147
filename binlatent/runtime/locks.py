"""Locks between processes; the operating system releases them when their process ends.

They are POSIX locks (fcntl). NFS 4, Lustre (mounted with `flock`) and GPFS share them between
machines.
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
except ImportError:  # on Windows
    fcntl = None

log = logging.getLogger(__name__)

_held: set[Path] = set()  # locks of this process, to which POSIX would grant them again
_changing = threading.Lock()


@contextlib.contextmanager
def only_process(path: Path, doing: str) -> Iterator[None]:
    """Raises UserError if another process, on this machine or another one, is in such a block.

    The same process may enter again. Where the file system has no locks, only a warning is logged.

    Args:
      path: the lock file, which stays. It holds the host and the number of the locking process.
      doing: begins the error message: "{doing} already, by process ...".
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
        # Opened for appending, to keep the name of a process that holds the lock.
        with path.open("a+") as file:
            _lock(file, doing)
            with contextlib.suppress(OSError):  # such as a full disk; the lock is held all the same
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
    """Locks a file, or raises an error that names the process that holds the lock."""
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            log.warning(
                "The file system of %s has no locks (%s): do not run the same command twice "
                "at once.",
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
    """Waits until no other process is in such a block with the same file.

    The file must be open for writing. For short blocks: waiting prints no message. Where the file
    system has no locks, there is no waiting.
    """
    locked = False
    if fcntl is not None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file is closed
            fcntl.lockf(file, fcntl.LOCK_EX)
            locked = True
    try:
        yield
    finally:
        if locked:
            with contextlib.suppress(OSError, ValueError):
                fcntl.lockf(file, fcntl.LOCK_UN)
