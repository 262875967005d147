"""The prior's losses, a bit each, in nats (paper, (7), (12), (13); supplement, Algorithm 1)."""

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import xlogy

from binlatent.priors.bernoulli import process, targets

Array = jax.Array

# Which loss and which posterior belong together; crossing them is biased.
PAIRS = ("plain_mixture", "balanced_plugin")
TIME_WEIGHTS = ("mean", "falling")


def bce(logit: Array, target: Array) -> Array:
    """Returns the binary cross-entropy a bit (paper, (12)); a target between 0 and 1 will do."""
    return optax.sigmoid_binary_cross_entropy(logit, target)


def balanced_bce(logit: Array, target: Array) -> Array:
    """Returns BCE weighted, within an image, by the share of the other class.

    Flips are few when t is small. With these weights the minimum is not a bit's flip log-odds but
    those less log(b_t / (1 - b_t)): what all the other bits say of it. Not in the paper; the
    authors' released priors were trained so.

    Args:
      logit, target: (n, ...); the share is over all but the first axis.
    """
    share = jnp.mean(target, axis=tuple(range(1, target.ndim)), keepdims=True)
    weight = target * (1 - share) + (1 - target) * share
    return weight * bce(logit, target)


def posterior_kl(flip_logit: Array, z_t: Array, z_0: Array, k_t: Array, k_s: Array) -> Array:
    """Returns KL(q(z_s | z_t, z_0) || p(z_s | z_t)) a bit, a term of L_vlb (paper, (7)).

    In closed form, to about 1e-7 in float32. At s = 0, where q is certain, it is the negative
    log-likelihood of z_0.

    Args:
      flip_logit: log-odds of a flip, the bit's own evidence included; p is the mixture (8) of it,
        which the plug-in of the logit without the evidence equals.
      z_t, z_0: bits.
      k_t, k_s: the schedule at t and s < t.
    """
    agree, disagree = process.stay_probs(k_t, k_s)
    log_stay, log_leave = targets.log_posterior(flip_logit, k_t, k_s)
    flipped = process.flip_target(z_t, z_0)
    stay = (1 - flipped) * agree + flipped * disagree
    cross_entropy = -(stay * log_stay + (1 - stay) * log_leave)
    return cross_entropy - entropy(stay)


def entropy(probs: Array) -> Array:
    """Returns the entropy of Bernoulli variables, in nats; 0 where certain."""
    return -xlogy(probs, probs) - xlogy(1 - probs, 1 - probs)


def end_kl(k_T: Array) -> Array:
    """Returns KL(q(z_T | z_0) || B(1/2)) a bit, the last term of (7); 0 where k_T is."""
    return jnp.log(2.0) - entropy((1 - process.at_least_float32(k_T)) / 2)


def time_weight(t: Array, num_timesteps: int, name: str) -> Array:
    """Returns the weight of an image's loss at time t: 1 for "mean", 1 - (t - 1)/T for "falling".

    The paper averages; the authors' code has both.
    """
    if name == "mean":
        return jnp.ones_like(process.at_least_float32(t))
    return 1 - jnp.maximum(t - 1, 0) / num_timesteps
