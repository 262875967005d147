"""A training of stage 1 with its discriminator, killed again and again, loses only time.

KILLS=20 pytest tests/torture_test.py kills more often.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import jax
import numpy as np
import pytest
from conftest import tiny_flags, xla_flags

from binlatent.runtime.devices import replicate
from binlatent.training.checkpoint import Checkpoints

KILLS = int(os.environ.get("KILLS", "2"))
EVERY = 3  # steps between checkpoints
CHANGES = {
    "autoencoder.loss.adversarial": 1.0,
    "autoencoder.loss.adaptive": True,
    "autoencoder.loss.start_step": 5,
    "autoencoder.discriminator.width": 8,
    "autoencoder.discriminator.num_layers": 1,
    "autoencoder.train.num_steps": 15 * KILLS,
    "log_every": 1,
    "checkpoint_every": EVERY,
    "preview_every": 1_000_000,
}


def start(workdir, digits_dir, env):
    """Starts the training of an autoencoder with a discriminator; its output is a file."""
    command = [sys.executable, "-m", "binlatent.main", "--mode=train_autoencoder"]
    command += [*tiny_flags(digits_dir), f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in CHANGES.items()]  # the last counts
    # Two devices: a start is then mostly that of Python, and of what is compiled already.
    env = env | {"XLA_FLAGS": xla_flags(2)}
    with (workdir / "output.txt").open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)


def finish(process, workdir):
    process.wait(timeout=900)
    assert process.returncode == 0, (workdir / "output.txt").read_text()


def wait_until(condition, process, what):
    """Returns whether the condition came true before the process had ended."""
    end = time.monotonic() + 300
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, what
        time.sleep(0.002)
    return True


def unfinished(workdir):
    """What Orbax is writing, or was when it was killed: names, each with the folder's inode."""
    found = set()
    for path in (workdir / "autoencoder").glob("*orbax-checkpoint-tmp*"):
        with suppress(FileNotFoundError):  # it has got its name meanwhile
            found.add((path.name, path.stat().st_ino))
    return found


def newest(workdir):
    """The newest checkpoint that is finished, as the folder shows it; 0 without one."""
    names = [path.name for path in (workdir / "autoencoder").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def logged(workdir):
    """The last line of the log of each step."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["step"]: entry for entry in map(json.loads, lines) if "loss" in entry}


def contents(workdir, experiment):
    """The whole state, and the data's, of the newest checkpoint."""
    with Checkpoints(workdir / "autoencoder") as checkpoints:
        like = replicate(experiment.autoencoder.init_state(experiment.seed))
        state = jax.device_get(checkpoints.restore(like).replace(key=None))
        return state, checkpoints.meta()["data"]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_it_never_was(
    tiny_experiment, digits_dir, no_tensorflow, tmp_path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for workdir in (whole, killed):
        workdir.mkdir()
    finish(start(whole, digits_dir, no_tensorflow), whole)
    rng, report = np.random.default_rng(0), []
    for i in range(KILLS):
        process, before = start(killed, digits_dir, no_tensorflow), len(logged(killed))
        sizes = (killed / "metrics.jsonl").stat().st_size if before else 0
        moment = ("writing", "training", "writing", "training", "starting")[i % 5]
        if moment == "starting":
            time.sleep(rng.uniform(0, 30))
        else:

            def trains():
                path = killed / "metrics.jsonl"  # noqa: B023
                return path.exists() and path.stat().st_size > sizes  # noqa: B023

            assert wait_until(trains, process, "no step was taken")
            time.sleep(rng.uniform(0, 1.5))
        if moment == "writing":
            there = unfinished(killed)
            wait_until(lambda: unfinished(killed) - there, process, "no checkpoint")  # noqa: B023
            time.sleep(rng.uniform(0, 0.1) if i else 0)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, "it ended before the kill: more steps"
        resumed = re.search(r"resumes at step (\d+)", (killed / "output.txt").read_text())
        if i and resumed:
            # From the newest that was finished when it was killed.
            assert int(resumed[1]) == report[-1]["newest"]
        reached, there = max(logged(killed), default=0), newest(killed)
        report.append(
            dict(moment=moment, reached=reached, newest=there, left=sorted(unfinished(killed)))
        )
        assert reached - there <= EVERY, report
    process = start(killed, digits_dir, no_tensorflow)
    finish(process, killed)
    print("\n".join(map(str, report)))
    assert len(report) == KILLS and any(entry["left"] for entry in report)

    experiment = tiny_experiment.change(CHANGES)
    (state, data), (expected, expected_data) = (
        contents(workdir, experiment) for workdir in (killed, whole)
    )
    assert int(state.step) == CHANGES["autoencoder.train.num_steps"] and data == expected_data
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    losses, expected = ({n: x["loss"] for n, x in logged(w).items()} for w in (killed, whole))
    assert losses == expected
    lines = logged(killed)
    assert not {"discriminator_loss", "adversarial_weight"} & set(lines[5])  # it starts at 5
    assert {"discriminator_loss", "adversarial_weight"} <= set(lines[6])
    # Nothing is left of the kills.
    kept = sorted(path.name for path in (whole / "autoencoder").iterdir())
    assert sorted(path.name for path in (killed / "autoencoder").iterdir()) == kept
