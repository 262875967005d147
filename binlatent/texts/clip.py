"""The text tower of CLIP (Radford et al., ICML 2021): "clip".

Dimensions: n batch, l tokens, d width, e width of the joint space of texts and images.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from binlatent.texts.attention import TextAttention

Array = jax.Array


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


class _Layer(nn.Module):
    """Pre-norm attention and MLP, with the sigmoid approximation of GELU."""

    num_heads: int
    mlp_width: int

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        x = x + TextAttention(self.num_heads, name="attention")(_norm("norm_1")(x), mask)
        y = nn.Dense(self.mlp_width, name="mlp_in")(_norm("norm_2")(x))
        y = y * nn.sigmoid(1.702 * y)
        return x + nn.Dense(x.shape[-1], name="mlp_out")(y)


class ClipText(nn.Module):
    """Features of texts, comparable with CLIP's features of images.

    Fields:
      max_tokens: the largest number of tokens of a text, l.
      width: d, a multiple of num_heads.
      pooled_width: e.
    """

    vocab_size: int
    max_tokens: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    pooled_width: int

    @nn.compact
    def __call__(self, ids: Array, lengths: Array) -> tuple[Array, Array]:
        """Returns one vector per text, (n, e), and one per token, (n, l, d).

        A text's vector is the projection of its last token's, without normalisation to length 1.
        The tokens' vectors are those after the last layer norm, before the projection; 0 in the
        padding.

        Args:
          ids: int (n, l), tokens with start and end, then any padding.
          lengths: int (n,), in 1..l, the number of tokens without the padding.
        """
        n, size = ids.shape
        shape = (self.max_tokens, self.width)
        positions = self.param("position_embedding", nn.initializers.normal(0.01), shape)
        x = nn.Embed(self.vocab_size, self.width, name="token_embedding")(ids)
        x = x + positions[None, :size]
        # Causal, so that no token of a text attends to the padding.
        causal = np.tril(np.ones((size, size), bool))[None, None]
        for i in range(self.num_layers):
            x = _Layer(self.num_heads, self.mlp_width, name=f"layer_{i}")(x, causal)
        x = _norm("final_norm")(x)
        projection = nn.Dense(self.pooled_width, use_bias=False, name="projection")
        pooled = projection(x[jnp.arange(n), lengths - 1])
        mask = jnp.arange(size)[None] < lengths[:, None]
        return pooled, jnp.where(mask[..., None], x, 0)
