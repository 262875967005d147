"""How commands report what went wrong, and their progress."""

import logging
import signal

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
