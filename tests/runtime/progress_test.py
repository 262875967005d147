"""Lines about loops that take long."""

import logging
import re
import time

import pytest

from binlatent.runtime import progress as module
from binlatent.runtime.progress import progress


@pytest.fixture
def lines(caplog, monkeypatch):
    """The lines so far; one may come every 50 ms, and of a loop inside another never."""
    monkeypatch.setattr(module, "_EVERY", 0.05)
    caplog.set_level(logging.INFO, "binlatent")
    return lambda: [record.getMessage() for record in caplog.records]


def test_lines_come_at_intervals_with_the_time_left(lines):
    with progress(10_000, "images") as shown:
        shown.update(4_000, skipped=True)
        time.sleep(0.3)  # the compiler
        shown.update(5)
        for _ in range(6):
            time.sleep(0.02)
            shown.update(5)
    # A line each 3 updates at the most; 6,000 images of 20 ms for 5 of them.
    assert 1 <= len(lines()) <= 3
    for line in lines():
        found = re.fullmatch(r"(\d+) of 10000 images, 0:0(\d):(\d\d) left", line)
        done, minutes, seconds = map(int, found.groups())
        assert 4_010 <= done <= 4_035 and 23 <= 60 * minutes + seconds < 100


def test_a_short_loop_and_one_inside_another_say_nothing(lines):
    with progress(3, "batches") as shown:
        for _ in range(3):
            shown.update()
    with progress(2, "samples"):
        for _ in range(2):
            with progress(4, "batches", bar=False) as shown:
                for _ in range(4):
                    time.sleep(0.03)
                    shown.update()
    with progress(4, "images", silent=True) as shown:
        for _ in range(4):
            time.sleep(0.03)
            shown.update()
    assert not lines()


def test_a_terminal_has_a_bar_and_no_lines(lines, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress(4, "images") as shown:
        for _ in range(4):
            time.sleep(0.03)
            shown.update()
    assert "4/4" in capsys.readouterr().err and not lines()


def test_after_an_error_the_next_loop_is_the_outermost(lines):
    with pytest.raises(KeyError), progress(2, "images"):
        raise KeyError
    with progress(40, "images") as shown:
        for _ in range(10):
            time.sleep(0.02)
            shown.update()
    assert lines()
