"""The targets whose log-odds a network predicts, and conversions between them (paper, Table 7).

Samplers and bounds use the flip, z_t xor z_0; the targets z_0 and z_s are converted to it.
"""

import jax
import jax.numpy as jnp

from binlatent.priors.bernoulli import process

Array = jax.Array

TARGETS = ("flip", "z_0", "z_s")

_LEAST_PROB = 1e-7  # of a flip; in float32 the largest number below 1 is 1 - 6e-8


def z_0_probs(flip_logit: Array, z_t: Array) -> Array:
    """Returns P(z_0 = 1) = z_t (1 - f) + (1 - z_t) f, f = sigmoid(flip_logit) (Algorithm 1)."""
    return jax.nn.sigmoid(flip_from_z_0(flip_logit, z_t))


def flip_from_z_0(logit: Array, z_t: Array) -> Array:
    """Returns the log-odds of a flip from those of z_0; the function is its own inverse."""
    return logit * (1 - 2 * process.at_least_float32(z_t))


def log_posterior(flip_logit: Array, k_t: Array, k_s: Array) -> tuple[Array, Array]:
    """Returns log p(z_s = z_t | z_t) and log p(z_s != z_t | z_t), by the mixture (8)."""
    agree, disagree = process.stay_probs(k_t, k_s)
    log_flip, log_keep = jax.nn.log_sigmoid(flip_logit), jax.nn.log_sigmoid(-flip_logit)
    log_stay = jnp.logaddexp(log_keep + jnp.log(agree), log_flip + jnp.log(disagree))
    agree, disagree = process.leave_probs(k_t, k_s)
    log_leave = jnp.logaddexp(log_keep + jnp.log(agree), log_flip + jnp.log(disagree))
    return log_stay, log_leave


def z_s_from_flip(flip_logit: Array, z_t: Array, k_t: Array, k_s: Array) -> Array:
    """Returns the log-odds of z_s = 1 from those of a flip, by the mixture (8)."""
    log_stay, log_leave = log_posterior(flip_logit, k_t, k_s)
    return flip_from_z_0(log_leave - log_stay, z_t)


def flip_from_z_s(logit: Array, z_t: Array, k_t: Array, k_s: Array) -> Array:
    """Returns the log-odds of a flip from those of z_s = 1: the inverse of `z_s_from_flip`.

    The mixture (8) lies between q(z_s | z_t, z_0) of the two values of z_0. A p(z_s | z_t) outside
    this range is clipped.

    Args:
      logit: of z_s = 1.
      z_t: bits at time t.
      k_t, k_s: the schedule at t and at the s < t that the network was trained to predict.
    """
    agree, disagree = process.leave_probs(k_t, k_s)
    leave = jax.nn.sigmoid(flip_from_z_0(logit, z_t))
    # Positive, even where z_s has almost no information about z_0.
    range_ = jnp.maximum(disagree - agree, jnp.finfo(agree.dtype).tiny)
    flip = (leave - agree) / range_
    flip = jnp.clip(flip, _LEAST_PROB, 1 - _LEAST_PROB)
    return jnp.log(flip) - jnp.log1p(-flip)
