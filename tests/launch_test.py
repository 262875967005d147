"""The scripts in launch/ with stand-ins for the programs that they start."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import parse_main

from binlatent import main
from binlatent.experiment import resolve

LAUNCH = Path("launch").resolve()

GCLOUD = """#!/usr/bin/env bash
for word; do [[ $word == --command=* ]] && exec bash -c "${word#--command=}"; done
"""

# Writes its arguments, and goes on until a file is there or SIGTERM comes.
PYTHON = """#!/usr/bin/env bash
trap 'echo saved; exit 143' TERM
echo "$@"
until [ -e ~/end ]; do sleep 0.02; done
exit "$(cat ~/end)"
"""


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def tpu(tmp_path):
    """Starts launch/tpu.sh on a TPU VM of one host, whose home is `tmp_path`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "binlatent").mkdir()
    for name, text in (("gcloud", GCLOUD), ("python3", PYTHON)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"HOME": str(tmp_path), "PATH": path, "TPU": "a", "ZONE": "b"}

    def start(*flags):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = ["bash", str(LAUNCH / "tpu.sh"), *flags]
        return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    yield start
    (tmp_path / "end").write_text("0")


def test_a_training_on_a_tpu_survives_the_connection(tpu, tmp_path):
    log, flags = tmp_path / "binlatent.log", ("--workdir=a b", "--config=digits", "--label='$x'")
    connection = tpu(*flags)
    expected = "-m binlatent.main --workdir=a b --config=digits --label='$x'\n"
    wait_for(lambda: log.exists() and log.read_text() == expected)
    for number in (signal.SIGHUP, signal.SIGKILL):
        os.killpg(connection.pid, number)
    connection.communicate()
    second = tpu("--workdir=other")
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 1 and "A training runs already" in output
    again = tpu()
    assert again.stdout.readline() == expected
    (tmp_path / "end").write_text("7")
    again.communicate(timeout=30)
    assert again.returncode == 7


def test_a_training_on_a_tpu_is_stopped(tpu, tmp_path):
    connection = tpu("--workdir=x")
    wait_for(lambda: (tmp_path / "binlatent.log").exists())
    assert connection.stdout.readline() == "-m binlatent.main --workdir=x\n"
    stop = tpu("stop")
    for process in (stop, connection):
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 143 and "saved" in output


@pytest.mark.parametrize("name", ["quickstart", "emoji", "gpu"])
def test_an_address_makes_no_folder(name, tmp_path):
    own = {"WORKDIR": "gs://bucket/x", "VIRTUAL_ENV": "none", "OUT": str(tmp_path)}
    command = ["bash", str(LAUNCH / f"{name}.sh")]
    result = subprocess.run(
        command, env=os.environ | own, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1 and "gs://bucket/x is not a local path" in result.stderr
    assert not list(tmp_path.iterdir()) and not Path("gs:").exists()


def test_gpu_needs_the_archive_and_a_gpu(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"VIRTUAL_ENV": "none", "PATH": path, "JAX_PLATFORMS": "cuda"}
    own |= {"CUDA_VISIBLE_DEVICES": "-1"}  # hides the GPUs of a machine that has some
    command = {"cwd": tmp_path, "capture_output": True, "text": True}

    def start():
        result = subprocess.run(
            ["bash", str(LAUNCH / "gpu.sh")], env=os.environ | own, timeout=100, **command
        )
        (line,) = (result.stdout + result.stderr).splitlines()
        return result.returncode, line

    code, line = start()
    assert code == 1 and f"There is no archive {tmp_path}/cifar10.tar.gz: set IMAGES=" in line
    assert "tar czf cifar10.tar.gz -C DIR train test" in line and not list(tmp_path.iterdir())
    (tmp_path / "cifar10.tar.gz").touch()
    code, line = start()
    assert code == 1 and "finds no GPU" in line and "set JAX_PLATFORMS=cpu" in line


@pytest.mark.parametrize("name", ["slurm", "tpu", "gpus"])
def test_the_batches_of_an_example_fit_its_devices(name):
    text = (LAUNCH / f"{name}.sh").read_text()
    lines = text.replace("\\\n# ", " ").splitlines()
    words = next(x for x in lines if f"launch/{name}.sh --config" in x or " launch/slurm.sh" in x)
    flags = dict(re.findall(r"--([a-z-]+)=(\d+)", words))
    devices = int(flags.get("nodes", 1)) * int(flags.get("ntasks-per-node", 8))
    assert flags.get("gpus-per-node") == flags.get("ntasks-per-node")
    parse_main(*re.findall(r"--(?:config|workdir)\S+", words))
    experiment = resolve(main.FLAGS.config)
    for stage in (experiment.autoencoder, experiment.prior):
        assert stage.train.batch_size % devices == 0
