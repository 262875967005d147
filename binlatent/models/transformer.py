"""The prior's network: a plain transformer over the tokens of a code (paper, 5.1; supplement B.1).

It is the network of the authors' released weights, named as they are, so that these load without a
table of names.

Dimensions: n batch, h w latent grid, l = h w tokens, c bits, d width, m tokens of a text, e width
of a text's features.

A condition is one of `CONDITIONS`: a class or a text vector becomes a token that is appended to the
others; the tokens of a text are attended to in every block. Without its label an image has no such
token, or attends to a learned one in place of the text's.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Array = jax.Array

CONDITIONS = ("class", "text_token", "text_cross")


def sine_features(x: Array, frequencies: np.ndarray) -> Array:
    """Returns sines and cosines of x at f frequencies: (m,) -> (m, 2 f)."""
    angles = x[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def time_features(time: Array, num_features: int) -> Array:
    """Returns the features of times, (t - 1) / T: (n,) -> (n, num_features)."""
    # In float32 all along, as the authors: at 4,000 periods the last digit of a frequency counts.
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


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


class TimeEmbedding(nn.Module):
    """Times to tokens: (n,) -> (n, width)."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, time: Array) -> Array:
        x = nn.Dense(self.width, dtype=self.dtype, name="l0")(time_features(time, self.width))
        return nn.Dense(self.width, dtype=self.dtype, name="linear")(nn.swish(x))


def _attend(
    q: Array, k: Array, v: Array, n: int, num_heads: int, num_keys: Array | None, cudnn: bool
) -> Array:
    """Returns rows (n tokens, d) of attention, to the first num_keys, int (n,), None for all."""
    heads = (n, -1, num_heads, q.shape[-1] // num_heads)
    q, k, v = (y.reshape(heads) for y in (q, k, v))
    y = _attend_by_heads(q, k, v, num_keys, cudnn and _cudnn_attends(k))
    return y.reshape(-1, heads[2] * heads[3])


# Compiled with what calls it, but traced once for all blocks: it takes longer than the rest of one.
@functools.partial(jax.jit, static_argnames="cudnn")
def _attend_by_heads(q: Array, k: Array, v: Array, num_keys: Array | None, cudnn: bool) -> Array:
    def attend(*qkv: Array) -> Array:
        if cudnn:
            return _attend_by_cudnn(*qkv, num_keys)
        return jax.nn.dot_product_attention(*qkv, key_value_seq_lengths=num_keys)

    def attend_on_cpu(*qkv: Array) -> Array:
        mask = None
        if num_keys is not None:
            mask = (jnp.arange(k.shape[1])[None] < num_keys[:, None])[:, None, None]
        # A head or a few at a time: their weights fit into the caches, and parts go side by side.
        # With few tokens there is less to win, and each part takes time to start.
        num_parts = math.gcd(k.shape[2], 8 if k.shape[1] >= 128 else 4)
        parts = zip(*(jnp.split(y, num_parts, axis=2) for y in qkv), strict=True)
        return jnp.concatenate([_attend_on_cpu(*part, mask=mask) for part in parts], axis=2)

    return jax.lax.platform_dependent(q, k, v, cpu=attend_on_cpu, default=attend)


def _cudnn_attends(k: Array) -> bool:
    """Tells whether cuDNN shall attend to keys (n, keys, heads, width of a head).

    It never writes a head's l x l weights to memory, which is half of all that a training step
    moves with XLA's attention, and more with many tokens. It wants one of NVIDIA's GPUs since
    Ampere, numbers of 16 bits and narrow heads; to few keys there is nothing to win.
    """
    if jax.default_backend() != "gpu" or k.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    major = str(jax.local_devices()[0].compute_capability).split(".")[0]
    if not major.isdigit() or int(major) < 8:  # AMD's are named otherwise
        return False
    return k.shape[1] >= 64 and k.shape[-1] % 8 == 0 and k.shape[-1] <= 128


def _attend_by_cudnn(q: Array, k: Array, v: Array, num_keys: Array | None) -> Array:
    """As `jax.nn.dot_product_attention`, with even numbers of tokens.

    JAX 0.10 refuses odd ones where a gradient follows. Nothing here knows whether one does, so
    that sampling pads too.
    """
    queries, keys = q.shape[1], k.shape[1]
    # Lengths that come from the batch: others JAX cannot vmap, and may deal out wrongly.
    zeros = 0 * k[:, 0, 0, 0].astype(jnp.int32)
    q, k, v = (jnp.pad(y, ((0, 0), (0, y.shape[1] % 2), (0, 0), (0, 0))) for y in (q, k, v))
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=zeros + q.shape[1],
        key_value_seq_lengths=zeros + (keys if num_keys is None else num_keys),
        implementation="cudnn",
    )
    return y[:, :queries]


