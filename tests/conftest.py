"""Four fake devices, strict rank promotion, real digits prepared once, one tiny config.

What takes long to make is made once for all of pytest's workers: the digits, a trained workdir, one
of untrained networks, and what is compiled. A test that writes into a workdir takes a copy of it.
"""

import contextlib
import fcntl
import functools
import gc
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from unittest import mock

import pytest


def xla_flags(num_devices):
    """Returns XLA_FLAGS for this number of fake devices."""
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    # Without XLA's fusion emitters, which compile slowly, tests take two thirds of the time. JAX
    # 0.10 knows these flags and 0.12 does not: an unknown one ends the process.
    # A program in one part, not in one for each core, is compiled in 0.8 of the processor's time,
    # and the other core has tests of its own.
    known = importlib.metadata.version("jaxlib").startswith("0.10.")
    more = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    return f"{flags} {more}" if known else flags


def pytest_configure():
    """Sets up JAX before a test module imports it."""
    # Tests, pytest's own workers and the processes that tests start share what they compile.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Most of the tests' time is the compiler's: without its optimisations it takes half of it.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = xla_flags(4)
    from binlatent.runtime import command

    command.prepare_jax()  # the kernels that users get


# The longest first, so that no process is left alone with one at the end.
LONGEST = ["train", "multihost", "pretrained", "autoencoder_stage", "state", "torture", "table4"]


def pytest_collection_modifyitems(items):
    names = [f"{name}_test" for name in LONGEST]
    order = {name: number for number, name in enumerate(names)}
    items.sort(key=lambda item: order.get(item.path.stem, len(names)))


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Frees a file's compiled programs: with all of them a process has too many memory maps.

    Linux allows it 65,530 (vm.max_map_count); beyond them, the compiler dies with SIGSEGV.
    """
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimised():
    """Compiles with optimisations, for a test that computes for longer than it compiles."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def no_tensorflow(tmp_path_factory):
    """The environment of a process without TensorFlow, the import of which takes five seconds."""
    path = tmp_path_factory.mktemp("no_tensorflow")
    (path / "tensorflow.py").write_text("raise ModuleNotFoundError('tensorflow is hidden')\n")
    return os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Makes a folder by its name, once for all workers: `once("name", function of its path)`."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name, make):
        path, unfinished = base / name, base / f"{name}.unfinished"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(path)
        return path

    return made


@pytest.fixture(scope="session")
def digits_dir(once):
    """A TFDS data directory that holds the prepared digits."""
    from binlatent.data.splits import Data, open_split

    return str(once("tfds", lambda path: open_split(Data("digits", str(path), 28, 1), "train")))


# What makes the digits config train in seconds, as overrides; the command line takes them too.
TINY = {
    "autoencoder.num_bits": 8,
    "autoencoder.base_width": 32,
    "autoencoder.embedding_width": 16,
    "autoencoder.loss.entropy": 0.0,
    "autoencoder.train.batch_size": 8,
    "autoencoder.train.num_steps": 6,
    "autoencoder.train.warmup_steps": 2,
    "prior.network.width": 16,
    "prior.network.num_layers": 1,
    "prior.network.num_heads": 2,
    "prior.network.name": "released",  # after a few steps most gradients of "dit" are still 0
    "prior.bernoulli.num_timesteps": 8,
    "prior.train.batch_size": 8,
    "prior.train.accumulate": 2,
    "prior.train.num_steps": 6,
    "prior.train.warmup_steps": 2,
    "sample.steps": 4,
    "sample.batch_size": 20,
    "evaluate.num_images": 20,
    "evaluate.num_samples": 20,
    "evaluate.classifier_images": 40,
    "evaluate.cas_epochs": 1,
    "evaluate.cas_batch_size": 8,
    "log_every": 2,
    "preview_every": 6,
    "checkpoint_every": 2,
}


def tiny_flags(digits_dir):
    """Returns the command line of the tiny config, but for --workdir."""
    values = {**TINY, "data.path": digits_dir}
    return ["--config=digits", *(f"--config.{key}={value}" for key, value in values.items())]


