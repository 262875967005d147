"""The prior's network: a plain transformer over the tokens of a code (paper, 5.1; supplement B.1).

It is the network of the authors' released weights. Its parameters have the same names, so that the
weights load without a table of names.

Dimensions: n batch, h w latent grid, l = h w tokens, c bits, d width, m tokens of a text, e width
of a text's features.

The condition is one of `conditions.CONDITIONS`. A class or the vector of a text becomes an
additional token. The tokens of a text are used by cross-attention in every block. An image without
a label has no additional token, or attends to a learned token instead of the text.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from binlatent.priors.attention import HeadNorm, attend, dense, gelu, rotate
from binlatent.priors.conditions import count_tokens, given_labels

Array = jax.Array


def sine_features(x: Array, frequencies: np.ndarray) -> Array:
    """Returns sines and cosines of x at f frequencies: (m,) -> (m, 2 f)."""
    angles = x[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def time_features(time: Array, num_features: int) -> Array:
    """Returns the features of times, (t - 1) / T: (n,) -> (n, num_features)."""
    # All in float32, as in the authors' code: after 4,000 periods, rounding of frequencies matters.
    steps = np.arange(num_features // 2, dtype=np.float32)
    exponents = steps * np.float32(-np.log(10_000) / (num_features // 2 - 1))
    return sine_features(4000 * time, np.exp(exponents))


def sine_positions_2d(height: int, width: int, num_features: int) -> Array:
    """Returns 2-D sine position features of a grid in row-major order: (l, num_features).

    The first half of the features encodes the column, the second the row.
    """
    rows, columns = np.divmod(np.arange(height * width), width)
    half = num_features // 2
    frequencies = 10_000.0 ** -np.linspace(0.0, 1.0, half // 2, endpoint=False)
    return jnp.concatenate(
        [sine_features(jnp.asarray(axis), frequencies) for axis in (columns, rows)], axis=-1
    )


def layer_norm(dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """Returns a layer norm with PyTorch's epsilon; `name` is the name of the Flax module."""
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


def rounded(params: Any, dtype: Any) -> Any:
    """Returns a network's parameters with the large matrices in `dtype`, in which they are used.

    The output is the same. A program that applies the network in a loop then rounds the matrices
    once and reads half as much in each iteration; XLA would keep the rounding in the loop. The
    layer `head` stays in float32.
    """

    def of_leaf(path: Any, x: Array) -> Array:
        *_, layer, name = (entry.key for entry in path)
        in_float32 = name not in ("kernel", "embedding") or layer == "head"
        return x if in_float32 else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