def _attend_on_cpu(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """As `jax.nn.dot_product_attention`, whose forward pass takes XLA twice as long on CPUs.

    Here the heads come before the tokens in all products, as they have to; the sum of the weights
    divides what they average, l numbers a head and not l^2; and rows are summed by a product and
    compared by halves: XLA's own reductions along them are not vectorised. Sums are in float32.
    """
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    dtype = v.dtype
    q, k, v = (y.swapaxes(1, 2) for y in (q * np.float32(q.shape[-1] ** -0.5), k, v))
    scores = product(q, k.swapaxes(2, 3))
    if mask is not None:
        scores = jnp.where(mask, scores, np.finfo(np.float32).min)
    weights = jnp.exp(scores - _largest(jax.lax.stop_gradient(scores))).astype(dtype)
    keys = weights.shape[-1]
    total = product(weights.reshape(-1, keys), jnp.ones(keys, dtype))
    y = product(weights, v) / total.reshape(*weights.shape[:-1], 1)
    return y.astype(dtype).swapaxes(1, 2)


def _largest(x: Array) -> Array:
    """Returns the largest of the last axis, which stays, as 1."""
    while x.shape[-1] > 8:
        half = -(-x.shape[-1] // 2)
        x = jnp.maximum(x[..., :half], x[..., -half:])
    return x.max(-1, keepdims=True)


@jax.checkpoint  # training keeps x alone, not the three arrays between
def _gelu(x: Array) -> Array:
    """The exact GELU as PyTorch has it, by erf in float32: erfc, JAX's choice, costs twice that."""
    y = x.astype(jnp.float32)
    return (y * (0.5 + 0.5 * jax.lax.erf(y * np.float32(0.5**0.5)))).astype(x.dtype)


def _dot_general(x: Array, kernel: Array, dimensions: Any, precision: Any) -> Array:
    """As `jax.lax.dot_general`, on CPUs with sums in float32.

    Numbers of 16 bits then go to the processor's own products of these, if it has them: XLA's
    kernels do not round the sums. The products of the gradient are of float32.
    """
    product = functools.partial(
        jax.lax.dot_general, dimension_numbers=dimensions, precision=precision
    )

    def with_float32_sums(x: Array, kernel: Array) -> Array:
        return product(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)

    if x.dtype == jnp.float32:  # no other product anywhere, and soon traced
        return product(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=with_float32_sums, default=product)


_dense = functools.partial(nn.Dense, dot_general=_dot_general)


class SelfAttention(nn.Module):
    """Attention within each of n images: rows (n tokens, d) to the same shape."""

    num_heads: int
    dtype: Any = jnp.float32
    cudnn: bool = True

    @nn.compact
    def __call__(self, x: Array, n: int, num_keys: Array | None) -> Array:
        """To the first num_keys tokens, int (n,); None for all."""
        d = x.shape[-1]
        qkv = _dense(3 * d, dtype=self.dtype, name="qkv")(x)
        y = _attend(*jnp.split(qkv, 3, axis=-1), n, self.num_heads, num_keys, self.cudnn)
        return _dense(d, dtype=self.dtype, name="proj")(y)


class CrossAttention(nn.Module):
    """Attention of each of n images to its text: rows (n tokens, d) to the same shape."""

    num_heads: int
    text_width: int
    dtype: Any = jnp.float32
    cudnn: bool = True

    @nn.compact
    def __call__(self, x: Array, n: int, text: Array | None, given: Array | None) -> Array:
        """The text is (n, m, e); where it is not given, bool (n,), a learned token is in place."""
        d = x.shape[-1]
        null = self.param("null_emb", nn.initializers.normal(0.01), (1, self.text_width))
        if text is None:
            text = jnp.broadcast_to(null, (n, 1, self.text_width))
        elif given is not None:  # m times the same token is as good as one
            text = jnp.where(given[:, None, None], text, null[None])
        q = _dense(d, dtype=self.dtype, name="query")(x)
        kv = _dense(2 * d, dtype=self.dtype, name="kv")(text.reshape(-1, self.text_width))
        y = _attend(q, *jnp.split(kv, 2, axis=-1), n, self.num_heads, None, self.cudnn)
        return _dense(d, dtype=self.dtype, name="proj")(y)


class Block(nn.Module):
    """Pre-norm attention, also to a text if it has a width, and MLP, each scaled by a vector.

    Tokens come as rows, (n tokens, d): XLA's CPU backend is slower on matrix products of three
    dimensions. Elsewhere it is all the same.
    """

    num_heads: int
    text_width: int = 0
    dtype: Any = jnp.float32
    cudnn: bool = True

    @nn.compact
    def __call__(
        self, x: Array, n: int, num_keys: Array | None, text: Array | None, given: Array | None
    ) -> Array:
        """Maps (n tokens, d) to the same shape; the others as of the two kinds of attention."""
        d, dtype = x.shape[-1], self.dtype

        def scaled(name: str, y: Array) -> Array:
            gamma = self.param(name, nn.initializers.ones, (d,))
            return gamma.astype(dtype)[None] * y

        attention = SelfAttention(self.num_heads, dtype, self.cudnn, name="attn")
        x = x + scaled("gamma_1", attention(_norm(dtype, "ln1")(x), n, num_keys))
        if self.text_width:
            attention = CrossAttention(
                self.num_heads, self.text_width, dtype, self.cudnn, name="cross"
            )
            x = x + scaled("gamma_1_5", attention(_norm(dtype, "ln1_5")(x), n, text, given))
        y = _dense(4 * d, dtype=dtype, name="mlp_0")(_norm(dtype, "ln2")(x))
        y = _dense(d, dtype=dtype, name="mlp_2")(_gelu(y))
        return x + scaled("gamma_2", y)


class Transformer(nn.Module):
    """Predicts, a bit, the log-odds that the noise flipped it.

    Fields:
      width: d, a multiple of 4 and of num_heads.
      num_layers, num_heads: of the blocks.
      condition: of `CONDITIONS`, or "none".
      num_classes: of the condition "class".
      text_width: e, of a text condition.
      cudnn: whether cuDNN attends where it can, see `_cudnn_attends`.
    """

    width: int
    num_layers: int
    num_heads: int
    condition: str = "none"
    num_classes: int = 0
    text_width: int = 0
    dtype: Any = jnp.float32
    cudnn: bool = True

    @nn.compact
    def __call__(
        self, z_t: Array, time: Array, label: Array | None = None, given: Array | None = None
    ) -> Array:
        """Applies the network.

        Args:
          z_t: (n, h, w, c) in {0, 1}.
          time: (n,), (t - 1) / T in (-1 / T, 1), T being that of training whatever the sampler
            visits.
          label: int (n,) in 0..num_classes - 1 for a class, (n, e) or (n, m, e) for a text; None
            where no image has one. Ignored without a condition.
          given: bool (n,), which images have their label, None for all.

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
        num_keys = None
        if self.condition in ("class", "text_token") and label is not None:
            tokens.append(self._embed_label(label)[:, None])
            if given is not None:
                num_keys = h * w + 1 + given.astype(jnp.int32)
        x = jnp.concatenate(tokens, axis=1).reshape(-1, self.width)

        text_width = self.text_width if self.condition == "text_cross" else 0
        for i in range(self.num_layers):
            block = Block(self.num_heads, text_width, self.dtype, self.cudnn, name=f"blocks_{i}")
            x = block(x, n, num_keys, text, given)
        x = x.reshape(n, -1, self.width)[:, : h * w].reshape(n * h * w, self.width)
        x = _norm(jnp.float32, "ln_f")(x)
        # Zero: with the evidence form the untrained network is then right about every bit's own
        # evidence, and otherwise says "one half".
        x = nn.Dense(c, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name="head")(x)
        return x.reshape(n, h, w, c)

    def round_weights(self, params: Any) -> Any:
        """Returns parameters with the large matrices in `dtype`, in which it multiplies them.

        The output is the same. A program that applies the network in a loop then reads half as
        much at every turn, and rounds them once: XLA leaves that in the loop.
        """

        def rounded(path: Any, x: Array) -> Array:
            *rooms, name = (entry.key for entry in path)
            in_float32 = name not in ("kernel", "embedding") or "head" in rooms
            return x if in_float32 else x.astype(self.dtype)

        return jax.tree_util.tree_map_with_path(rounded, params)

    def _embed_label(self, label: Array) -> Array:
        """(n,) int or (n, e) -> (n, d)."""
        if self.condition == "class":
            embed = nn.Embed(self.num_classes, self.width, dtype=self.dtype, name="cls_embedding")
            return embed(label)
        return nn.Dense(self.width, dtype=self.dtype, name="cls_embedding")(label)
