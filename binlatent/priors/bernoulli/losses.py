"""The prior's losses, in nats per bit (paper, (7), (12), (13); supplement, Algorithm 1)."""

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import xlogy

from binlatent.priors.bernoulli import process, targets

Array = jax.Array

# Each loss has a matching posterior; mixing them is biased.
PAIRS = ("plain_mixture", "balanced_plugin")
TIME_WEIGHTS = ("mean", "falling")


def bce(logit: Array, target: Array) -> Array:
    """Returns the binary cross-entropy per bit (paper, (12)); targets are in [0, 1]."""
    return optax.sigmoid_binary_cross_entropy(logit, target)


def balanced_bce(logit: Array, target: Array) -> Array:
    """Returns BCE weighted, within an image, by the share of the other class.

    Flips are rare when t is small. The minimum of this loss is a bit's flip log-odds minus
    log(b_t / (1 - b_t)), the log-odds that the other bits imply. The loss is not in the paper; the
    authors' released priors were trained with it.

    Args:
      logit, target: (n, ...); the share is over all but the first axis.
    """
    share = jnp.mean(target, axis=tuple(range(1, target.ndim)), keepdims=True)
    weight = target * (1 - share) + (1 - target) * share
    return weight * bce(logit, target)


def posterior_kl(flip_logit: Array, z_t: Array, z_0: Array, k_t: Array, k_s: Array) -> Array:
    """Returns KL(q(z_s | z_t, z_0) || p(z_s | z_t)) per bit, a term of L_vlb (paper, (7)).

    It is computed in closed form, to about 1e-7 in float32. At s = 0, where q is certain, it is the
    negative log-likelihood of z_0.

    Args:
      flip_logit: log-odds of a flip, including the bit's own evidence. p is its mixture (8), which
        equals the plug-in posterior of the logit without the evidence.
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
    """Returns the entropy of Bernoulli variables, in nats."""
    return -xlogy(probs, probs) - xlogy(1 - probs, 1 - probs)


def end_kl(k_T: Array) -> Array:
    """Returns KL(q(z_T | z_0) || B(1/2)) per bit, the last term of (7); 0 if k_T = 0."""
    return jnp.log(2.0) - entropy((1 - process.at_least_float32(k_T)) / 2)


def time_weight(t: Array, num_timesteps: int, name: str) -> Array:
    """Returns the weight of an image's loss at time t: 1 for "mean", 1 - (t - 1)/T for "falling".

    The paper uses the mean; the authors' code has both.
    """
    if name == "mean":
        return jnp.ones_like(process.at_least_float32(t))
    return 1 - jnp.maximum(t - 1, 0) / num_timesteps