class TimeEmbedding(nn.Module):
    """Maps times to tokens: (n,) -> (n, width)."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, time: Array) -> Array:
        x = nn.Dense(self.width, dtype=self.dtype, name="l0")(time_features(time, self.width))
        return nn.Dense(self.width, dtype=self.dtype, name="linear")(nn.swish(x))


class SelfAttention(nn.Module):
    """Self-attention within each of n images: rows (n tokens, d) to the same shape.

    With `qk_norm`, queries and keys have an RMS norm.

    With a collection `cache` of `keys` and `values`, (n, l, d) each, the input is one token per
    image, at the place num_keys - 1. Its key and value are stored in the cache, and it attends to
    the first num_keys places.
    """

    num_heads: int
    dtype: Any = jnp.float32
    causal: bool = False
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self, x: Array, n: int, num_keys: Array | None, angles: np.ndarray | None = None
    ) -> Array:
        """Attends to the first num_keys tokens, int (n,), None for all; if causal, to earlier ones.

        If angles of the tokens are given, queries and keys are rotated; see `attention.rotate`.
        """
        d = x.shape[-1]
        qkv = dense(3 * d, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        if self.qk_norm:
            q = HeadNorm(self.num_heads, name="q_norm")(q)
            k = HeadNorm(self.num_heads, name="k_norm")(k)
        if angles is not None:
            q, k = (rotate(y, angles, self.num_heads) for y in (q, k))
        one = self.has_variable("cache", "keys")
        if one:
            k, v = (self._kept(*pair, num_keys) for pair in (("keys", k), ("values", v)))
        y = attend(q, k, v, n, self.num_heads, num_keys, self.causal and not one)
        return dense(d, dtype=self.dtype, name="proj")(y)

    def _kept(self, name: str, y: Array, num_keys: Array) -> Array:
        """Stores rows (n, d) in the cache; returns the whole cache as rows (n l, d)."""
        kept = self.get_variable("cache", name)
        kept = jax.lax.dynamic_update_slice(kept, y[:, None], (0, num_keys[0] - 1, 0))
        self.put_variable("cache", name, kept)
        return kept.reshape(-1, y.shape[-1])


class CrossAttention(nn.Module):
    """Cross-attention of each of n images to its text: rows (n tokens, d) to the same shape.

    Without a text, images attend to a learned token. If the collection `cache` is mutable, the keys
    and values of the text are stored there; if they are stored, they are not computed again. With
    `qk_norm`, queries and keys have an RMS norm.
    """

    num_heads: int
    text_width: int
    dtype: Any = jnp.float32
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x: Array, n: int, text: Array | None, text_tokens: Array | None) -> Array:
        """Attends to the first text_tokens, int (n,), of each text (n, m, e); 0 without a text."""
        d = x.shape[-1]
        q = dense(d, dtype=self.dtype, name="query")(x)
        if self.qk_norm:
            q = HeadNorm(self.num_heads, name="q_norm")(q)
        if self.has_variable("cache", "kv"):
            kv = self.get_variable("cache", "kv")
        else:
            kv = self._keys_and_values(n, d, text, text_tokens)
        if self.is_mutable_collection("cache") and not self.is_initializing():
            self.put_variable("cache", "kv", kv)
        num_keys = None if text is None else jnp.maximum(text_tokens, 1)
        y = attend(q, *jnp.split(kv, 2, axis=-1), n, self.num_heads, num_keys)
        return dense(d, dtype=self.dtype, name="proj")(y)

    def _keys_and_values(
        self, n: int, d: int, text: Array | None, text_tokens: Array | None
    ) -> Array:
        """Returns keys and values of the text, rows (n m, 2 d)."""
        null = self.param("null_emb", nn.initializers.normal(0.01), (1, self.text_width))
        if text is None:
            text = jnp.broadcast_to(null, (n, 1, self.text_width))
        else:
            text = jnp.where(text_tokens[:, None, None] > 0, text, null[None])
        kv = dense(2 * d, dtype=self.dtype, name="kv")(text.reshape(-1, self.text_width))
        if not self.qk_norm:
            return kv
        k, v = jnp.split(kv, 2, axis=-1)
        return jnp.concatenate([HeadNorm(self.num_heads, name="k_norm")(k), v], axis=-1)


class Block(nn.Module):
    """Pre-norm self-attention, cross-attention if `text_width` is set, and MLP, scaled by vectors.

    Tokens are rows, (n tokens, d), because XLA's CPU backend is slower on matrix products of three
    dimensions. On other devices it makes no difference.
    """

    num_heads: int
    text_width: int = 0
    dtype: Any = jnp.float32
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        n: int,
        num_keys: Array | None,
        text: Array | None,
        text_tokens: Array | None,
    ) -> Array:
        """Maps (n tokens, d) to the same shape; other arguments are those of the attentions."""
        d, dtype = x.shape[-1], self.dtype

        def scaled(name: str, y: Array) -> Array:
            gamma = self.param(name, nn.initializers.ones, (d,))
            return gamma.astype(dtype)[None] * y

        attention = SelfAttention(self.num_heads, dtype, self.causal, name="attn")
        x = x + scaled("gamma_1", attention(layer_norm(dtype, "ln1")(x), n, num_keys))
        if self.text_width:
            attention = CrossAttention(self.num_heads, self.text_width, dtype, name="cross")
            y = attention(layer_norm(dtype, "ln1_5")(x), n, text, text_tokens)
            x = x + scaled("gamma_1_5", y)
        y = dense(4 * d, dtype=dtype, name="mlp_0")(layer_norm(dtype, "ln2")(x))
        y = dense(d, dtype=dtype, name="mlp_2")(gelu(y))
        return x + scaled("gamma_2", y)


class Transformer(nn.Module):
    """Predicts for each bit the log-odds that the noise flipped it.

    Fields:
      width: d, a multiple of 4 and of num_heads.
      num_layers, num_heads: of the blocks.
      condition: a key of `conditions.CONDITIONS`, or "none".
      num_classes: for the condition "class".
      text_width: e, for a condition on texts.
    """

    width: int
    num_layers: int
    num_heads: int
    condition: str = "none"
    num_classes: int = 0
    text_width: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, z_t: Array, time: Array, label: Array | None = None, given: Array | None = None
    ) -> Array:
        """Applies the network.

        Args:
          z_t: (n, h, w, c) in {0, 1}.
          time: (n,), (t - 1) / T in (-1 / T, 1), where T is that of training.
          label: int (n,) in 0..num_classes - 1 for a class, (n, e) or (n, m, e) for a text, with
            zeros as in `conditions.Condition`; None if no image has one. Ignored without a
            condition.
          given: bool (n,), which images have a label; None for all.

        Returns:
          (n, h, w, c), float32. Zero at initialisation.
        """
        n, h, w, c = z_t.shape
        tok_emb = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="tok_emb")
        x = tok_emb(2 * z_t.reshape(-1, c) - 1).reshape(n, h * w, self.width)
        positions = self.param("pos_emb", lambda _: sine_positions_2d(h, w, self.width))
        x = x + positions.astype(self.dtype)[None]
        time_token = TimeEmbedding(self.width, self.dtype, name="time_step_embedding")(time)
        tokens = [x, time_token[:, None]]
        text = label if self.condition == "text_cross" else None
        text_tokens = None if text is None else count_tokens(text, given)
        num_keys = None
        if self.condition in ("class", "text_token") and label is not None:
            tokens.append(self._embed_label(label)[:, None])
            given = given_labels(label, given)
            if given is not None:
                num_keys = h * w + 1 + given.astype(jnp.int32)
        x = jnp.concatenate(tokens, axis=1).reshape(-1, self.width)

        text_width = self.text_width if self.condition == "text_cross" else 0
        for i in range(self.num_layers):
            block = Block(self.num_heads, text_width, self.dtype, name=f"blocks_{i}")
            x = block(x, n, num_keys, text, text_tokens)
        x = x.reshape(n, -1, self.width)[:, : h * w].reshape(n * h * w, self.width)
        x = layer_norm(jnp.float32, "ln_f")(x)
        # Zero: the untrained network then predicts a probability of 1/2 or, with `evidence`, the
        # flip probability b_t of a bit alone.
        x = nn.Dense(c, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name="head")(x)
        return x.reshape(n, h, w, c)

    def round_weights(self, params: Any) -> Any:
        """See `rounded`."""
        return rounded(params, self.dtype)

    def _embed_label(self, label: Array) -> Array:
        """(n,) int or (n, e) -> (n, d)."""
        if self.condition == "class":
            embed = nn.Embed(self.num_classes, self.width, dtype=self.dtype, name="cls_embedding")
            return embed(label)
        return nn.Dense(self.width, dtype=self.dtype, name="cls_embedding")(label)
