"""The binary autoencoder's encoder and decoder (paper, Section 3; supplement B.1).

Dimensions: n batch, h w grid of the level at hand, d its width, c bits.

Levels are listed from the image inwards. Level i divides the resolution by `factors[i]` and then
applies residual blocks of width `widths[i]`, with self-attention where `attention[i]`. The first
factor is a space-to-depth of the image (1 for none), the others are strided convolutions, so the
downsampling is the product of the factors: (1, 2, 2, 2, 2) for the paper's 16, (7,) for 28x28
digits, where all convolutions then run on a 4x4 grid.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from binlatent.models import bottleneck

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


def _norm(dtype: Any) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, epsilon=1e-6, dtype=dtype)


def _conv(width: int, dtype: Any, kernel: int = 3) -> nn.Conv:
    return nn.Conv(width, (kernel, kernel), dtype=dtype)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: (n, h, w, ·) -> (n, h, w, width)."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = _conv(self.width, self.dtype)(nn.swish(_norm(self.dtype)(x)))
        y = _conv(self.width, self.dtype)(nn.swish(_norm(self.dtype)(y)))
        if x.shape[-1] != self.width:
            x = _conv(self.width, self.dtype, kernel=1)(x)
        return x + y


class AttentionBlock(nn.Module):
    """Self-attention of one head over the grid: (n, h, w, d) -> (n, h, w, d)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, h, w, d = x.shape
        qkv = nn.Dense(3 * d, dtype=self.dtype)(_norm(self.dtype)(x))
        q, k, v = jnp.split(qkv.reshape(n, h * w, 1, 3 * d), 3, axis=-1)
        y = jax.nn.dot_product_attention(q, k, v).reshape(n, h, w, d)
        return x + nn.Dense(d, dtype=self.dtype)(y)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where asked."""

    width: int
    num_blocks: int
    attention: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(self.num_blocks):
            x = ResidualBlock(self.width, self.dtype)(x)
            if self.attention:
                x = AttentionBlock(self.dtype)(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block, at the grid of the code."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ResidualBlock(self.width, self.dtype)(x)
        x = AttentionBlock(self.dtype)(x)
        return ResidualBlock(self.width, self.dtype)(x)


class Encoder(nn.Module):
    """Images to the logits of their Bernoulli codes.

    Fields: see the top of this file; `num_bits` is c.
    """

    num_bits: int
    widths: tuple[int, ...]
    factors: tuple[int, ...]
    attention: tuple[bool, ...]
    num_blocks: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """(n, h k, w k, channels) in [-1, 1] -> (n, h, w, c), float32 logits."""
        x = _conv(self.widths[0], self.dtype)(space_to_depth(image, self.factors[0]))
        x = Level(self.widths[0], self.num_blocks, self.attention[0], self.dtype)(x)
        for width, factor, attention in zip(
            self.widths[1:], self.factors[1:], self.attention[1:], strict=True
        ):
            # One more row and column after the last, none before the first: the output is
            # exactly 1/factor of the input, as in VQGAN.
            x = nn.Conv(
                x.shape[-1],
                (factor + 1, factor + 1),
                strides=(factor, factor),
                padding=((0, 1), (0, 1)),
                dtype=self.dtype,
            )(x)
            x = Level(width, self.num_blocks, attention, self.dtype)(x)
        x = Middle(self.widths[-1], self.dtype)(x)
        x = nn.swish(_norm(self.dtype)(x))
        return _conv(self.num_bits, jnp.float32)(x)


class Decoder(nn.Module):
    """Codes to images; the encoder's levels from the inside out.

    Fields: see the top of this file; `num_channels` of the image.
    """

    num_channels: int
    widths: tuple[int, ...]
    factors: tuple[int, ...]
    attention: tuple[bool, ...]
    num_blocks: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, code: Array) -> Array:
        """(n, h, w, c) in [0, 1] -> (n, h k, w k, channels), float32, about [-1, 1]."""
        x = _conv(self.widths[-1], self.dtype)(code)
        x = Middle(self.widths[-1], self.dtype)(x)
        for i in reversed(range(len(self.widths))):
            x = Level(self.widths[i], self.num_blocks, self.attention[i], self.dtype)(x)
            if i > 0:
                factor = self.factors[i]
                x = jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)
                x = _conv(x.shape[-1], self.dtype)(x)
        x = nn.swish(_norm(self.dtype)(x))
        x = _conv(self.factors[0] ** 2 * self.num_channels, jnp.float32)(x)
        return depth_to_space(x, self.factors[0])


class Autoencoder(nn.Module):
    """Encoder and decoder in one tree of parameters, {"encoder": …, "decoder": …}."""

    encoder: Encoder
    decoder: Decoder

    def encode(self, image: Array) -> Array:
        """Returns y = sigmoid(logits), float32, (n, h, w, c) (paper, Section 3)."""
        return jax.nn.sigmoid(self.encoder(image))

    def decode(self, code: Array) -> Array:
        """Returns the image of a code, float32, about [-1, 1]."""
        return self.decoder(code)

    def __call__(self, image: Array, uniform: Array | None = None) -> tuple[Array, Array]:
        """Returns (reconstruction, y); without noise the code is the deterministic one."""
        probs = self.encode(image)
        mode = "deterministic" if uniform is None else "sample"
        return self.decode(bottleneck.binarize(probs, mode, uniform)), probs
