"""The compiled programs of an absorbing diffusion: sampling, and the likelihood bound."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from binlatent.priors.absorbing import process, sampling
from binlatent.priors.absorbing.objective import logits
from binlatent.priors.conditions import Condition, negative
from binlatent.priors.guidance import guide, noise_from_keys
from binlatent.priors.prior import Known

Array = jax.Array

_STATICS = ("network", "shape", "g", "order", "score", "revise", "return_trajectory")


@functools.partial(jax.jit, static_argnames=_STATICS)
def unmask_codes(
    params: Any,
    keys: Array,
    condition: Condition | None,
    known: Known | None,
    counts: Array,
    guidance: Array,
    temperature: Array,
    order_temperature: Array,
    *,
    network: nn.Module,
    shape: tuple[int, int, int],
    **statics: Any,
) -> tuple[Array, sampling.Trajectory | None]:
    """Draws codes; each number of calls compiles a program.

    Args:
      params: of the network.
      keys: (n,) typed PRNG keys, one per sample.
      condition: of all samples; None for no condition and no guidance.
      known: known bits, or None.
      counts, guidance, temperature, order_temperature: as in `sampling.unmask`.
      network, shape: static; the shape of a code.
      **statics: `g`, `order`, `score`, `revise` and `return_trajectory` of `sampling.unmask`.

    Returns:
      As `sampling.unmask`.
    """
    params = network.round_weights(params)
    predict = functools.partial(logits, network, params)
    guided = guide(
        lambda z, hidden: predict(z, hidden, condition),
        lambda z, hidden: predict(z, hidden, negative(condition)),
    )

    def predict_guided(z, hidden, w):
        return predict(z, hidden, None) if condition is None else guided(z, hidden, w)

    z, free = jnp.zeros((len(keys), *shape)), jnp.ones((len(keys), *shape), bool)
    if known is not None:
        z, free = known.bits, known.mask == 0
    return sampling.unmask(
        predict_guided,
        noise_from_keys(keys, shape),
        z,
        free,
        counts=counts,
        guidance=guidance,
        temperature=temperature,
        order_temperature=order_temperature,
        **statics,
    )


@functools.partial(jax.jit, static_argnames=("network", "g", "any_order", "num_draws"))
def unmask_code_lengths(
    params: Any,
    keys: Array,
    condition: Condition | None,
    codes: Array,
    counts: Array,
    *,
    network: nn.Module,
    **statics: Any,
) -> Array:
    """Returns the bound on each code's length in bits, (n,); see `sampling.likelihood_bound`."""
    params = network.round_weights(params)
    return sampling.likelihood_bound(
        lambda z, hidden: logits(network, params, z, hidden, condition),
        noise_from_keys(keys, codes.shape[1:]),
        codes,
        counts=counts,
        **statics,
    )


@functools.partial(jax.jit, static_argnames=("count", "g"))
def hide_anew(keys: Array, bits: Array, *, count: int, g: int) -> Known:
    """Returns codes, (n, h, w, c), as known bits, except for `count` random units of each."""
    # Samplers number their draws from 0, so they never use the last number.
    order = noise_from_keys(keys, bits.shape[1:])(jnp.uint32(2**32 - 1))
    hidden = process.lowest(order[..., : bits.shape[-1] // g], count)
    return Known(bits, 1.0 - process.by_bits(hidden, g))
