"""The log of a stage: complete lines, and full disks."""

import json
import subprocess
import sys

import pytest

from binlatent.runtime.errors import UserError
from binlatent.training.logbook import Logbook


def steps(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_an_incomplete_last_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with Logbook(tmp_path, "prior", 1, 2) as logbook:
        logbook.record(2, {"loss": 0.5})
    assert steps(tmp_path) == [1, 2]


def test_a_record_without_metrics_writes_nothing(tmp_path, caplog):
    with caplog.at_level("INFO", "binlatent"), Logbook(tmp_path, "prior", 0, 2) as logbook:
        logbook.record(1, {})
        logbook.record(2, {"loss": 0.5})
    assert steps(tmp_path) == [2] and caplog.messages == ["prior 2/2: loss 0.5"]


def test_nan_and_infinity_are_null_in_the_file_and_shown_in_the_log(tmp_path, caplog):
    values = {"bce": float("nan"), "psnr": float("inf"), "ssim": 1.0}
    with caplog.at_level("INFO", "binlatent"), Logbook(tmp_path, "prior", 0, 2) as logbook:
        logbook.record(1, values)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"stage": "prior", "step": 1, "bce": null, "psnr": null, "ssim": 1.0}\n'
    )
    assert caplog.messages == ["prior 1/2: bce nan, psnr inf, ssim 1"]


def test_the_first_step_does_not_wait_for_tensorflow(tmp_path):
    code = f"""
import pathlib, sys
from binlatent.training.logbook import Logbook
with Logbook(pathlib.Path({str(tmp_path)!r}), "prior", 0, 1) as logbook:
    logbook.tick()
print("tensorflow" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def test_a_log_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match=f"log in {tmp_path} could not be written: "):
        Logbook(tmp_path, "prior", 0, 1)


def test_a_full_disk_is_a_one_line_error(tmp_path):
    with (
        pytest.raises(UserError, match=f"log in {tmp_path} could not be written: No space left"),
        Logbook(tmp_path, "prior", 1, 2) as logbook,
    ):
        logbook._file.close()
        logbook._file = open("/dev/full", "w")  # noqa: SIM115
        logbook.record(2, {"loss": 0.5})
