"""The ResNet-50 that the classification accuracy score trains (He et al., 2016).

The stride is in the 3x3 convolution of a block (version 1.5). The last scale of each block is
initialised to 0 (Goyal et al., 2017). Layers are named as in torchvision, with `layer1_0/conv1` for
`layer1.0.conv1`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array

_EXPANSION = 4  # width of a block's last convolution relative to the others

_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class _Block(nn.Module):
    """A bottleneck block: 1x1, 3x3 with the stride and 1x1 convolutions beside a shortcut."""

    width: int
    stride: int
    conv: Any  # classes of convolution and normalisation, with shared arguments
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv, norm, out = self.conv, self.norm, self.width * _EXPANSION
        y = conv(self.width, (1, 1), name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(self.width, (3, 3), self.stride, padding=1, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y))
        y = conv(out, (1, 1), name="conv3")(y)
        y = norm(name="bn3", scale_init=nn.initializers.zeros)(y)
        if self.stride > 1 or x.shape[-1] != out:
            x = conv(out, (1, 1), self.stride, name="downsample_conv")(x)
            x = norm(name="downsample_bn")(x)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """Maps images to class logits."""

    num_classes: int
    dtype: Any = jnp.float32  # to compute in; parameters, statistics and logits are float32
    axis_name: str | None = None  # of pmap: training averages batch statistics over it
    # Blocks per stage; a stage halves the grid and doubles the width.
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64  # of the first convolution and the first stage

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Array:
        """Returns the logits, (n, num_classes), of images in [-1, 1], (n, h, w, c).

        With `train`, normalisation uses the statistics of the batch and updates `batch_stats`, a
        mutable collection. Without it, the stored statistics are used.
        """
        dtype, axis_name = self.dtype, self.axis_name
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=_he_normal, dtype=dtype)
        norm = functools.partial(
            nn.BatchNorm, not train, momentum=0.9, epsilon=1e-5, dtype=dtype, axis_name=axis_name
        )
        x = conv(self.width, (7, 7), 2, padding=3, name="conv1")(images)
        x = nn.relu(norm(name="bn1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, size in enumerate(self.stage_sizes):
            for i in range(size):
                width, stride = self.width * 2**stage, 2 if stage and not i else 1
                x = _Block(width, stride, conv, norm, name=f"layer{stage + 1}_{i}")(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="fc")(x)
