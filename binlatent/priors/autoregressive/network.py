"""The network of the autoregressive prior: a causal transformer over tokens, and a head.

Dimensions: n batch, h w latent grid, l = h w tokens in raster order, c bits, d width, e width of a
text's features; of the head: G groups of bits, K numbers for each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from binlatent.priors.conditions import count_tokens, given_labels
from binlatent.priors.transformer import (
    Block,
    CrossAttention,
    layer_norm,
    rounded,
    sine_positions_2d,
)

Array = jax.Array


class CausalTransformer(nn.Module):
    """Gives the logits of every token from the tokens before it.

    The input is shifted by one: each place has the embedding of the token before it. The first
    place has the class or the text's vector, or a learned token if there is neither. The tokens of
    a text are used by cross-attention in every block. Blocks are those of
    `transformer.Transformer`.

    Fields:
      code_shape: (h, w, c).
      head: one of the classes in `heads`.
      width, num_layers, num_heads, condition, num_classes, text_width: as of
        `transformer.Transformer`.
    """

    code_shape: tuple[int, int, int]
    head: nn.Module
    width: int
    num_layers: int
    num_heads: int
    condition: str = "none"
    num_classes: int = 0
    text_width: int = 0
    dtype: Any = jnp.float32

    def setup(self):
        (h, w, _), d, dtype = self.code_shape, self.width, self.dtype
        self.tok_emb = nn.Dense(d, use_bias=False, dtype=dtype)
        self.pos_emb = self.param("pos_emb", lambda _: sine_positions_2d(h, w, d))
        self.start = self.param("start", nn.initializers.normal(0.02), (d,))
        if self.condition == "class":
            self.cls_embedding = nn.Embed(self.num_classes, d, dtype=dtype)
        elif self.condition == "text_token":
            self.cls_embedding = nn.Dense(d, dtype=dtype)
        shape = (self.num_heads, self._attended_width, dtype)
        self.blocks = [Block(*shape, causal=True) for _ in range(self.num_layers)]
        self.ln_f = layer_norm(jnp.float32)

    @property
    def _attended_width(self) -> int:
        return self.text_width if self.condition == "text_cross" else 0

    def __call__(
        self,
        bits: Array,
        time: Array | None = None,
        label: Array | None = None,
        given: Array | None = None,
    ) -> Array:
        """Returns the logits of all tokens of known codes (teacher forcing).

        Args:
          bits: (n, h, w, c) in {0, 1}.
          time: ignored; networks of other kinds have a time.
          label, given: as in `transformer.Transformer`.

        Returns:
          float32, (n, l, G, K). Zero at initialisation.
        """
        del time
        n, (h, w, c), d = len(bits), self.code_shape, self.width
        tokens = bits.reshape(n, h * w, c)
        before = self.tok_emb(2 * tokens[:, :-1].reshape(-1, c) - 1).reshape(n, -1, d)
        x = jnp.concatenate([self._first(n, label, given)[:, None], before], axis=1)
        x = x + self.pos_emb.astype(self.dtype)[None]
        hidden = self._apply_blocks(x.reshape(-1, d), n, None, label, given)
        groups = jnp.arange(self.head.num_groups)
        logits = self.head(hidden, tokens.reshape(-1, c), groups)
        return logits.reshape(n, h * w, *logits.shape[1:])

    def advance(
        self, before: Array, place: Array, label: Array | None, given: Array | None
    ) -> Array:
        """Returns the head's input for one token, given the collection `cache` of those before.

        Args:
          before: the token before, (n, c); ignored at the first place.
          place: scalar, index of the token in raster order; the cache has all places before it.
          label, given: as in `__call__`.

        Returns:
          float32, (n, d).
        """
        n = len(before)
        x = jnp.where(place == 0, self._first(n, label, given), self.tok_emb(2 * before - 1))
        x = x + self.pos_emb[place].astype(self.dtype)[None]
        return self._apply_blocks(x, n, jnp.full(n, place + 1), label, given)

    def group_logits(self, hidden: Array, tokens: Array, group: Array) -> Array:
        """Returns the logits (n, K) of a group of one token; arguments are those of the head."""
        return self.head(hidden, tokens, group[None])[:, 0]

    def _first(self, n: int, label: Array | None, given: Array | None) -> Array:
        """Returns the input at the first place, (n, d)."""
        start = jnp.broadcast_to(self.start.astype(self.dtype), (n, self.width))
        if self.condition not in ("class", "text_token") or label is None:
            return start
        own, given = self.cls_embedding(label), given_labels(label, given)
        return own if given is None else jnp.where(given[:, None], own, start)

    def _apply_blocks(
        self, x: Array, n: int, num_keys: Array | None, label: Array | None, given: Array | None
    ) -> Array:
        text = label if self.condition == "text_cross" else None
        text_tokens = None if text is None else count_tokens(text, given)
        for block in self.blocks:
            x = block(x, n, num_keys, text, text_tokens)
        return self.ln_f(x)

    def empty_cache(
        self, params: Any, n: int, label: Array | None, given: Array | None
    ) -> dict[str, Any]:
        """Returns the collection `cache` of n images without tokens, but with all of a text.

        Unlike the methods above it takes the parameters, like `apply`.
        """
        h, w, _ = self.code_shape
        zeros = jnp.zeros((n, h * w, self.width), self.dtype)
        cache = {}
        for i in range(self.num_layers):
            cache[f"blocks_{i}"] = own = {"attn": {"keys": zeros, "values": zeros}}
            if self._attended_width:
                fields = self.num_heads, self.text_width, self.dtype
                cross = CrossAttention(*fields, parent=None)  # not a part of this module
                own_params = {"params": params["params"][f"blocks_{i}"]["cross"]}
                text_tokens = None if label is None else count_tokens(label, given)
                inputs = zeros[:, 0], n, label, text_tokens
                own["cross"] = cross.apply(own_params, *inputs, mutable="cache")[1]["cache"]
        return cache

    def round_weights(self, params: Any) -> Any:
        """See `transformer.rounded`."""
        return rounded(params, self.dtype)
