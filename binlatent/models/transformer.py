"""The prior's network: a plain transformer over the tokens of a code (paper, 5.1; supplement B.1).

Dimensions: n batch, h w latent grid, l = h w tokens, c bits, d width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Array = jax.Array


def sine_features(x: Array, num_features: int, max_period: float = 10_000.0) -> Array:
    """Returns sines and cosines of x at geometric frequencies: (m,) -> (m, num_features)."""
    frequencies = max_period ** -jnp.linspace(0.0, 1.0, num_features // 2, endpoint=False)
    angles = x[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def sine_positions_2d(height: int, width: int, num_features: int) -> Array:
    """Returns 2-D sine position features of a grid in row-major order: (l, num_features).

    The first half of the features encodes the row, the second the column.
    """
    rows, columns = np.divmod(np.arange(height * width), width)
    return jnp.concatenate(
        [sine_features(jnp.asarray(axis), num_features // 2) for axis in (rows, columns)], axis=-1
    )


class Block(nn.Module):
    """Pre-norm self-attention and MLP.

    Tokens come as rows, (n tokens, d): XLA's CPU backend is slower on matrix products of three
    dimensions. Elsewhere it is all the same.
    """

    num_heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, n: int) -> Array:
        """Maps (n tokens, d) to the same shape; attention is within each of the n images."""
        d = x.shape[-1]
        qkv = nn.Dense(3 * d, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        qkv = qkv.reshape(n, -1, 3 * self.num_heads, d // self.num_heads)
        y = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=2)).reshape(-1, d)
        x = x + nn.Dense(d, dtype=self.dtype)(y)
        y = nn.Dense(4 * d, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return x + nn.Dense(d, dtype=self.dtype)(nn.gelu(y))


class Transformer(nn.Module):
    """Predicts, a bit, the log-odds that the noise flipped it.

    Fields:
      width: d, a multiple of 4 and of num_heads.
      num_layers, num_heads: of the blocks.
      num_classes: 0 for no class token.
    """

    width: int
    num_layers: int
    num_heads: int
    num_classes: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z_t: Array, time: Array, label: Array | None = None) -> Array:
        """Applies the network.

        Args:
          z_t: (n, h, w, c) in {0, 1}.
          time: (n,), t / T in (0, 1], T being that of training whatever the sampler visits.
          label: (n,) int in 0..num_classes, where num_classes means unlabelled; ignored without
            classes.

        Returns:
          (n, h, w, c), float32. Zero at initialisation.
        """
        n, h, w, c = z_t.shape
        x = nn.Dense(self.width, dtype=self.dtype)(2 * z_t.reshape(n, h * w, c) - 1)
        positions = self.param("positions", lambda _: sine_positions_2d(h, w, self.width))
        x = x + positions.astype(self.dtype)[None]

        # Times in thousandths, so that the fastest sine tells neighbouring times apart.
        time_token = nn.Dense(self.width, dtype=self.dtype)(sine_features(1000 * time, self.width))
        time_token = nn.Dense(self.width, dtype=self.dtype)(nn.swish(time_token))
        tokens = [x, time_token[:, None]]
        if self.num_classes:
            embed = nn.Embed(self.num_classes + 1, self.width, dtype=self.dtype)
            tokens.append(embed(label)[:, None])
        x = jnp.concatenate(tokens, axis=1).reshape(-1, self.width)

        for _ in range(self.num_layers):
            x = Block(self.num_heads, self.dtype)(x, n)
        x = x.reshape(n, -1, self.width)[:, : h * w].reshape(n * h * w, self.width)
        x = nn.LayerNorm(dtype=jnp.float32)(x)
        # Zero: with the evidence form the untrained network is then right about every bit's own
        # evidence, and otherwise says "one half".
        x = nn.Dense(c, dtype=jnp.float32, kernel_init=nn.initializers.zeros)(x)
        return x.reshape(n, h, w, c)
