"""Two processes of two devices each, over loopback: against one of four, and after faults."""

import json
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
from conftest import tiny_flags, xla_flags

from binlatent.runtime import processes
from binlatent.runtime.devices import replicate
from binlatent.runtime.errors import UserError
from binlatent.training.checkpoint import Checkpoints

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# A process counts as dead sooner than by default.
HEARTBEAT_SECONDS = 10
MAIN = f"""
from binlatent import main
from binlatent.runtime import processes
processes.HEARTBEAT_SECONDS = {HEARTBEAT_SECONDS}
main.run()
"""


class Pair:
    """Two connected processes of `python -m binlatent.main` on the tiny config."""

    def __init__(self, folder, digits_dir, env, *flags, own=((), ()), slurm=False):
        """Starts them on folder/run; `own` are the flags of one alone."""
        self.outputs = [folder / f"output{i}.txt" for i in range(2)]
        self.processes = []
        port = free_port()
        for i in range(2):
            env = env | {"XLA_FLAGS": xla_flags(2)}
            joined = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}")
            if slurm:  # as srun sets them
                env |= {"SLURM_JOB_ID": f"{port}", "SLURM_STEP_NODELIST": "127.0.0.1"}
                env |= {"SLURM_NTASKS": "2", "SLURM_PROCID": f"{i}", "SLURM_LOCALID": f"{i}"}
                joined = ()
            command = [sys.executable, "-c", MAIN, *tiny_flags(digits_dir)]
            command += [f"--workdir={folder / 'run'}", *joined, *flags, *own[i]]
            with self.outputs[i].open("w") as output:
                self.processes.append(
                    subprocess.Popen(command, env=env, stdout=output, stderr=output)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, timeout=600):
        """Waits for both; returns their codes."""
        return [process.wait(timeout) for process in self.processes]

    def output(self, i):
        return self.outputs[i].read_text()

    def wait_for(self, path, timeout=300):
        """Waits until a file or folder exists, while both run."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < end, f"{path} did not appear"
            assert [p.poll() for p in self.processes] == [None, None], self.output(0)
            time.sleep(0.05)


def test_a_killed_process_stops_the_other_and_all_resume(digits_dir, no_tensorflow, tmp_path):
    flags = ("--mode=train_autoencoder", "--config.autoencoder.train.num_steps=100000")
    flags += ("--config.preview_every=100000", "--config.checkpoint_every=20")
    folder = tmp_path / "run" / "autoencoder"
    saved = 0
    for victim in (1, 0):
        with Pair(tmp_path, digits_dir, no_tensorflow, *flags) as pair:
            pair.wait_for(folder / f"{saved + 20}")
            start = time.monotonic()
            pair.processes[victim].kill()
            codes = pair.wait(HEARTBEAT_SECONDS + 60)
            seconds = time.monotonic() - start
        print(f"process {victim} killed, the other stopped after {seconds:.1f} s with", codes)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, -signal.SIGKILL)
        assert seconds < HEARTBEAT_SECONDS + 15
        output = pair.output(1 - victim)
        # JAX's message, or the package's if it was saving or a connection failed.
        died = "This most likely indicates that another task died", "Another process was lost"
        assert any(words in output for words in died), output
        assert saved == 0 or f"resumes at step {saved}" in pair.output(0)
        with Checkpoints(folder, alone=True) as checkpoints:
            saved = checkpoints.latest_step()
    # SIGTERM to one of them stops both at the same step.
    with Pair(tmp_path, digits_dir, no_tensorflow, *flags) as pair:
        pair.wait_for(folder / f"{saved + 20}")
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.wait() == [143, 143], pair.output(0) + pair.output(1)
    assert f"resumes at step {saved}" in pair.output(0)
    with Checkpoints(folder, alone=True) as checkpoints:
        assert f"is saved at step {checkpoints.latest_step()}" in pair.output(0)


def test_processes_of_different_configs_refuse_to_start(digits_dir, no_tensorflow, tmp_path):
    # They are tasks of a Slurm step, which JAX finds from the environment.
    own = ((), ("--config.seed=1",))
    with Pair(tmp_path, digits_dir, no_tensorflow, own=own, slurm=True) as pair:
        assert pair.wait() == [1, 1]
    for i in range(2):
        errors = [x for x in pair.output(i).splitlines() if x.startswith("Error: ")]
        assert len(errors) == 1 and "Traceback" not in pair.output(i), pair.output(i)
        assert "disagree on the config or --mode: 1 of 2 differ from process 0" in errors[0]
    assert not (tmp_path / "run").exists()


def restored(workdir, stage, experiment):
    """The state of a stage's newest checkpoint."""
    spec = {"autoencoder": experiment.autoencoder, "prior": experiment.prior}[stage]
    with Checkpoints(workdir / stage, alone=True) as checkpoints:
        return checkpoints.restore(replicate(spec.init_state(experiment.seed)))


def test_two_processes_end_with_the_parameters_of_one(
    trained_workdir, digits_dir, tiny_experiment, no_tensorflow, tmp_path
):
    # Not the first test here: the other worker starts by making `trained_workdir`.
    with Pair(tmp_path, digits_dir, no_tensorflow, "--config.evaluate.every=6") as pair:
        assert pair.wait() == [0, 0], pair.output(0) + pair.output(1)
    for stage in ("autoencoder", "prior"):
        two, one = (
            restored(workdir, stage, tiny_experiment)
            for workdir in (tmp_path / "run", trained_workdir)
        )
        assert int(two.step) == int(one.step) == 6
        # The root mean square of each gradient. For a bias before a norm of one channel per group,
        # and for an attention's keys, it is 0 up to rounding, at most 2e-9, of which Adam makes
        # full steps: such parameters are not compared.
        second = optax.tree.get(one.opt_state, "nu")
        compared = jax.tree.map(lambda nu: np.sqrt(nu / (1 - 0.999**6)) > 1e-7, second)
        share = np.mean(np.concatenate([x.ravel() for x in jax.tree.leaves(compared)]))
        assert share > 0.99
        for name in ("params", "ema_params"):
            worst = jax.tree.map(
                lambda a, b, where: np.abs(np.asarray(a) - np.asarray(b)).max(
                    initial=0, where=where
                ),
                getattr(two, name),
                getattr(one, name),
                compared,
            )
            print(stage, name, max(jax.tree.leaves(worst)), share)
            assert max(jax.tree.leaves(worst)) < 1e-5, worst
    # Only process 0 logs, evaluates and draws, each once.
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [2, 4, 6] * 2
    assert len([x for x in lines if "psnr" in x or "bce" in x]) == 2
    # Both drew the samples that were judged, ten each.
    (judged,) = [x["fd_classifier"] for x in lines if "fd_classifier" in x]
    assert 0 < judged < np.inf
    assert not list((tmp_path / "run" / "evaluation").glob("samples_*"))
    assert "prior 6/6" in pair.output(0) and "Wrote" in pair.output(0)
    assert "prior" not in pair.output(1) and "Wrote" not in pair.output(1)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["device"] == "4 x cpu"


def test_joining_too_late_is_one_sentence():
    processes.check_same("anything", "a")  # one process disagrees with nobody
    jax.devices()
    with pytest.raises(UserError, match="This process cannot join the others: jax.distributed"):
        processes.join("127.0.0.1:1", 2, 1)
