"""A small convolutional classifier of images, the feature network for digit-sized data.

Dimension legend: `n` batch, `h w` image grid, `c` image channels, `d` feature width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

_NUM_GROUPS = 8


class Classifier(nn.Module):
    """Maps images (n, h, w, c), float in [-1, 1], to class logits and penultimate features.

    Three stages halve the grid and the features are the maxima over the last grid, so any size
    and any number of channels work. (Maxima, because strokes are local: with means, digits take
    more epochs to learn.)

    Attributes:
      num_classes: Number of classes.
      width: Channels of the first stage, a multiple of 8; the two later stages have two and four
        times as many, so d = 4 * width.
    """

    num_classes: int
    width: int = 32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the logits (n, num_classes) and the features (n, d)."""
        # The first convolution is strided because convolutions with few input channels at full
        # resolution are the slowest ones on a CPU.
        x = self._stage(images, self.width, kernel_size=5)
        x = self._stage(x, 2 * self.width, kernel_size=3)
        x = x + self._stage(x, 2 * self.width, kernel_size=3, stride=1)
        x = self._stage(x, 4 * self.width, kernel_size=3)
        features = jnp.max(x, axis=(1, 2))
        return nn.Dense(self.num_classes)(features), features

    def _stage(self, x: jax.Array, channels: int, kernel_size: int, stride: int = 2) -> jax.Array:
        kernel = (kernel_size, kernel_size)
        x = nn.Conv(channels, kernel, strides=(stride, stride), use_bias=False)(x)
        return nn.silu(nn.GroupNorm(num_groups=_NUM_GROUPS)(x))
