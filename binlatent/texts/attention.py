"""Self-attention of the text encoders.

Dimensions: n batch, l tokens, d width.
"""

import jax
from flax import linen as nn

Array = jax.Array


class TextAttention(nn.Module):
    """Attention among the tokens of each text: (n, l, d) to the same shape."""

    num_heads: int

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """`mask`, bool (n or 1, 1, l or 1, l), says which keys a query attends to."""
        n, tokens, d = x.shape
        heads = (n, tokens, self.num_heads, d // self.num_heads)
        q, k, v = (nn.Dense(d, name=name)(x).reshape(heads) for name in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return nn.Dense(d, name="out")(y.reshape(x.shape))
