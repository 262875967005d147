"""Locks between processes, also after a crash and on file systems without locks."""

import errno
import fcntl
import os
import signal
import socket

import pytest
from conftest import HOLD, held, start_python

from binlatent.runtime import locks
from binlatent.runtime.errors import UserError
from binlatent.runtime.locks import only_process


def test_a_second_process_gets_an_error_that_names_the_first(tmp_path):
    path = tmp_path / "sub" / ".lock"
    with held(path) as other:
        sentence = f"It is done already, by process {other.pid} on {socket.gethostname()}: wait"
        with pytest.raises(UserError, match=sentence), only_process(path, "It is done"):
            raise AssertionError("went in")
        other.communicate("")  # the same process leaves the block
    with only_process(path, "It is done"):
        assert path.read_text() == f"{socket.gethostname()} {os.getpid()}\n"


def test_a_killed_process_releases_its_lock(tmp_path):
    path = tmp_path / ".lock"
    with held(path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert path.read_text().endswith(f" {other.pid}\n")
        with only_process(path, "It is done"):
            pass


def test_a_process_may_enter_twice(tmp_path):
    path = tmp_path / ".lock"
    with only_process(path, "It is done"):
        with only_process(path, "It is done"):
            pass
        refused = start_python(HOLD, path)
        _, error = refused.communicate("")
        assert refused.returncode and f"already, by process {os.getpid()} on " in error
    assert path.read_text() == ""
    with held(path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_in_the_file_system_there_is_a_warning(tmp_path, monkeypatch, caplog, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with only_process(tmp_path / ".lock", "It is done"):
        pass
    assert f"has no locks ({os.strerror(number)})" in caplog.text
    with (tmp_path / "x").open("a") as file, locks.in_turn(file):
        file.write("x")


def test_the_package_works_without_fcntl(tmp_path):
    code = f"import sys; sys.modules['fcntl'] = None; import binlatent\n{HOLD}"
    process = start_python(code, tmp_path / ".lock")
    output, error = process.communicate("")
    assert output == "inside\n" and process.returncode == 0, error


def test_processes_that_write_in_turn_lose_nothing(tmp_path):
    count = """
import sys
from binlatent.runtime.locks import in_turn
for _ in range(200):
    with open(sys.argv[1], "r+") as file, in_turn(file):
        number = int(file.read())
        file.seek(0)
        file.write(str(number + 1))
        file.flush()
"""
    (tmp_path / "count").write_text("0")
    started = [start_python(count, tmp_path / "count") for _ in range(3)]
    for process in started:
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert (tmp_path / "count").read_text() == "600"
