"""The Bernoulli diffusion process: forward noise, targets and posteriors (paper, Section 4).

Codes z are arrays of {0, 1} of any shape; k_t and k_s are k of the schedule at times s < t, of a
shape that broadcasts against the codes by equal rank or as scalars. b_t is (1 - k_t) / 2, so that
q(z_t | z_0) = B(k_t z_0 + b_t) and q(z_t | z_s) = B(k_{t|s} z_s + (1 - k_{t|s}) / 2) with
k_{t|s} = k_t / k_s.
"""

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def draw(uniform: Array, probs: Array) -> Array:
    """Draws bits with P(bit = 1) = probs, given uniform noise in [0, 1) of the same shape."""
    return (uniform < probs).astype(probs.dtype)


def forward_probs(z_0: Array, k_t: Array) -> Array:
    """Returns P(z_t = 1 | z_0) = k_t z_0 + b_t (paper, (5)), in the codes' shape."""
    return k_t * z_0 + (1 - k_t) / 2


def flip_target(z_t: Array, z_0: Array) -> Array:
    """Returns z_t xor z_0: 1 where the noise flipped the bit (paper, 4.1)."""
    return jnp.abs(z_t - z_0)


def flip_evidence(k_t: Array) -> Array:
    """Returns log(b_t / (1 - b_t)): a bit's log-odds of being flipped, before looking at others.

    By Bayes' rule a bit's flip log-odds are this term plus what all the other bits say, so a
    network that gives the second part alone starts from the truth at every t. With k_t in [0, 1)
    the result is in (-inf, 0], and exactly 0 at k_t = 0, where z_t says nothing.
    """
    # b / (1 - b) = (1 - k) / (1 + k); log1p keeps the small k near t = T exact in float32.
    return jnp.log1p(-k_t) - jnp.log1p(k_t)


def flip_loss(flip_logit: Array, z_t: Array, z_0: Array) -> Array:
    """Returns the binary cross-entropy of the flip, in nats, a bit (paper, (12)); codes' shape."""
    return optax.sigmoid_binary_cross_entropy(flip_logit, flip_target(z_t, z_0))


def z_0_probs(flip_logit: Array, z_t: Array) -> Array:
    """Returns P(z_0 = 1 | z_t) = z_t (1 - f) + (1 - z_t) f, f = sigmoid(flip_logit)."""
    return jax.nn.sigmoid(flip_logit * (1 - 2 * z_t))


def posterior_probs(z_t: Array, z_0: Array, k_t: Array, k_s: Array) -> Array:
    """Returns the exact posterior q(z_s = 1 | z_t, z_0) for s < t (paper, (9)), codes' shape.

    Requires k_t < k_s <= 1; k_t = 0 (t = T) and k_s = 1 (s = 0) are fine.
    """
    k_ts = k_t / k_s
    # q(z_t | z_s = v) is high for v = z_t and low for the other value.
    likelihood_1 = k_ts * z_t + (1 - k_ts) / 2
    likelihood_0 = k_ts * (1 - z_t) + (1 - k_ts) / 2
    prior_1 = forward_probs(z_0, k_s)
    joint_1 = likelihood_1 * prior_1
    joint_0 = likelihood_0 * (1 - prior_1)
    return joint_1 / (joint_1 + joint_0)


def mixture_posterior_probs(z_t: Array, p_0: Array, k_t: Array, k_s: Array) -> Array:
    """Returns p(z_s = 1 | z_t) = sum_v q(z_s = 1 | z_t, z_0 = v) p_0(v) (paper, (8)).

    Args:
      z_t: bits at time t.
      p_0: P(z_0 = 1 | z_t), in [0, 1], the codes' shape.
      k_t, k_s: the schedule at t and s < t.
    """
    posterior_1 = posterior_probs(z_t, jnp.ones_like(z_t), k_t, k_s)
    posterior_0 = posterior_probs(z_t, jnp.zeros_like(z_t), k_t, k_s)
    return p_0 * posterior_1 + (1 - p_0) * posterior_0
