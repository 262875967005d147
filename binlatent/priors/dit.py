"""The network "dit": that of the released weights, with parts of newer diffusion transformers.

Each part is a field. With all of them off, the network and its parameters are those of
`transformer.Transformer`.

Dimensions: n batch, h w latent grid, c bits, d width, e width of a text's features.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from binlatent.priors.attention import dense, gelu, rotary_angles, swiglu
from binlatent.priors.conditions import count_tokens, given_labels
from binlatent.priors.transformer import (
    CrossAttention,
    SelfAttention,
    TimeEmbedding,
    layer_norm,
    rounded,
    sine_positions_2d,
)

Array = jax.Array

POSITIONS = ("rotary", "learned")

# Label vectors are added to the time vector. At this scale they differ as much as two times do.
_LABEL_INIT = nn.initializers.normal(0.3)


def swiglu_width(width: int) -> int:
    """Returns f such that three matrices d x f have as many parameters as two of d x 4 d.

    That is 8 d / 3, rounded to a multiple of 8 for matrix units (Shazeer, GLU Variants Improve
    Transformer, 2020).
    """
    return 8 * round(width / 3)


def modulation(condition: Array, num: int, dtype: Any) -> list[Array]:
    """Returns `num` vectors of shift, scale or gate, float32 (n, 1, d), from conditions (n, d).

    They are zero at initialisation. The calling module owns the layer `modulation`.
    """
    width, zeros = num * condition.shape[-1], nn.initializers.zeros
    layer = nn.Dense(width, dtype=dtype, kernel_init=zeros, name="modulation")
    return jnp.split(layer(condition).astype(jnp.float32)[:, None], num, axis=-1)


def modulated_norm(x: Array, shift: Array, scale: Array) -> Array:
    """Returns LN(x) (1 + scale) + shift in float32, where LN has no parameters.

    Args:
      x: rows (n tokens, d).
      shift, scale: (n, 1, d).
    """
    norm = nn.LayerNorm(1e-5, dtype=jnp.float32, use_bias=False, use_scale=False, parent=None)
    y = norm.apply({}, x).reshape(len(shift), -1, x.shape[-1])
    return (y * (1 + scale) + shift).reshape(x.shape)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention if `text_width` is set, and an MLP, all residual branches.

    With a condition the block is adaLN-Zero: the condition gives shift and scale of the norms
    before self-attention and MLP, and a gate for each branch. All gates are 0 at initialisation,
    also that of cross-attention, so the block is the identity (Peebles and Xie, Scalable Diffusion
    Models with Transformers, 2023). Without a condition the block is `transformer.Block`.
    """

    num_heads: int
    text_width: int = 0
    dtype: Any = jnp.float32
    qk_norm: bool = False
    swiglu: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        n: int,
        condition: Array | None,
        angles: np.ndarray | None,
        num_keys: Array | None,
        text: Array | None,
        text_tokens: Array | None,
    ) -> Array:
        """Maps rows (n tokens, d) to the same shape; the condition is (n, d) or None.

        Other arguments are those of `SelfAttention` and `CrossAttention`.
        """
        d, dtype = x.shape[-1], self.dtype
        vectors, start = (), nn.initializers.ones
        if condition is not None:
            vectors = modulation(condition, 6, dtype)
            start = nn.initializers.zeros  # of the gate of cross-attention

        def added(x, branch, name, vectors):
            if not vectors:
                gate = self.param(f"gamma_{name}", start, (d,)).astype(dtype)[None]
                return x + gate * branch(layer_norm(dtype, f"ln{name}")(x))
            shift, scale, gate = vectors
            y = branch(modulated_norm(x, shift, scale).astype(dtype)).astype(jnp.float32)
            y = (gate * y.reshape(n, -1, d)).reshape(x.shape)
            return (x.astype(jnp.float32) + y).astype(dtype)

        def mlp(y):
            act, width = (swiglu, 2 * swiglu_width(d)) if self.swiglu else (gelu, 4 * d)
            y = dense(width, dtype=dtype, name="mlp_0")(y)
            return dense(d, dtype=dtype, name="mlp_2")(act(y))

        attention = SelfAttention(self.num_heads, dtype, qk_norm=self.qk_norm, name="attn")
        x = added(x, lambda y: attention(y, n, num_keys, angles), "1", vectors[:3])
        if self.text_width:
            fields = {"qk_norm": self.qk_norm, "name": "cross"}
            cross = CrossAttention(self.num_heads, self.text_width, dtype, **fields)
            x = added(x, lambda y: cross(y, n, text, text_tokens), "1_5", ())
        return added(x, mlp, "2", vectors[3:])


