"""Weights drawn by name, in PyTorch's layout, as the networks behind the goldens had them."""

import zlib

import numpy as np

# Layer of torchvision's `features`, channels in, channels out.
_VGG16 = (
    *((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128)),
    *((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    *((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    *((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)


def vgg16_state():
    """A state dict of torchvision's VGG16, its classifier being one tensor only."""
    shapes = {"classifier.6.bias": (1000,)}
    for index, inputs, outputs in _VGG16:
        shapes[f"features.{index}.weight"] = (outputs, inputs, 3, 3)
        shapes[f"features.{index}.bias"] = (outputs,)
    state = {}
    for name, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        x = random.standard_normal(shape).astype(np.float32)
        scale = 0.1 if len(shape) == 1 else np.sqrt(2 / np.prod(shape[1:]))
        state[name] = (x * scale).astype(np.float32)
    return state
