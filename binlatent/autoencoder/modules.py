"""The encoder and decoder of the binary autoencoder (paper, Section 3; supplement B.1).

They are those of VQGAN (Esser et al., 2021), as the authors of the paper released them. Both are
lists of blocks, numbered as in the released weights, so that no table of names is needed.

Dimensions: n batch, h w grid of a level, d its width, e embedding width, c bits per token, k
downsampling: patch * 2^(levels - 1).

Level i has residual blocks of width base_width * multipliers[i]. Attention follows each block if
the side of the level's grid is one of `attention_resolutions`. The side halves between levels.
Before the first level, patches of `patch` x `patch` pixels become channels (1 for none). This is
not in the paper; with it, all convolutions for a 28x28 digit run on a 4x4 grid.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from binlatent.autoencoder import bottleneck

Array = jax.Array


def space_to_depth(x: Array, factor: int) -> Array:
    """Moves factor x factor pixels into channels: (n, h f, w f, d) -> (n, h, w, f f d)."""
    n, h, w, d = x.shape
    x = x.reshape(n, h // factor, factor, w // factor, factor, d)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, h // factor, w // factor, factor**2 * d)


def depth_to_space(x: Array, factor: int) -> Array:
    """Inverts `space_to_depth`: (n, h, w, f f d) -> (n, h f, w f, d)."""
    n, h, w, d = x.shape
    x = x.reshape(n, h, w, factor, factor, d // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, h * factor, w * factor, d // factor**2)


def _norm(dtype: Any, name: str | None = None) -> nn.GroupNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits: an error of 1e-5 in the image.
    return nn.GroupNorm(
        num_groups=32, epsilon=1e-6, dtype=dtype, name=name, use_fast_variance=False
    )


def _conv(width: int, dtype: Any, name: str | None = None, kernel: int = 3) -> nn.Conv:
    return nn.Conv(width, (kernel, kernel), dtype=dtype, name=name)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions with a shortcut: (n, h, w, ·) -> (n, h, w, width)."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = _conv(self.width, self.dtype, "conv1")(nn.swish(_norm(self.dtype, "norm1")(x)))
        y = _conv(self.width, self.dtype, "conv2")(nn.swish(_norm(self.dtype, "norm2")(y)))
        if x.shape[-1] != self.width:
            x = _conv(self.width, self.dtype, "conv_out", kernel=1)(x)
        return x + y


class AttentionBlock(nn.Module):
    """Self-attention with one head over the grid: (n, h, w, d) -> (n, h, w, d)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, h, w, d = x.shape
        y = _norm(self.dtype, "norm")(x).reshape(n, h * w, 1, d)
        q, k, v = (nn.Dense(d, dtype=self.dtype, name=name)(y) for name in "qkv")
        y = jax.nn.dot_product_attention(q, k, v).reshape(n, h, w, d)
        return x + nn.Dense(d, dtype=self.dtype, name="proj_out")(y)


class Downsample(nn.Module):
    """A convolution of stride 2: (n, 2 h, 2 w, d) -> (n, h, w, d)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # Padded after the last row and column only, as in VQGAN, so that the side halves exactly.
        padding = ((0, 1), (0, 1))
        conv = nn.Conv(
            x.shape[-1], (3, 3), strides=(2, 2), padding=padding, dtype=self.dtype, name="conv"
        )
        return conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a convolution: (n, h, w, d) -> (n, 2 h, 2 w, d)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return _conv(x.shape[-1], self.dtype, "conv")(x)


@dataclasses.dataclass(frozen=True)
class Levels:
    """The options that encoder and decoder share: see the module's docstring.

    Attributes:
      remat: whether to recompute a block's activations for the gradient: less memory, about a third
        more time.
    """

    base_width: int
    multipliers: tuple[int, ...]
    attention_resolutions: tuple[int, ...] = ()
    patch: int = 1
    remat: bool = False
    dtype: Any = jnp.float32

    def width(self, level: int) -> int:
        """Returns the width of a level's blocks."""
        return self.base_width * self.multipliers[level]

    def block(self, module: type[nn.Module]) -> type[nn.Module]:
        """Returns a block's class, with rematerialisation if `remat`."""
        return nn.remat(module) if self.remat else module

    def apply(self, level: int, x: Array, num_blocks: int, names: Iterator[str]) -> Array:
        """Applies the residual blocks of a level, with attention at `attention_resolutions`."""
        for _ in range(num_blocks):
            x = self.block(ResidualBlock)(self.width(level), self.dtype, name=next(names))(x)
            if x.shape[1] in self.attention_resolutions:
                x = self.block(AttentionBlock)(self.dtype, name=next(names))(x)
        return x

    def apply_middle(self, x: Array, names: Iterator[str]) -> Array:
        """Applies a residual block, attention and a residual block, at the grid of the code."""
        x = self.block(ResidualBlock)(self.width(-1), self.dtype, name=next(names))(x)
        x = self.block(AttentionBlock)(self.dtype, name=next(names))(x)
        return self.block(ResidualBlock)(self.width(-1), self.dtype, name=next(names))(x)


