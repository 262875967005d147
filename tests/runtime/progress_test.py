"""Lines about loops that take long."""

import logging

import pytest

from binlatent.runtime import progress as module
from binlatent.runtime.progress import progress


class Clock:
    """In place of the module time: it goes on by sleeping alone."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def lines(caplog):
    """Returns the lines so far."""
    caplog.set_level(logging.INFO, "binlatent")
    return lambda: [record.getMessage() for record in caplog.records]


def loop(time, num, seconds, unit="images", **how):
    with progress(num, unit, **how) as shown:
        for _ in range(num):
            time.sleep(seconds)
            shown.update()


def test_lines_come_at_intervals_with_the_time_left(time, lines):
    with progress(10_000, "images") as shown:
        shown.update(4_000, skipped=True)
        time.sleep(300)  # the compiler
        shown.update(1_000)
        for _ in range(10):
            time.sleep(6)
            shown.update(500)
    # From the first line on, one in every 12 s; the last update needs none.
    assert lines() == [
        "5500 of 10000 images, 0:00:54 left",
        "6500 of 10000 images, 0:00:42 left",
        "7500 of 10000 images, 0:00:30 left",
        "8500 of 10000 images, 0:00:18 left",
        "9500 of 10000 images, 0:00:06 left",
    ]


def test_a_long_loop_has_fewer_lines(time, lines):
    loop(time, 3_600, 1.0)
    assert 30 < len(lines()) < 60 and lines()[-1].endswith(" left")


def test_short_loops_and_silent_ones_say_nothing(time, lines):
    loop(time, 9, 1.0)
    loop(time, 9, 100.0, silent=True)
    with progress(3, "samples"):
        for _ in range(3):
            loop(time, 30, 2.0, "batches", bar=False)  # a loop inside another
    assert not lines()


def test_a_long_loop_inside_another_has_lines_too(time, lines):
    with progress(3, "samples"):
        loop(time, 90, 2.0, "batches", bar=False)
    assert len(lines()) == 2


def test_a_terminal_has_a_bar_and_no_lines(time, lines, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    loop(time, 4, 20.0)
    assert "4/4" in capsys.readouterr().err and not lines()


def test_after_an_error_the_next_loop_is_the_outermost(time, lines):
    with pytest.raises(KeyError), progress(2, "images"):
        raise KeyError
    loop(time, 4, 20.0)
    assert len(lines()) == 2
