"""How commands report what went wrong, and their progress."""

import logging
import os
import signal
import subprocess
import sys

import pytest

from binlatent import command
from binlatent.errors import UserError


@pytest.mark.parametrize(
    "error, line, code",
    [
        (UserError("what is wrong: do this."), "Error: What is wrong: do this.\n", 1),
        (UserError("config.seed is wrong."), "Error: config.seed is wrong.\n", 1),
        (UserError("runs/x is wrong."), "Error: runs/x is wrong.\n", 1),
        (PermissionError(13, "Denied", "x.png"), "Error: [Errno 13] Denied: 'x.png'\n", 1),
        (KeyboardInterrupt(), "Interrupted.\n", 130),
    ],
)
def test_a_command_reports_an_error_as_one_line(capsys, error, line, code):
    with pytest.raises(SystemExit) as exit_, command.reporting():
        raise error
    assert exit_.value.code == code
    assert capsys.readouterr() == ("", line)


def test_a_command_logs_the_package_alone_and_leaves_other_errors(capsys):
    with command.reporting():
        logging.getLogger("binlatent.x").info("progress")
        logging.getLogger("other").info("noise")
    assert capsys.readouterr().err == "progress\n"
    with pytest.raises(ZeroDivisionError), command.reporting():
        raise ZeroDivisionError


def test_ctrl_c_waits_until_writing_has_ended():
    # A process in the background may have been started to ignore it.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    steps = []
    with pytest.raises(KeyboardInterrupt), command.deferring_interrupt():
        signal.raise_signal(signal.SIGINT)
        steps.append("written")
    assert steps == ["written"]
    with pytest.raises(KeyboardInterrupt):  # and then counts at once again
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, previous)


def _prepared(script, **environment):
    """Runs lines after `prepare_jax` in a process with an environment of its own."""
    script = f"import jax\nfrom binlatent import command\ncommand.prepare_jax()\n{script}"
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XLA_FLAGS")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    command_line = [sys.executable, "-W", "error", "-c", script]
    result = subprocess.run(command_line, env=kept | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


_COMPILE = "jax.jit(lambda x: x + 1)(1)"


def test_what_was_compiled_is_kept_for_the_next_start(tmp_path):
    hits = """
import jax.monitoring
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: x + 1)(1)
print(found.count("/jax/compilation_cache/cache_hits"))
"""
    assert _prepared(hits, XDG_CACHE_HOME=str(tmp_path)) == ["0"]
    files = list((tmp_path / "binlatent" / "compiled").glob("*-cache"))
    assert files
    assert int(_prepared(hits, XDG_CACHE_HOME=str(tmp_path))[0]) == len(files)


def test_the_users_own_cache_and_flags_stay(tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"), "XDG_CACHE_HOME": str(tmp_path)}
    devices = "--xla_force_host_platform_device_count=3"
    shown = _prepared(f"{_COMPILE}; print(jax.device_count())", XLA_FLAGS=devices, **own)
    assert shown == ["3"]
    assert not (tmp_path / "binlatent").exists()


def test_a_home_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert _prepared(f"print({_COMPILE})", XDG_CACHE_HOME=str(tmp_path / "file")) == ["2"]
