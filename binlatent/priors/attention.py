"""Attention, activations and dense layers, each with the fastest implementation for its device.

Dimensions: n batch, l tokens, d width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Array = jax.Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    n: int,
    num_heads: int,
    num_keys: Array | None,
    causal: bool = False,
) -> Array:
    """Returns the output of attention, rows (n tokens, d).

    Args:
      q, k, v: rows (n tokens, d) each.
      n: images.
      num_heads: d is a multiple of it.
      num_keys: int (n,), how many of the first tokens to attend to; None for all.
      causal: whether to attend to earlier tokens only.
    """
    heads = (n, -1, num_heads, q.shape[-1] // num_heads)
    q, k, v = (y.reshape(heads) for y in (q, k, v))
    y = _attend_by_heads(q, k, v, num_keys, causal, _cudnn_attends(k))
    return y.reshape(-1, heads[2] * heads[3])


# jit, so that it is traced once for all blocks: tracing it takes longer than the rest of a block.
@functools.partial(jax.jit, static_argnames=("causal", "cudnn"))
def _attend_by_heads(
    q: Array, k: Array, v: Array, num_keys: Array | None, causal: bool, cudnn: bool
) -> Array:
    def attend_elsewhere(*qkv: Array) -> Array:
        if cudnn:
            return _attend_by_cudnn(*qkv, num_keys, causal)
        lengths = {"key_value_seq_lengths": num_keys}
        return jax.nn.dot_product_attention(*qkv, **lengths, is_causal=causal)

    def attend_on_cpu(*qkv: Array) -> Array:
        mask = None
        if num_keys is not None:
            mask = (jnp.arange(k.shape[1])[None] < num_keys[:, None])[:, None, None]
        if causal:
            earlier = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
            mask = earlier if mask is None else mask & earlier
        # A few heads at a time: their weights fit into the caches, and parts run in parallel. With
        # few tokens there are fewer parts, because each part takes time to start.
        num_parts = math.gcd(k.shape[2], 8 if k.shape[1] >= 128 else 4)
        parts = zip(*(jnp.split(y, num_parts, axis=2) for y in qkv), strict=True)
        return jnp.concatenate([_attend_on_cpu(*part, mask=mask) for part in parts], axis=2)

    return jax.lax.platform_dependent(q, k, v, cpu=attend_on_cpu, default=attend_elsewhere)


class HeadNorm(nn.Module):
    """RMS norm of each head's part of rows (m, d), in float32, with a learned scale.

    For queries and keys it bounds the attention scores, which can grow in training (Dehghani et
    al., Scaling Vision Transformers to 22 Billion Parameters, 2023, who use layer norm).
    """

    num_heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps rows (m, d) to the same shape and type."""
        width = x.shape[-1] // self.num_heads
        scale = self.param("scale", nn.initializers.ones, (width,))
        y = x.reshape(-1, width).astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6) * scale[None]
        return y.astype(x.dtype).reshape(x.shape)


