"""Ctrl-C during the imports of a command, and SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from binlatent.runtime import command, interrupt

PACKAGE = Path(interrupt.__file__).parents[1]

# Replaces JAX: an import that swallows errors, and during which the user presses Ctrl-C.
SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except BaseException:
    pass
"""
# A background process may be started with SIGINT ignored.
NOT_IGNORED = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def commands():
    """The modules for `python -m`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if 'if __name__ == "__main__":' in path.read_text():
            yield ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def test_ctrl_c_during_imports_prints_one_word(tmp_path):
    (tmp_path / "jax.py").write_text(SWALLOWS)
    path = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])
    environment = os.environ | {"PYTHONPATH": path}
    started = {}
    for name in (*commands(), "binlatent"):
        line = [sys.executable, "-c", NOT_IGNORED, "-m", name]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started[name] = subprocess.Popen(line, env=environment, text=True, **pipes)
    assert {"binlatent.main", "binlatent.paper.ablations", "binlatent"} <= started.keys()
    for name, process in started.items():
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors) == (130, "", "Interrupted.\n"), name


def test_ctrl_c_raises_inside_the_block_and_stays_ignored_where_it_was():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt.end_at_once()
        early = signal.getsignal(signal.SIGINT)
        assert early is not signal.default_int_handler
        with interrupt.raising():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is early
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupt.end_at_once()
        with interrupt.raising():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_sigterm_ends_a_command_with_the_code_of_a_shell():
    previous = signal.getsignal(signal.SIGTERM)
    try:
        command.end_on_sigterm()
        with pytest.raises(interrupt.Stopped) as end:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert end.value.code == 143
        assert interrupt.Stopped(signal.SIGINT).code == 130
    finally:
        signal.signal(signal.SIGTERM, previous)
