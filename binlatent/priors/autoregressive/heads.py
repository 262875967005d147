"""Heads: the distribution of a token's bits, given the transformer's output at that token.

A head splits a token's bits into G groups, which are drawn in order, and gives K numbers for each.

Dimensions: c bits of a token, g bits of a group, d width, m tokens of all images together.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from binlatent.priors.attention import dense, gelu
from binlatent.priors.transformer import layer_norm
from binlatent.runtime.errors import UserError

Array = jax.Array


class IndependentHead(nn.Module):
    """All bits of a token at once, as c independent Bernoullis: one group, one log-odds per bit."""

    num_bits: int
    dtype: Any = jnp.float32

    num_groups = 1

    @property
    def group_size(self) -> int:
        """g, the bits of a group."""
        return self.num_bits

    @nn.compact
    def __call__(self, hidden: Array, tokens: Array, groups: Array) -> Array:
        """Returns logits, float32 (m, 1, c); arguments as in `JointHead`."""
        del tokens, groups
        zeros = nn.initializers.zeros
        logits = nn.Dense(self.num_bits, dtype=jnp.float32, kernel_init=zeros, name="head")(hidden)
        return logits[:, None]

    def log_probs(self, logits: Array, tokens: Array) -> Array:
        """Returns log p(token | before) in nats: (..., 1, c), (..., c) -> (...)."""
        return -jnp.sum(optax.sigmoid_binary_cross_entropy(logits[..., 0, :], tokens), axis=-1)

    def draw(self, logits: Array, uniform: Array, group: Array) -> Array:
        """Draws the bits of a group: logits (m, c), uniforms (m, c) -> (m, c)."""
        del group
        return (uniform < jax.nn.sigmoid(logits)).astype(jnp.float32)

    def products(self, width: int) -> int:
        """Returns the number of multiplications in matrix products per token."""
        return width * self.num_bits


class JointHead(nn.Module):
    """The bits of a token in groups of g; each group is a softmax over its 2^g values.

    By the chain rule over the groups this can be any distribution of the token. The network is an
    MLP of the transformer's output and the bits of the groups before. All groups share it except
    for its last layer. If g does not divide c, the last group is smaller, and impossible values
    have probability 0.
    """

    num_bits: int
    group_size: int
    dtype: Any = jnp.float32

    @property
    def num_groups(self) -> int:
        """G, including a smaller last group."""
        return -(-self.num_bits // self.group_size)

    @nn.compact
    def __call__(self, hidden: Array, tokens: Array, groups: Array) -> Array:
        """Returns the logits of some groups of tokens.

        Args:
          hidden: float32 (m, d), the transformer's output.
          tokens: (m, c) in {0, 1}; a group sees only the bits of the groups before it.
          groups: int (k,), indices of the groups, from 0.

        Returns:
          float32, (m, k, 2^g). Zero at initialisation.
        """
        (m, d), k, dtype = hidden.shape, len(groups), self.dtype
        known = np.arange(self.num_bits)[None] // self.group_size < groups[:, None]
        signs = jnp.where(known[None], 2 * tokens[:, None] - 1, 0).reshape(m * k, -1)
        which = self.param("group_emb", nn.initializers.normal(0.02), (self.num_groups, d))
        x = hidden.astype(dtype)[:, None] + which[groups].astype(dtype)[None]
        x = x.reshape(m * k, d) + dense(d, use_bias=False, dtype=dtype, name="bit_emb")(signs)
        y = dense(2 * d, dtype=dtype, name="mlp_0")(layer_norm(dtype, "ln")(x))
        x = x + dense(d, dtype=dtype, name="mlp_2")(gelu(y))
        x = layer_norm(jnp.float32, "ln_f")(x).reshape(m, k, d)
        zeros, shape = nn.initializers.zeros, (self.num_groups, 2**self.group_size)
        weights = self.param("weights", zeros, (shape[0], d, shape[1]))[groups]
        bias = self.param("bias", zeros, shape)[groups]
        return jnp.einsum("mkd,kdv->mkv", x, weights) + bias[None]

    def log_probs(self, logits: Array, tokens: Array) -> Array:
        """Returns log p(token | before) in nats: (..., G, 2^g), (..., c) -> (...)."""
        size = self.num_groups * self.group_size
        padding = [(0, 0)] * (tokens.ndim - 1) + [(0, size - self.num_bits)]
        bits = jnp.pad(tokens, padding).reshape(*logits.shape[:-1], self.group_size)
        values = bits.astype(jnp.int32) @ (1 << np.arange(self.group_size, dtype=np.int32))
        log_probs = jax.nn.log_softmax(self._possible(logits, np.arange(self.num_groups)))
        return jnp.sum(jnp.take_along_axis(log_probs, values[..., None], axis=-1), axis=(-2, -1))

    def draw(self, logits: Array, uniform: Array, group: Array) -> Array:
        """Draws the bits of a group, each given the bits before, with one uniform per bit.

        Args:
          logits: (m, 2^g) of the group.
          uniform: (m, g) in [0, 1).
          group: scalar, index of the group; a smaller group ends with bits of 0.
        """
        probs = jax.nn.softmax(self._possible(logits[:, None], group[None])[:, 0])
        bits = []
        for i in range(self.group_size):  # the lowest bit of the value first
            halves = probs.reshape(len(probs), -1, 2)
            zero, one = (jnp.sum(halves[..., bit], axis=-1) for bit in (0, 1))
            bits.append(uniform[:, i] * (zero + one) < one)
            probs = jnp.where(bits[-1][:, None], halves[..., 1], halves[..., 0])
        return jnp.stack(bits, axis=-1).astype(jnp.float32)

    def _possible(self, logits: Array, groups: Array) -> Array:
        """Returns logits (..., k, 2^g), -inf for values that are impossible in a smaller group."""
        sizes = jnp.minimum(self.group_size, self.num_bits - self.group_size * jnp.asarray(groups))
        values = np.arange(2**self.group_size)
        possible = values[None] < (1 << sizes)[:, None]
        leading = (1,) * (logits.ndim - 2)
        return jnp.where(possible.reshape(*leading, *possible.shape), logits, -jnp.inf)

    def products(self, width: int) -> int:
        """Returns the number of multiplications in matrix products per token."""
        a_group = width * (self.num_bits + 4 * width + 2**self.group_size)
        return self.num_groups * a_group


def make_head(name: str, num_bits: int, group: int, dtype: Any) -> IndependentHead | JointHead:
    """Returns the head of a config; "joint" draws `group` bits at a time."""
    if name == "independent":
        return IndependentHead(num_bits, dtype)
    if name == "joint":
        return JointHead(num_bits, min(group, num_bits), dtype)
    raise UserError(
        f'config.prior.autoregressive.head must be "independent" or "joint", not {name!r}.'
    )
