"""The configs of the paper: their codes' sizes, what of them differs, and that all are accepted."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from binlatent import build, checks

CODES = {
    "default": (16, 16, 32),
    "churches256": (16, 16, 32),
    "bedrooms256": (16, 16, 32),
    "ffhq256": (16, 16, 32),
    "celebahq256": (16, 16, 32),
    "imagenet256": (16, 16, 64),
    "ffhq1024": (32, 32, 64),
    "celebahq1024": (32, 32, 64),
}


def load(name, *variant):
    return importlib.import_module(f"configs.{name}").get_config(*variant)


def test_every_config_is_tested():
    files = {path.stem for path in Path("configs").glob("*.py")} - {"__init__", "digits", "workdir"}
    assert files == set(CODES)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("name", CODES)
def test_a_config_of_the_paper(name, variant):
    config = load(name, variant)
    checks.check(config)
    assert build.code_shape(config) == CODES[name]
    train, loss = config.autoencoder.train, config.autoencoder.loss
    if variant == "paper":
        assert (train.learning_rate, train.warmup_steps, train.batch_size) == (5e-4, 10_000, 8)
        assert (loss.mse, loss.l1, loss.perceptual, loss.adversarial) == (1, 0, 1, 1)
        assert not loss.adaptive
    else:
        assert (loss.mse, loss.l1, loss.perceptual, loss.adversarial) == (0, 1, 1, 1)
        assert loss.adaptive and config.autoencoder.norm_first


def test_another_variant_is_refused():
    with pytest.raises(ValueError, match="of the paper or :released, not :realesed"):
        load("churches256", "realesed")


def test_the_released_layout_has_the_size_of_its_weights():
    # Of the authors' autoencoder for 256x256, without the shortcuts and the head it never uses:
    # counted by hand from its blocks, encoder and decoder.
    def residual(a, b):
        return 2 * (a + b) + 9 * b * (a + b) + 2 * b + (a * b + b if a != b else 0)

    def attention(a):
        return 2 * a + 4 * (a * a + a)

    middle = 2 * residual(512, 512) + attention(512)
    levels = [(128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    down = sum(residual(a, b) + residual(b, b) for a, b in levels) + 2 * attention(512)
    halvings = sum(9 * a * a + a for a in (128, 128, 256, 256))
    encoder = 9 * 3 * 128 + 128 + down + halvings + middle + 1024 + 9 * 512 * 256 + 256
    up_levels = [(512, 512), (512, 256), (256, 256), (256, 128), (128, 128)]
    up = sum(residual(a, b) + residual(b, b) for a, b in up_levels) + 2 * attention(512)
    doublings = sum(9 * a * a + a for a in (512, 256, 256, 128))
    decoder = 512 + 9 * 256 * 512 + 512 + middle + up + doublings + 256 + 9 * 128 * 3 + 3
    bits = 256 * 32 + 32 + 32 * 256
    config = load("churches256", "released")
    params = jax.eval_shape(lambda: build.init_autoencoder(config, jax.random.key(0)))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == encoder + decoder + bits