def _names() -> Iterator[str]:
    return (f"blocks_{i}" for i in itertools.count())


class Encoder(nn.Module):
    """Images to features.

    Fields:
      num_blocks: residual blocks per level.
      embedding_width: e.
    """

    levels: Levels
    num_blocks: int
    embedding_width: int

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """(n, h k, w k, channels) in [-1, 1] -> (n, h, w, e), float32."""
        levels, dtype, names = self.levels, self.levels.dtype, _names()
        x = space_to_depth(image, levels.patch)
        x = _conv(levels.base_width, dtype, next(names))(x)
        for level in range(len(levels.multipliers)):
            if level > 0:
                x = Downsample(dtype, name=next(names))(x)
            x = levels.apply(level, x, self.num_blocks, names)
        x = levels.apply_middle(x, names)
        x = _norm(dtype, next(names))(x)
        return _conv(self.embedding_width, jnp.float32, next(names))(x)


class Decoder(nn.Module):
    """Features to images; the encoder's levels in reverse order.

    Fields:
      num_blocks: residual blocks per level.
      num_channels: of the image.
      refine_width: channels of two final convolutions on the grid of pixels; 0 for none. Without
        them, each pixel of a patch has its own kernel, which shows as a pattern on plain areas.
      norm_first: whether to normalise the features first, as in the released weights.
    """

    levels: Levels
    num_blocks: int
    num_channels: int
    refine_width: int = 0
    norm_first: bool = False

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """(n, h, w, e) -> (n, h k, w k, channels), float32, about [-1, 1]."""
        levels, dtype, names = self.levels, self.levels.dtype, _names()
        x = _norm(dtype, next(names))(features) if self.norm_first else features
        x = _conv(levels.width(-1), dtype, next(names))(x)
        x = levels.apply_middle(x, names)
        for level in reversed(range(len(levels.multipliers))):
            x = levels.apply(level, x, self.num_blocks, names)
            if level > 0:
                x = Upsample(dtype, name=next(names))(x)
        x = _norm(dtype, next(names))(x)
        if not self.refine_width:
            x = _conv(levels.patch**2 * self.num_channels, jnp.float32, next(names))(x)
            return depth_to_space(x, levels.patch)
        x = _conv(levels.patch**2 * self.refine_width, dtype, next(names))(x)
        x = nn.swish(depth_to_space(x, levels.patch))
        x = nn.swish(_conv(self.refine_width, dtype, next(names))(x))
        return _conv(self.num_channels, jnp.float32, next(names))(x)


def last_kernel(params: Any) -> Array:
    """Returns the kernel of the decoder's last convolution from an autoencoder's variables."""
    blocks = params["params"]["decoder"]
    return blocks[f"blocks_{len(blocks) - 1}"]["kernel"]


class Autoencoder(nn.Module):
    """Encoder, bottleneck and decoder in one tree of parameters.

    Fields:
      bottleneck: see `binlatent.autoencoder.bottleneck`.
    """

    encoder: Encoder
    bottleneck: bottleneck.Bottleneck
    decoder: Decoder

    def encode(self, image: Array, uniform: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Returns the code and the bottleneck's auxiliary outputs.

        Args:
          image: (n, h k, w k, channels) in [-1, 1].
          uniform: noise in [0, 1) of the code's shape; without it the code is deterministic.
        """
        return self.bottleneck.encode(self.encoder(image), uniform)

    def probs(self, image: Array) -> Array:
        """Returns the probability that each bit of an image's code is 1, (n, h, w, c).

        That is y, or the bit itself if the bottleneck never draws bits. For `Binary` only.
        """
        code, aux = self.encode(image)
        return code if self.bottleneck.deterministic else aux["probs"]

    def decode(self, code: Array) -> Array:
        """Returns the image of a code, float32, about [-1, 1]."""
        return self.decoder(self.bottleneck.features(code))

    def __call__(
        self, image: Array, uniform: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the reconstruction and the auxiliary outputs; arguments as in `encode`."""
        code, aux = self.encode(image, uniform)
        return self.decode(code), aux
