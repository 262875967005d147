"""The perceptual distance LPIPS, version 0.1, on VGG16 (Zhang et al., CVPR 2018).

Dimensions: n batch, h w image grid, c features of a layer. The parameters are those of VGG16
without its classifier; `read_vgg16` reads trained ones.
"""

import functools
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from binlatent.runtime.errors import UserError
from binlatent.runtime.weights import read_npz, shapes

Array = jax.Array

MIN_SIZE = 16  # the smallest h and w: four poolings leave one pixel

ELSEWHERE = "set --config.autoencoder.loss.vgg16=FILE"

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and standard deviation, for images in [-1, 1].
_MEAN = np.array([-0.030, -0.088, -0.188], np.float32)
_STD = np.array([0.458, 0.448, 0.450], np.float32)


class VGG16(nn.Module):
    """The convolutions of VGG16, configuration D (Simonyan and Zisserman, ICLR 2015)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        """Returns relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, in `dtype`.

        Args:
          x: (n, h, w, 3), with mean 0 and variance 1 over ImageNet; h and w at least MIN_SIZE.
        """
        taps = []
        for i, widths in enumerate(_WIDTHS, start=1):
            if taps:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for j, width in enumerate(widths, start=1):
                x = nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=f"conv{i}_{j}")(x)
                x = nn.relu(x)
            taps.append(x)
        return taps


class LPIPS(nn.Module):
    """The perceptual distance of two images; its gradient is finite everywhere.

    The parameters are those of `VGG16`, under the same names.

    Fields:
      dtype: of the convolutions; the rest is computed in float32.
    """

    dtype: Any = jnp.float32

    def setup(self):
        self.vgg = VGG16(self.dtype)
        nn.share_scope(self, self.vgg)

    def __call__(self, x: Array, y: Array) -> Array:
        """Returns the distance of each pair, (n,), float32, at least 0.

        Args:
          x, y: (n, h, w, 1 or 3) in [-1, 1]; h and w at least MIN_SIZE. Greyscale is expanded to
            RGB.
        """
        return jnp.sum(self.layers(x, y), axis=0)

    def layers(self, x: Array, y: Array) -> Array:
        """Returns the contribution of each tap of VGG16 to the distance, (5, n), float32."""
        # Not joined to one batch, because usually only one of the images needs a gradient.
        pairs = zip(self._features(x), self._features(y), _linear(), strict=True)
        return jnp.stack(
            [jnp.mean(jnp.sum(w * (a - b) ** 2, axis=-1), axis=(1, 2)) for a, b, w in pairs]
        )

    def _features(self, x: Array) -> list[Array]:
        x = jnp.broadcast_to(x.astype(jnp.float32), (*x.shape[:-1], 3))
        x = (x - _MEAN.reshape(1, 1, 1, 3)) / _STD.reshape(1, 1, 1, 3)
        return [unit_length(tap.astype(jnp.float32)) for tap in self.vgg(x)]


def unit_length(x: Array) -> Array:
    """Scales each pixel's features, (n, h, w, c), to length 1; zeros stay zeros."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    # The original adds 1e-10 to the root, whose gradient at 0 is infinite.
    return x / jnp.sqrt(jnp.maximum(square, 1e-20))


@functools.cache
def _linear() -> list[np.ndarray]:
    """Returns the weights of the features' squared differences, five of (1, 1, 1, c), >= 0."""
    with np.load(Path(__file__).with_name("lpips_linear.npz"), allow_pickle=False) as file:
        return [file[f"lin{i}"].reshape(1, 1, 1, -1) for i in range(len(_WIDTHS))]


def vgg16_shapes() -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of VGG16's parameters by name, such as `conv1_1/kernel`."""
    found = shapes(VGG16(), MIN_SIZE)
    return {name.removeprefix("params/"): like for name, like in found.items()}


def read_vgg16(path: str | Path, instead: str = ELSEWHERE) -> dict[str, Any]:
    """Returns the variables {"params": ...} of `VGG16` and of `LPIPS`, NumPy arrays, float32.

    `instead` ends the error message for a missing file, with an alternative.
    """
    if not Path(path).is_file():
        raise UserError(
            f"There is no file {str(path)!r} with VGG16's weights for LPIPS: download "
            "torchvision's https://download.pytorch.org/models/vgg16-397923af.pth and run "
            "`python -m binlatent.convert vgg16 --from vgg16-397923af.pth --out "
            f"{shlex.quote(str(path))}`, or {instead}."
        )
    return {
        "params": traverse_util.unflatten_dict(read_npz(path, "vgg16", vgg16_shapes()), sep="/")
    }
