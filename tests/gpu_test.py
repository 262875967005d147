"""launch/gpu.sh without a GPU and without programs, and the size of cifar10:gpu."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import parse_main

from binlatent.benchmark import flops
from binlatent.configs import cifar10
from binlatent.experiment import resolve

PARTS = ["autoencoder", "reconstructions", "prior", "guidance0", "guidance1", "pictures", "report"]

# Replaces python3: records its arguments, writes the files of the program, and fails on demand.
PYTHON = """#!/usr/bin/env bash
[ "$1" = - ] && exec {python} "$@"
[ "$1" = -c ] && exit "${{NO_DEVICE:-0}}"
echo "$*" >> {folder}/calls
case "$*" in *"${{FAIL:-nothing}}"*) exit 9 ;; esac
for word; do
  case $word in --workdir=*) run=${{word#*=}} ;; --out=*) touch "${{word#*=}}" ;; esac
done
case "$*" in
  *train_prior*) mkdir -p "$run/prior" ;;
  *keep=npz*) mkdir -p "$run/evaluation/samples_a"
    cp {folder}/samples.npz "$run/evaluation/samples_a/samples_12000x2x2x3.npz" ;;
  *mode=sample*) touch "$run/samples.png" ;;
  *mode=reconstruct*) touch "$run/reconstructions.png" ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Runs the script with a python3 that records its calls; returns its code and the calls."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(PYTHON.format(python=sys.executable, folder=tmp_path))
    (tmp_path / "bin" / "python3").chmod(0o755)
    (tmp_path / "images" / "train").mkdir(parents=True)
    command = ["tar", "czf", tmp_path / "images.tar.gz", "-C", tmp_path / "images", "train"]
    subprocess.run(command, check=True)
    images = np.arange(12_000, dtype=np.uint16)[:, None, None, None] % 251
    images = np.broadcast_to(images, (12_000, 2, 2, 3)).astype(np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    own = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "WORKDIR": "work"}
    own |= {"OUT": "out", "IMAGES": "images.tar.gz", "WEIGHTS": ".", "VIRTUAL_ENV": "/none"}

    def run(**given):
        (tmp_path / "calls").write_text("")
        command = ["bash", str(Path("launch/gpu.sh").resolve()), "--config.seed=7"]
        result = subprocess.run(
            command, cwd=tmp_path, env=os.environ | own | given, capture_output=True, timeout=60
        )
        return result.returncode, (tmp_path / "calls").read_text().splitlines()

    return run


def modes(calls):
    """A short name of each call."""
    found = [re.search(r"benchmark paper|mode=(\w+)(?: --metrics=(\w+))?", x) for x in calls]
    return [x[2] or x[1] or "benchmark" for x in found]


def test_every_part_runs_once_and_in_order(script, tmp_path):
    code, calls = script()
    order = ["benchmark", "train_autoencoder", "rfid", "reconstruct", "train_prior"]
    order += ["fid", "fid", "sample", "evaluate", "benchmark"]
    assert code == 0 and modes(calls) == order
    for call in calls[1:-1]:  # they are commands
        assert len(parse_main(*call.split()[2:])) == 1
        assert "--config.evaluate.network=classifier --config.seed=7" in call
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    for guidance in "01":
        parts = [tmp_path / "out" / f"guidance{guidance}_{part}.npz" for part in "01"]
        found = np.concatenate([np.load(part)["arr_0"] for part in parts])
        np.testing.assert_array_equal(found, images[:10_000])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(names) == 8 and {"performance.jsonl", "results.tar.gz", "samples.png"} < names
    # Nothing is left to do, and another folder gets the same files.
    assert script(OUT="other") == (0, [])
    assert {path.name for path in (tmp_path / "other").iterdir()} == names


def test_what_failed_is_made_again_and_no_more(script, tmp_path):
    (tmp_path / "efficientnet.npz").touch()
    code, calls = script(FAIL="train_prior")
    assert code == 1 and modes(calls)[-2:] == ["train_prior", "benchmark"]
    assert "--config.evaluate.network=efficientnet" in calls[1]
    (tmp_path / "work" / "run" / "prior").mkdir()  # a checkpoint, and too little time for the rest
    code, calls = script(LIMIT="120")
    assert code == 1 and modes(calls) == ["fid", "fid", "sample", "evaluate"]
    code, calls = script(FAIL="--guidance=1")
    assert code == 1 and modes(calls) == ["train_prior", "fid", "fid", "sample", "evaluate"]
    code, calls = script()
    assert code == 0 and modes(calls) == ["fid"] and "--guidance=1" in calls[0]


def test_without_a_device_nothing_starts(script, tmp_path):
    assert script(NO_DEVICE="1") == (1, [])
    assert not (tmp_path / "work" / "images").exists()


def test_the_config_for_a_gpu_takes_ten_minutes():
    """With the shares of an H100's 989 TFLOP/s in the config's header."""
    experiment = resolve(cifar10.get_config("gpu"))
    autoencoder, prior = experiment.autoencoder, experiment.prior
    network = prior.prior.network
    assert (network.num_layers, network.width, network.num_heads) == (24, 512, 8)
    step = flops.count_autoencoder_step(
        autoencoder.networks, autoencoder.image_shape, autoencoder.code_shape
    )
    first = step * autoencoder.train.batch_size * autoencoder.train.num_steps
    # A block of 8 * 8 + 2 tokens: 12 products of width 512 each, scores and weighted sums.
    block = 12 * 66 * 2 * 512**2 + 2 * 2 * 66**2 * 512
    ends = 2 * 64 * 2 * 32 * 512 + 2 * 2 * 512**2
    second = 3 * (24 * block + ends) * prior.train.batch_size * prior.train.num_steps
    assert 15e15 < first < 18e15 and 140e15 < second < 142e15
    for share in (0.35, 0.4):
        assert 460 < first / (0.15 * 989e12) + second / (share * 989e12) < 540


def test_a_config_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=":cpu or :gpu, not :tpu"):
        cifar10.get_config("tpu")
