"""Four fake devices, strict rank promotion, real digits prepared once, one tiny config."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from binlatent.data import sources
from configs import digits

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A TFDS data directory that holds the prepared digits."""
    path = str(tmp_path_factory.mktemp("tfds"))
    sources.open_source("digits", path, "train", 28, 1)
    return path


# What makes the digits config train in seconds, as overrides; the command line takes them too.
TINY = {
    "autoencoder.num_bits": 8,
    "autoencoder.widths": (32,),
    "autoencoder.train.batch_size": 8,
    "autoencoder.train.num_steps": 6,
    "autoencoder.train.warmup_steps": 2,
    "prior.width": 16,
    "prior.num_layers": 1,
    "prior.num_heads": 2,
    "prior.num_timesteps": 8,
    "prior.train.batch_size": 8,
    "prior.train.num_steps": 6,
    "prior.train.warmup_steps": 2,
    "sample.steps": 4,
    "sample.batch_size": 20,
    "evaluate.num_images": 20,
    "evaluate.num_samples": 20,
    "evaluate.classifier_images": 40,
    "log_every": 2,
    "evaluate_every": 6,
    "checkpoint_every": 2,
}


@pytest.fixture
def tiny_config(digits_dir):
    """The digits config at a size that trains in seconds."""
    config = digits.get_config()
    config.update_from_flattened_dict({**TINY, "data.path": digits_dir})
    return config