def rotary_angles(height: int, width: int, num_features: int) -> np.ndarray:
    """Returns the angles of a grid's tokens in row-major order: (l, num_features / 2), float32.

    The first half of the angles grows with the row, the second half with the column. Frequencies
    fall from 1 to nearly 1/100 (Heo et al., Rotary Position Embedding for Vision Transformer,
    2024).

    Args:
      height, width: of the grid.
      num_features: of a head, a multiple of 4.
    """
    places = np.stack(np.divmod(np.arange(height * width), width), axis=1)
    frequencies = 100.0 ** -np.linspace(0, 1, num_features // 4, endpoint=False)
    angles = places[:, :, None] * frequencies[None, None, :]
    return angles.reshape(height * width, -1).astype(np.float32)


def rotate(x: Array, angles: np.ndarray, num_heads: int) -> Array:
    """Rotates queries or keys by their positions, so that scores depend on relative positions.

    Entry i of a head's first half and entry i of its second half are the coordinates of a point,
    which is rotated by angle i (Su et al., RoFormer, 2021).

    Args:
      x: rows (n l, d), of all tokens of n images.
      angles: of each token, (l, D / 2), where D is the width of a head.
      num_heads: heads in d.
    """
    a, b = jnp.split(x.reshape(-1, len(angles), num_heads, 2 * angles.shape[1]), 2, axis=-1)
    cos, sin = (f(angles)[None, :, None] for f in (np.cos, np.sin))
    y = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return y.astype(x.dtype).reshape(x.shape)


def _cudnn_attends(k: Array) -> bool:
    """Returns whether cuDNN computes the attention to keys (n, keys, heads, width of a head).

    cuDNN does not write a head's l x l weights to memory. With XLA's attention they are half of the
    memory traffic of a training step, and more with many tokens. cuDNN needs an NVIDIA GPU since
    Ampere, 16-bit types and narrow heads. With few keys it is no faster.
    """
    if jax.default_backend() != "gpu" or k.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    major = str(jax.local_devices()[0].compute_capability).split(".")[0]
    if not major.isdigit() or int(major) < 8:  # AMD GPUs have other names
        return False
    return k.shape[1] >= 64 and k.shape[-1] % 8 == 0 and k.shape[-1] <= 128


def _attend_by_cudnn(q: Array, k: Array, v: Array, num_keys: Array | None, causal: bool) -> Array:
    """Computes `jax.nn.dot_product_attention` by cuDNN, padded to even numbers of tokens.

    JAX 0.10 refuses odd numbers if a gradient is taken. That is unknown here, so sampling pads too.
    """
    queries, keys = q.shape[1], k.shape[1]
    # The lengths depend on the batch, because JAX cannot vmap or shard constants correctly.
    zeros = 0 * k[:, 0, 0, 0].astype(jnp.int32)
    q, k, v = (jnp.pad(y, ((0, 0), (0, y.shape[1] % 2), (0, 0), (0, 0))) for y in (q, k, v))
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=zeros + q.shape[1],
        key_value_seq_lengths=zeros + (keys if num_keys is None else num_keys),
        is_causal=causal,
        implementation="cudnn",
    )
    return y[:, :queries]


def _attend_on_cpu(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Computes `jax.nn.dot_product_attention` on CPUs, in half the time of XLA's forward pass.

    - Heads come before tokens in all products, as matrix products need it.
    - The sum of the weights divides the averages, which have l rows per head, not the l^2 weights.
    - Rows are summed by a product, and their maximum is found by halves, because XLA's reductions
      along rows are not vectorised.

    Sums are in float32.
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
    """Returns the maximum over the last axis, with keepdims."""
    while x.shape[-1] > 8:
        half = -(-x.shape[-1] // 2)
        x = jnp.maximum(x[..., :half], x[..., -half:])
    return x.max(-1, keepdims=True)


@jax.checkpoint  # training stores x only, not the three intermediate arrays
def gelu(x: Array) -> Array:
    """The exact GELU, by erf in float32 as in PyTorch; JAX's erfc takes twice as long."""
    y = x.astype(jnp.float32)
    return (y * (0.5 + 0.5 * jax.lax.erf(y * np.float32(0.5**0.5)))).astype(x.dtype)


@jax.checkpoint  # as in gelu
def swiglu(x: Array) -> Array:
    """Returns silu(a) b for rows (a, b): (m, 2 f) -> (m, f), computed in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return (nn.silu(a) * b).astype(x.dtype)


def _dot_general(x: Array, kernel: Array, dimensions: Any, precision: Any) -> Array:
    """Computes `jax.lax.dot_general`; on CPUs sums are in float32.

    With float32 sums, 16-bit products use the processor's own instructions if it has them. Products
    of the gradient are in float32.
    """
    product = functools.partial(
        jax.lax.dot_general, dimension_numbers=dimensions, precision=precision
    )

    def with_float32_sums(x: Array, kernel: Array) -> Array:
        return product(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)

    if x.dtype == jnp.float32:  # the same product on all devices
        return product(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=with_float32_sums, default=product)


dense = functools.partial(nn.Dense, dot_general=_dot_general)