class DiT(nn.Module):
    """Predicts for each bit the log-odds that the noise flipped it, like `transformer.Transformer`.

    Fields:
      width, num_layers, num_heads, condition, num_classes, text_width: as in `Transformer`. With
        rotary positions, the width of a head must be a multiple of 4.
      adaln: whether the time, and the class or the text's vector, modulate the blocks instead of
        being tokens. An image without a label then has a learned vector in place of the label's.
        The tokens of a text are always used by cross-attention.
      qk_norm: whether queries and keys have an RMS norm.
      swiglu: whether the MLPs are SwiGLUs, with as many parameters.
      positions: one of `POSITIONS`. Both add a learned vector to each token. "rotary" also rotates
        queries and keys. Rotation alone would give equal tokens equal outputs at all places.
    """

    width: int
    num_layers: int
    num_heads: int
    condition: str = "none"
    num_classes: int = 0
    text_width: int = 0
    dtype: Any = jnp.float32
    adaln: bool = True
    qk_norm: bool = True
    swiglu: bool = True
    positions: str = "rotary"

    @nn.compact
    def __call__(
        self, z_t: Array, time: Array, label: Array | None = None, given: Array | None = None
    ) -> Array:
        """Applies the network.

        Args:
          z_t, time, label, given: as in `transformer.Transformer`.

        Returns:
          (n, h, w, c), float32. Zero at initialisation.
        """
        (n, h, w, c), d, dtype = z_t.shape, self.width, self.dtype
        text = label if self.condition == "text_cross" else None
        text_tokens = None if text is None else count_tokens(text, given)
        own = None  # the vector of the label, (n, d)
        if self.condition in ("class", "text_token") and label is not None:
            own, given = self._embed_label(label), given_labels(label, given)
        vector = TimeEmbedding(d, dtype, name="time_step_embedding")(time)

        x = nn.Dense(d, use_bias=False, dtype=dtype, name="tok_emb")(2 * z_t.reshape(-1, c) - 1)
        positions = self.param("pos_emb", lambda _: sine_positions_2d(h, w, d))
        x = x.reshape(n, h * w, d) + positions.astype(dtype)[None]
        condition = num_keys = None
        if self.adaln:
            condition = nn.swish(self._with_label(vector, own, given))
        else:
            tokens = [y[:, None] for y in (vector, own) if y is not None]
            x = jnp.concatenate([x, *tokens], axis=1)
            if own is not None and given is not None:
                num_keys = h * w + 1 + given.astype(jnp.int32)
        angles = None
        if self.positions == "rotary":
            angles = rotary_angles(h, w, d // self.num_heads)
            # Other tokens are not rotated.
            angles = np.pad(angles, ((0, x.shape[1] - h * w), (0, 0)))

        x = x.reshape(-1, d)
        text_width = self.text_width if self.condition == "text_cross" else 0
        for i in range(self.num_layers):
            fields = (self.num_heads, text_width, dtype, self.qk_norm, self.swiglu)
            block = DiTBlock(*fields, name=f"blocks_{i}")
            x = block(x, n, condition, angles, num_keys, text, text_tokens)
        x = x.reshape(n, -1, d)[:, : h * w].reshape(-1, d)
        if self.adaln:
            x = modulated_norm(x, *modulation(condition, 2, dtype))
        else:
            x = layer_norm(jnp.float32, "ln_f")(x)
        zeros = nn.initializers.zeros  # as in `Transformer`
        x = nn.Dense(c, dtype=jnp.float32, kernel_init=zeros, name="head")(x)
        return x.reshape(z_t.shape)

    def _embed_label(self, label: Array) -> Array:
        """(n,) int or (n, e) -> (n, d)."""
        fields = {"dtype": self.dtype, "name": "cls_embedding"}
        if self.condition == "text_token":
            return nn.Dense(self.width, **fields)(label)
        if self.adaln:
            fields["embedding_init"] = _LABEL_INIT
        return nn.Embed(self.num_classes, self.width, **fields)(label)

    def _with_label(self, time: Array, own: Array | None, given: Array | None) -> Array:
        """Returns the time vector plus the label vector, or a learned vector without a label."""
        if self.condition not in ("class", "text_token"):
            return time
        null = self.param("null_emb", _LABEL_INIT, (1, self.width)).astype(self.dtype)
        if own is None:
            return time + null
        return time + (own if given is None else jnp.where(given[:, None], own, null))

    def round_weights(self, params: Any) -> Any:
        """See `transformer.rounded`."""
        return rounded(params, self.dtype)
