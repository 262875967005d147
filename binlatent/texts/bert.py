"""BERT as a sentence encoder (Devlin et al., 2019; Reimers and Gurevych, 2019): "minilm".

Dimensions: n batch, l tokens, d width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from binlatent.texts.attention import TextAttention

Array = jax.Array


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)


class _Layer(nn.Module):
    """Attention and MLP, each with a residual connection and then a normalisation."""

    num_heads: int
    mlp_width: int

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        y = TextAttention(self.num_heads, name="attention")(x, mask)
        x = _norm("attention_norm")(x + y)
        y = nn.gelu(nn.Dense(self.mlp_width, name="mlp_in")(x), approximate=False)
        y = nn.Dense(x.shape[-1], name="mlp_out")(y)
        return _norm("mlp_norm")(x + y)


class Bert(nn.Module):
    """Features of single-segment texts, as sentence-transformers computes them.

    Fields:
      max_tokens: the largest number of tokens of a text, l.
      width: d, a multiple of num_heads.
    """

    vocab_size: int
    max_tokens: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int

    @property
    def pooled_width(self) -> int:
        """The width of a text's vector."""
        return self.width

    @nn.compact
    def __call__(self, ids: Array, lengths: Array) -> tuple[Array, Array]:
        """Returns one vector per text, (n, d), and one per token, (n, l, d).

        The vector of a text is the mean of its tokens' vectors, normalised to length 1. The vectors
        of the padding are 0.

        Args:
          ids: int (n, l), tokens with the special ones, padded at the end.
          lengths: int (n,), in 1..l, the number of tokens without the padding.
        """
        size = ids.shape[1]
        mask = jnp.arange(size)[None] < lengths[:, None]
        shape = (self.max_tokens, self.width)
        # Includes the embedding of the first segment, the only one here.
        positions = self.param("position_embeddings", nn.initializers.normal(0.02), shape)
        x = nn.Embed(self.vocab_size, self.width, name="word_embeddings")(ids)
        x = _norm("embeddings_norm")(x + positions[None, :size])
        for i in range(self.num_layers):
            layer = _Layer(self.num_heads, self.mlp_width, name=f"layer_{i}")
            x = layer(x, mask[:, None, None])
        tokens = jnp.where(mask[..., None], x, 0)
        pooled = jnp.sum(tokens, axis=1) / lengths[:, None]
        return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True), tokens