def _tiny_config(digits_dir):
    from binlatent.configs import digits

    config = digits.get_config()
    config.update_from_flattened_dict({**TINY, "data.path": digits_dir})
    return config


@pytest.fixture
def tiny_config(digits_dir):
    """The digits config at a size that trains in seconds."""
    return _tiny_config(digits_dir)


@pytest.fixture
def tiny_experiment(digits_dir):
    """The same resolved, with the ten classes of the digits."""
    from binlatent.experiment import resolve

    return resolve(_tiny_config(digits_dir)).with_classes(10)


@pytest.fixture(scope="session")
def trained_workdir(once, digits_dir):
    """A workdir of the tiny config after `python -m binlatent`, with its output in output.txt."""

    def train(path):
        command = [sys.executable, "-m", "binlatent", *tiny_flags(digits_dir), f"--workdir={path}"]
        with (path / "output.txt").open("w") as output:
            result = subprocess.run(command, stdout=output, stderr=output, timeout=900)
        assert result.returncode == 0, (path / "output.txt").read_text()

    return once("trained", train)


@pytest.fixture(scope="session")
def untrained_workdir(once, digits_dir):
    """A workdir of the tiny config with checkpoints of networks as they are at the start."""
    from binlatent.experiment import resolve

    def write(path):
        write_checkpoints(path, resolve(_tiny_config(digits_dir)).with_classes(10))

    return once("untrained", write)


@functools.cache
def untrained_params(stage):
    """Parameters of a stage as they are at the start, of key 0; made once for all equal stages."""
    import jax

    return jax.jit(stage.init)(jax.random.key(0))


def untrained_pipeline(experiment, prior=True):
    """The user's object on networks as they are at the start."""
    from binlatent.pipeline import BinaryLatentDiffusion

    stages = [experiment.autoencoder, experiment.prior][: 2 if prior else 1]
    return BinaryLatentDiffusion(experiment, *map(untrained_params, stages))


def write_checkpoints(path, experiment):
    """Writes checkpoints of both stages' networks as they are at the start into a workdir."""
    import jax

    from binlatent.pipeline import BinaryLatentDiffusion
    from binlatent.training.checkpoint import Checkpoints

    meta = {"config": experiment.config, "data": {}, "source": "", "encoder": "", "seconds": 1.0}
    for name, spec in (("autoencoder", experiment.autoencoder), ("prior", experiment.prior)):
        state = jax.jit(spec.init_state)(experiment.seed)
        with Checkpoints(path / name, 1) as checkpoints:
            checkpoints.save(state, meta)
        if name == "autoencoder":
            encoder = BinaryLatentDiffusion(experiment, state.ema_params)
            meta = meta | {"encoder": encoder.encoder_fingerprint}


def parse_main(*flags):
    """Parses the flags of `python -m binlatent.main` in this process; returns what is no flag."""
    from binlatent import main

    # Those that the call before this one defined, for keys of its config, which it read from argv.
    for name in [name for name in main.FLAGS if name.startswith("config.")]:
        delattr(main.FLAGS, name)
    main.FLAGS.unparse_flags()
    sys.modules.pop("config_config", None)  # ml_collections would run the new file in it
    with mock.patch.object(sys, "argv", ["binlatent", *map(str, flags)]):
        return main.parse_flags(sys.argv)


def call_main(*flags):
    """Runs `python -m binlatent.main` with these flags in this process; returns its exit code."""
    from binlatent import main

    handler = signal.getsignal(signal.SIGTERM)
    try:
        main.main(parse_main(*flags))
    except SystemExit as end:
        return end.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    return 0


HOLD = """
import sys
from binlatent.runtime.locks import only_process
from pathlib import Path
with only_process(Path(sys.argv[1]), "It is done"):
    print("inside", flush=True)
    sys.stdin.read()
"""


def start_python(code, *arguments):
    """Starts Python in another process, without JAX."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@contextlib.contextmanager
def held(path):
    """Yields another process that holds a lock, of `binlatent.runtime.locks`."""
    process = start_python(HOLD, path)
    assert process.stdout.readline() == "inside\n", process.stderr.read()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of the size that the test gives, such as "6m"."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)
