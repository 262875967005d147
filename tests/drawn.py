"""Weights drawn by name, in PyTorch's layout, equal to those of the networks of the goldens."""

import zlib
from pathlib import Path

import numpy as np

# Layer of torchvision's `features`, channels in, channels out.
_VGG16 = (
    *((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128)),
    *((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    *((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    *((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)


def tensor(name, shape):
    """The tensor of a name: variance 2 / inputs, or near 1 or 0 for batch norms."""
    if not shape:
        return np.zeros((), np.int64)  # num_batches_tracked
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return r * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if name.endswith("running_var"):
        return 1 + 0.2 * abs(r)
    return 1 + 0.1 * r if name.endswith(".weight") else 0.1 * r


def vgg16_state():
    """A state dict of torchvision's VGG16, whose classifier is a single tensor."""
    shapes = {"classifier.6.bias": (1000,)}
    for index, inputs, outputs in _VGG16:
        shapes[f"features.{index}.weight"] = (outputs, inputs, 3, 3)
        shapes[f"features.{index}.bias"] = (outputs,)
    return {name: tensor(name, shape) for name, shape in shapes.items()}


def state(network):
    """The state dict of a network whose shapes are in tests/data."""
    path = Path(__file__).parent / "data" / f"{network}_state_dict_shapes.txt"
    shapes = dict(line.split() for line in path.read_text().splitlines())
    return {
        name: tensor(name, () if shape == "scalar" else tuple(map(int, shape.split("x"))))
        for name, shape in shapes.items()
    }
