"""The compiled programs of an autoregressive prior: code lengths and sampling.

Dimensions as in `network`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from binlatent.priors.autoregressive.network import CausalTransformer
from binlatent.priors.conditions import Condition, label_and_given, side_by_side
from binlatent.priors.guidance import noise_from_keys
from binlatent.priors.prior import Known

Array = jax.Array


def log_likelihood(
    network: CausalTransformer, params: Any, bits: Array, condition: Condition | None
) -> Array:
    """Returns log p(code) in nats, (n,), of codes (n, h, w, c), in one pass over all tokens."""
    logits = network.apply(params, bits, None, *label_and_given(condition))
    tokens = bits.reshape(*logits.shape[:2], -1)
    return jnp.sum(network.head.log_probs(logits, tokens), axis=1)


@functools.partial(jax.jit, static_argnames="network")
def code_lengths(
    params: Any, condition: Condition | None, bits: Array, *, network: CausalTransformer
) -> Array:
    """Returns -log2 p(code) in bits, (n,)."""
    return -log_likelihood(network, params, bits, condition) / math.log(2)


@functools.partial(jax.jit, static_argnames=("network", "guided"))
def sample_codes(
    params: Any,
    keys: Array,
    condition: Condition | None,
    known: Known | None,
    temperature: Array,
    guidance: Array,
    *,
    network: CausalTransformer,
    guided: bool,
) -> Array:
    """Draws codes, float32 (n, h, w, c), token by token in a single loop.

    Keys and values of all tokens are cached, so the loop has the FLOPs of one pass.

    Args:
      params: of the network.
      keys: (n,) typed PRNG keys, one per sample.
      condition: of all samples; None for no condition.
      known: a raster prefix of whole tokens, which may differ between samples.
      temperature: tau > 0; divides the logits of a bit, or of the values of a group.
      guidance: w; logits are (1 + w) conditional - w unconditional (supplement C). In place of the
        unconditional ones, those of the label that guidance leads away from.
      network: static.
      guided: static; if False, only the conditional network is called, and w is ignored.
    """
    params, n, (h, w, c) = network.round_weights(params), len(keys), network.code_shape
    label, given = label_and_given(side_by_side(condition) if guided else condition)
    head, uniforms = network.head, noise_from_keys(keys, (c,))
    size = head.group_size

    def both(token):
        return jnp.repeat(token, 2, axis=0) if guided else token

    def draw_token(hidden, uniform):
        def draw_group(group, token):
            logits = network.apply(params, hidden, both(token[:, :c]), group, method="group_logits")
            if guided:
                pairs = logits.reshape(n, 2, -1)
                logits = (1 + guidance) * pairs[:, 0] - guidance * pairs[:, 1]
            own = jax.lax.dynamic_slice_in_dim(uniform, group * size, size, axis=1)
            drawn = head.draw(logits / temperature, own, group)
            return jax.lax.dynamic_update_slice_in_dim(token, drawn, group * size, axis=1)

        # The last group may reach beyond the token's bits.
        uniform = jnp.pad(uniform, ((0, 0), (0, head.num_groups * size - c)))
        return jax.lax.fori_loop(0, head.num_groups, draw_group, jnp.zeros_like(uniform))[:, :c]

    def draw_next(carry, at):
        cache, before = carry
        place, own = at
        hidden, changed = network.apply(
            {**params, "cache": cache},
            *(both(before), place, label, given),
            method="advance",
            mutable="cache",
        )
        token = draw_token(hidden, uniforms(place))
        if own is not None:
            token = jnp.where(own.mask > 0, own.bits, token)
        return (changed["cache"], token), token

    if known is not None:
        tokens = (x.reshape(n, h * w, c).swapaxes(0, 1).astype(jnp.float32) for x in known)
        known = Known(*tokens)
    cache = network.empty_cache(params, 2 * n if guided else n, label, given)
    start = cache, jnp.zeros((n, c))
    _, tokens = jax.lax.scan(draw_next, start, (jnp.arange(h * w), known))
    return tokens.swapaxes(0, 1).reshape(n, h, w, c)
