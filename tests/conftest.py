"""Four fake devices, strict rank promotion, real digits prepared once, one tiny config."""

import gc
import os
import subprocess
import tempfile

import pytest


def pytest_configure():
    """Sets up JAX before a test module imports it."""
    # Tests, pytest's own workers and the processes that tests start share what they compile.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Most of the tests' time is the compiler's: without its optimisations it takes half of it.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    from binlatent.runtime import command

    command.prepare_jax()  # the kernels that users get


# The longest first, so that no process is left alone with one at the end.
LONGEST = ["train", "multihost", "pretrained", "stages", "autoencoder_stage", "torture", "table4"]


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
def digits_dir(tmp_path_factory):
    """A TFDS data directory that holds the prepared digits."""
    from binlatent.data.splits import Data, open_split

    path = str(tmp_path_factory.mktemp("tfds"))
    open_split(Data("digits", path, 28, 1), "train")
    return path


# What makes the digits config train in seconds, as overrides; the command line takes them too.
TINY = {
    "autoencoder.num_bits": 8,
    "autoencoder.base_width": 32,
    "autoencoder.embedding_width": 16,
    "autoencoder.train.batch_size": 8,
    "autoencoder.train.num_steps": 6,
    "autoencoder.train.warmup_steps": 2,
    "prior.network.width": 16,
    "prior.network.num_layers": 1,
    "prior.network.num_heads": 2,
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


@pytest.fixture
def tiny_config(digits_dir):
    """The digits config at a size that trains in seconds."""
    from binlatent.configs import digits

    config = digits.get_config()
    config.update_from_flattened_dict({**TINY, "data.path": digits_dir})
    return config


@pytest.fixture
def small_disk(tmp_path, request):
    """A file system of so many bytes as the test says, "6m"."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a file system")
    yield path
    subprocess.run(["umount", str(path)], check=True)
