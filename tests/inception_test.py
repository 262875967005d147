"""FID's InceptionV3 and its resize, against the reference numbers of torch-fidelity's network."""

import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from binlatent.models import inception

DATA = Path(__file__).parent / "data"
GOLDEN = np.load(DATA / "inception_v3_fid.npz", allow_pickle=False)
BATCH_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def drawn(key, shape):
    """The reference's tensor of a name, which is drawn from the name."""
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return r * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if key.endswith("running_var"):
        return 1 + 0.2 * abs(r)
    return 1 + 0.1 * r if key.endswith("bn.weight") else 0.1 * r


def put(tree, path, value):
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


@pytest.fixture(scope="module")
def variables():
    """All of the reference's tensors, under the names that Flax has for them."""
    variables = {"params": {}, "batch_stats": {}}
    for line in (DATA / "inception_state_dict_shapes.txt").read_text().splitlines():
        key, shape = line.split()
        if shape == "scalar":
            continue
        value = drawn(key, tuple(map(int, shape.split("x"))))
        *path, name = key.split(".")
        if key == "fc.weight":
            put(variables["params"], ["fc", "kernel"], value.T)
        elif key == "fc.bias":
            put(variables["params"], ["fc_bias"], value)
        elif path[-1] == "conv":
            put(variables["params"], [*path, "kernel"], value.transpose(2, 3, 1, 0))
        else:
            name = BATCH_NORM[name]
            room = "batch_stats" if name in ("mean", "var") else "params"
            put(variables[room], [*path, name], value)
    return variables


def test_features_and_logits(variables):
    images = GOLDEN["images"].transpose(0, 2, 3, 1)
    model = inception.InceptionV3()
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, dict(shapes))
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(model.apply)(variables, images)
    assert len(outputs) == 6
    for name, output in outputs.items():
        expected = GOLDEN[f"feat_{name}"]
        # Relative to the largest: logits fall through 0.
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 64), (256, 256), (1024, 1024)])
def test_resize(size):
    name = f"{size[0]}x{size[1]}"
    if f"resize_in_{name}" in GOLDEN:
        images = GOLDEN[f"resize_in_{name}"]
    else:
        images = np.random.RandomState(size[0]).randint(0, 256, (1, 3, *size))
    with jax.default_matmul_precision("highest"):
        resized = inception.resize(images.transpose(0, 2, 3, 1))
    got = np.asarray(resized).transpose(0, 3, 1, 2)[:, :, ::7, ::7]
    np.testing.assert_allclose(got, GOLDEN[f"resize_out_{name}_every7"], rtol=0, atol=1e-3)
