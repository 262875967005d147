"""The patch discriminator (PatchGAN: Isola et al., CVPR 2017), as in the authors' code.

Dimensions: n batch, h w grid of a layer, d its width. Layers are numbered as in the released
weights.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from binlatent.runtime.devices import mean_over_devices

Array = jax.Array

NORMS = ("batch", "group")

_MOMENTUM = 0.1  # weight of a batch in the running statistics


def logits_side(image_side: int, num_layers: int) -> int:
    """Returns the side of the grid of logits; less than 1 means that the image is too small.

    Args:
      image_side: height or width, in pixels.
      num_layers: of the discriminator.
    """
    return image_side // 2**num_layers - 2


def batch_moments(x: Array, axis_name: str | None = None) -> tuple[Array, Array]:
    """Returns each channel's mean and (biased) variance over a batch.

    Args:
      x: (n, h, w, d), float32.
      axis_name: a pmapped axis, for the moments of all its devices' batches together.

    Returns:
      (d,) each, the same on every device of the axis.
    """

    def mean(x):
        local = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        return mean_over_devices(local, axis_name) if axis_name else local

    # Two passes, because E[x^2] - E[x]^2 loses digits.
    center = mean(x)
    return center.reshape(-1), mean(jnp.square(x - center)).reshape(-1)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy, 2015) with PyTorch's running statistics.

    Unlike Flax's, the running variance is the unbiased one.

    Fields:
      axis_name: a pmapped axis over which statistics are synchronised: all devices normalise by the
        whole batch and have the same running statistics. `init` ignores it.
      dtype: of the output; the computation is in float32.
    """

    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Normalises each channel: (n, h, w, d) -> (n, h, w, d).

        Args:
          x: features.
          train: whether to use the batch's statistics, with the collection "batch_stats" mutable,
            or the running ones.
        """
        d = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (d,))
        bias = self.param("bias", nn.initializers.zeros, (d,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (d,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (d,))

        x = x.astype(jnp.float32)
        if self.is_initializing():
            mean, var = batch_moments(x)
        elif train:
            mean, var = batch_moments(x, self.axis_name)
            count = x.size // d * (jax.lax.axis_size(self.axis_name) if self.axis_name else 1)
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value += _MOMENTUM * (mean - running_mean.value)
            running_var.value += _MOMENTUM * (unbiased - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        scale = scale * jax.lax.rsqrt(var + 1e-5)
        mean, scale, bias = (v.reshape(1, 1, 1, d) for v in (mean, scale, bias))
        return ((x - mean) * scale + bias).astype(self.dtype)


class Discriminator(nn.Module):
    """Classifies each patch of an image as real or generated.

    Fields:
      width: of the first layer; layer i has `width` * min(2^i, 8).
      num_layers: the number of times that the side halves, at least 1.
      norm: "batch", as in the paper, or "group", which treats each image by itself.
      axis_name: of `BatchNorm`.
      dtype: of all but the logits and the statistics.
    """

    width: int = 64
    num_layers: int = 3
    norm: str = "batch"
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Array, train: bool = True) -> Array:
        """Applies the network.

        Args:
          image: (n, height, width, channels) in [-1, 1].
          train: as in `BatchNorm`; group norm ignores it.

        Returns:
          Logits, (n, h', w', 1), float32, with the sides of `logits_side`; large means real.
        """
        x = nn.leaky_relu(self._conv(0, self.width, stride=2)(image), 0.2)
        for i in range(1, self.num_layers + 1):
            stride = 2 if i < self.num_layers else 1
            width = self.width * min(2**i, 8)
            # No bias: the norm would subtract it.
            x = self._conv(3 * i - 1, width, stride, use_bias=False)(x)
            x = nn.leaky_relu(self._normalise(3 * i, x, train), 0.2)
        return self._conv(3 * self.num_layers + 2, 1, dtype=jnp.float32)(x)

    def _conv(
        self, index: int, width: int, stride: int = 1, use_bias: bool = True, dtype: Any = None
    ) -> nn.Conv:
        return nn.Conv(
            width,
            (4, 4),
            strides=(stride, stride),
            padding=1,
            use_bias=use_bias,
            dtype=dtype or self.dtype,
            kernel_init=nn.initializers.normal(0.02),
            name=f"main_{index}",
        )

    def _normalise(self, index: int, x: Array, train: bool) -> Array:
        name = f"main_{index}"
        if self.norm == "batch":
            return BatchNorm(self.axis_name, self.dtype, name=name)(x, train)
        if self.norm == "group":
            # 32 groups, or the largest power of two that divides the width.
            groups = math.gcd(32, x.shape[-1])
            return nn.GroupNorm(groups, epsilon=1e-6, dtype=self.dtype, name=name)(x)
        raise ValueError(f"norm must be 'batch' or 'group', got {self.norm!r}")
