"""The ResNet-50 against torchvision's, with weights drawn by name."""

import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from binlatent.evaluation.networks.resnet import ResNet50

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "resnet.npz", allow_pickle=False)
MODEL = ResNet50(num_classes=10, stage_sizes=(1, 2, 1, 1))  # of the golden
LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def drawn(path, shape):
    """The variable of a path, in Flax's layout, drawn by its name in torchvision."""
    *modules, leaf = path[1:]
    name = ".".join([*modules, LEAVES.get(leaf, leaf)])
    name = name.replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    name = name.replace("_0.", ".0.").replace("_1.", ".1.")
    torch_shape = {4: shape[:1:-1] + shape[:2], 2: shape[::-1]}.get(len(shape), shape)
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(torch_shape)
    r = r.astype(np.float32)
    if len(shape) == 4:
        return (r * np.float32(np.sqrt(2 / np.prod(torch_shape[1:])))).transpose(2, 3, 1, 0)
    if len(shape) == 2:
        return (r * np.float32(np.sqrt(2 / torch_shape[1]))).T
    if leaf == "var":
        return 1 + 0.2 * abs(r)
    return 1 + 0.1 * r if leaf == "scale" else 0.1 * r


@pytest.fixture(scope="module")
def images():
    images = np.random.RandomState(0).uniform(-1, 1, (4, 3, 64, 96)).astype(np.float32)
    return images.transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def variables(images):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), images)
    shapes = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({path: drawn(path, x.shape) for path, x in shapes.items()})


def test_logits_by_stored_statistics(variables, images):
    logits = jax.jit(MODEL.apply)(variables, images)
    np.testing.assert_allclose(logits, GOLDEN["logits"], rtol=1e-4, atol=1e-4)


def test_logits_by_the_statistics_of_the_batch(variables, images):
    def train(variables, images):
        return MODEL.apply(variables, images, train=True, mutable="batch_stats")

    logits, updated = jax.jit(train)(variables, images)
    np.testing.assert_allclose(logits, GOLDEN["train_logits"], rtol=1e-4, atol=1e-4)
    mean = updated["batch_stats"]["layer4_0"]["bn2"]["mean"][:16]
    np.testing.assert_allclose(mean, GOLDEN["train_mean"], rtol=1e-4, atol=1e-5)


def test_parameters_are_as_many_as_published():
    model = ResNet50(num_classes=1000)
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 25_557_032


def test_blocks_begin_as_their_shortcuts():
    model = ResNet50(num_classes=4, stage_sizes=(3,), width=4)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    # Except for the two blocks without a convolution in their shortcut.
    shorter = model.clone(stage_sizes=(1,))
    np.testing.assert_array_equal(model.apply(variables, images), shorter.apply(variables, images))


def test_bfloat16_computes_near_float32(variables, images):
    logits = jax.jit(MODEL.clone(dtype="bfloat16").apply)(variables, images)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, GOLDEN["logits"], rtol=0, atol=0.3)
