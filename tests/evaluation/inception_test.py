"""FID's InceptionV3 and its resize, against the reference numbers of torch-fidelity's network."""

from pathlib import Path

import drawn
import jax
import numpy as np
import pytest
from flax import traverse_util

from binlatent.convert import published
from binlatent.evaluation.networks import inception

DATA = Path(__file__).parents[1] / "data"
GOLDEN = np.load(DATA / "inception_v3_fid.npz", allow_pickle=False)


def test_features_and_logits():
    variables = published.inception(drawn.state("inception"))
    variables = traverse_util.unflatten_dict(variables, sep="/")
    images = GOLDEN["images"].transpose(0, 2, 3, 1)
    model = inception.InceptionV3()
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, dict(shapes))
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(model.apply)(variables, images)
    spatial = outputs.pop("spatial")
    assert spatial.shape == (len(images), 17 * 17 * 7)
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
