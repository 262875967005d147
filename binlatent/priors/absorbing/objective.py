"""The network on partly hidden codes, and the training loss of the absorbing diffusion."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from binlatent.priors.absorbing import process
from binlatent.priors.conditions import Condition, label_and_given

Array = jax.Array

TIME_WEIGHTS = ("bound", "falling")


class Noise(NamedTuple):
    """The random numbers of the loss of a batch: n images, units (n, h, w, c / g)."""

    order: Array  # (n, h, w, c / g) uniform in [0, 1); the lowest are hidden
    u: Array  # (n,) uniform in (0, 1], t / T


def draw_noise(keys: Array, n: int, units: tuple[int, int, int]) -> Noise:
    """Draws a batch's noise from two keys; times are spread evenly from one random offset.

    Each time is still uniform, but their mean varies less (Kingma et al., Variational Diffusion
    Models, 2021).
    """
    offset = jax.random.uniform(keys[1])
    return Noise(jax.random.uniform(keys[0], (n, *units)), 1 - (offset + jnp.arange(n) / n) % 1.0)


def logits(
    network: nn.Module, params: Any, z: Array, hidden: Array, condition: Condition | None
) -> Array:
    """Returns the log-odds of each bit of z_0, given the bits that are not hidden: (n, h, w, c).

    Hidden bits are 1/2, which the network embeds as 0, between -1 and 1. The time is the share of
    hidden bits.

    Args:
      network: such as `Transformer`.
      params: its parameters.
      z: codes in {0, 1}, (n, h, w, c); hidden bits are ignored.
      hidden: bool, the same shape.
      condition: of the batch.
    """
    label, given = label_and_given(condition)
    share = jnp.mean(hidden.astype(jnp.float32), axis=(1, 2, 3))
    return network.apply(params, jnp.where(hidden, 0.5, z), share, label, given)


def hidden_nats(logit: Array, z_0: Array, hidden: Array) -> Array:
    """Returns the sum of the cross-entropy over hidden bits, in nats per image: (n,)."""
    bce = optax.sigmoid_binary_cross_entropy(logit, z_0)
    return jnp.sum(jnp.where(hidden, bce, 0.0), axis=(1, 2, 3))


class Terms(NamedTuple):
    """The loss of each image, (n,)."""

    bound: Array  # nats per bit; the mean over noise is the bound
    falling: Array  # nats per bit, with the weight 1 - t / T
    accuracy: Array  # share of hidden bits whose likelier value is correct


def image_terms(
    network: nn.Module,
    params: Any,
    z_0: Array,
    condition: Condition | None,
    noise: Noise,
    times: np.ndarray,
) -> Terms:
    """Hides units, applies the network and returns each image's terms.

    Args:
      network, params, condition: as in `logits`.
      z_0: codes in {0, 1}, (n, h, w, c).
      noise: of the batch.
      times: from `process.times_of_counts`.
    """
    m = 1 + jnp.searchsorted(jnp.asarray(times[1:-1], jnp.float32), noise.u)
    g = z_0.shape[-1] // noise.order.shape[-1]
    hidden = process.by_bits(process.lowest(noise.order, m), g)
    logit = logits(network, params, z_0, hidden, condition)
    nats = hidden_nats(logit, z_0, hidden) / np.prod(z_0.shape[1:])
    right = jnp.sum(hidden & ((logit > 0) == (z_0 > 0.5)), axis=(1, 2, 3))
    return Terms(
        jnp.asarray(process.bound_weights(times), jnp.float32)[m] * nats,
        (1 - noise.u) * nats,
        right / (m * g),
    )
