"""The Bernoulli diffusion process: noise, exact and predicted posteriors (paper, Section 4).

Codes z are arrays of {0, 1} of any shape. k_t and k_s are the schedule at times s < t, scalars or
arrays that broadcast against the codes with equal rank. b_t is (1 - k_t) / 2, so that

    q(z_t | z_0) = B(k_t z_0 + b_t)        q(z_t | z_s) = B(k_{t|s} z_s + (1 - k_{t|s}) / 2)

with k_{t|s} = k_t / k_s. The process is symmetric in the two values of a bit, so the reverse
direction is written in terms of whether a bit stays (z_s = z_t) or flips.

All results are in float32 or float64. They and their gradients are finite for all
0 <= k_t <= k_s <= 1, including k_T = 0 and k_0 = 1.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def at_least_float32(x: Array | float) -> Array:
    """Returns x in float32, or in float64 if x is."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def draw(uniform: Array, probs: Array) -> Array:
    """Draws bits with P(bit = 1) = probs, given uniform noise in [0, 1) of the same shape."""
    return (uniform < probs).astype(probs.dtype)


# The forward process


def forward_probs(z_0: Array, k_t: Array) -> Array:
    """Returns q(z_t = 1 | z_0) = k_t z_0 + b_t (paper, (5)), in the codes' shape."""
    z_0, k_t = at_least_float32(z_0), at_least_float32(k_t)
    return k_t * z_0 + (1 - k_t) / 2


def transition_keep(k_t: Array, k_s: Array) -> Array:
    """Returns k_{t|s} = k_t / k_s, the share that survives from s to t; 0 if k_s is 0."""
    k_t, k_s = at_least_float32(k_t), at_least_float32(k_s)
    return k_t / jnp.maximum(k_s, jnp.finfo(k_s.dtype).tiny)


def transition_probs(z_s: Array, k_t: Array, k_s: Array) -> Array:
    """Returns q(z_t = 1 | z_s) for any s < t; with s = t - 1 this is (4) of the paper."""
    return forward_probs(z_s, transition_keep(k_t, k_s))


def flip_target(z_t: Array, z_0: Array) -> Array:
    """Returns z_t xor z_0: 1 where the noise flipped the bit (paper, 4.1)."""
    return jnp.abs(at_least_float32(z_t) - at_least_float32(z_0))


def flip_evidence(k_t: Array) -> Array:
    """Returns log(b_t / (1 - b_t)), the log-odds of a flip from a bit's own noisy value.

    By Bayes' rule a bit's flip log-odds are this term plus the log-odds that the other bits imply.
    If the network models only the second term, the first is correct at every t from the start of
    training. The term is exactly 0 at k_t = 0, where z_t has no information, and falls as k_t
    rises. A k_t that rounds to 1 is replaced by the float below.
    """
    k_t = at_least_float32(k_t)
    k_t = jnp.minimum(k_t, 1 - jnp.finfo(k_t.dtype).epsneg)
    # b / (1 - b) = (1 - k) / (1 + k); log1p keeps the small k near t = T exact in float32.
    return jnp.log1p(-k_t) - jnp.log1p(k_t)


# The reverse process


def step_flip_prob(k_t: Array, k_s: Array) -> Array:
    """Returns (1 - k_{t|s}) / 2, the probability that the noise from s to t flips a bit.

    It is at least 2 eps, even if k_t and k_s round to the same number, so that quotients and
    logarithms stay finite.
    """
    k_ts = transition_keep(k_t, k_s)
    return jnp.maximum((1 - k_ts) / 2, 2 * jnp.finfo(k_ts.dtype).eps)


def stay_probs(k_t: Array, k_s: Array) -> tuple[Array, Array]:
    """Returns q(z_s = z_t | z_t, z_0) for z_0 = z_t, and for the other value of z_0.

    With e the flip probability from s to t, Bayes' rule (paper, (9)) reads
    (1 - e) (1 - b_s) / (1 - b_t) and (1 - e) b_s / b_t. At s = 0 they are 1 and 0.
    """
    e, b_s, same, other = _noise(k_t, k_s)
    return _share((1 - e) * (1 - b_s), same), _share((1 - e) * b_s, other)


def leave_probs(k_t: Array, k_s: Array) -> tuple[Array, Array]:
    """Returns 1 - `stay_probs`, accurate also for small values."""
    e, b_s, same, other = _noise(k_t, k_s)
    return _share(e * b_s, same), _share(e * (1 - b_s), other)


def _noise(k_t: Array, k_s: Array) -> tuple[Array, Array, Array, Array]:
    """Returns e, b_s, 1 - b_t and b_t; the last two as the sums that `stay_probs` divides by."""
    e = step_flip_prob(k_t, k_s)
    b_s = (1 - at_least_float32(k_s)) / 2
    return e, b_s, (1 - e) * (1 - b_s) + e * b_s, (1 - e) * b_s + e * (1 - b_s)


def _share(part: Array, whole: Array) -> Array:
    # Rounding could give a probability of 1 + 1e-7, whose entropy is NaN.
    return jnp.minimum(part / whole, 1)


def _ones_from_stays(z_t: Array, stay: Array) -> Array:
    """Returns P(z_s = 1) from P(z_s = z_t)."""
    return z_t * stay + (1 - z_t) * (1 - stay)


def posterior_probs(z_t: Array, z_0: Array, k_t: Array, k_s: Array) -> Array:
    """Returns the exact posterior q(z_s = 1 | z_t, z_0) for s < t (paper, (9)), codes' shape."""
    return mixture_posterior_probs(z_t, z_0, k_t, k_s)  # z_0 is a certain prediction


def mixture_posterior_probs(z_t: Array, p_0: Array, k_t: Array, k_s: Array) -> Array:
    """Returns p(z_s = 1 | z_t) = sum_v q(z_s = 1 | z_t, z_0 = v) p_0(v) (paper, (8)).

    For each bit it is exact if p_0 is P(z_0 = 1 | z_t), which plain BCE trains.

    Args:
      z_t: bits at time t.
      p_0: in [0, 1], the codes' shape.
      k_t, k_s: the schedule at t and s < t.
    """
    z_t = at_least_float32(z_t)
    agree, disagree = stay_probs(k_t, k_s)
    flip = flip_target(z_t, p_0)
    return _ones_from_stays(z_t, (1 - flip) * agree + flip * disagree)


def plugin_posterior_probs(z_t: Array, p_0: Array, k_t: Array, k_s: Array) -> Array:
    """Returns p(z_s = 1 | z_t), proportional to q(z_t | z_s) sum_v q(z_s | v) p_0(v).

    For each bit it is exact if p_0 is the probability of z_0 = 1 given only the other bits of z_t,
    which balanced BCE trains; the bit's own evidence is added here. The authors' code and the
    paper's (10)-(11) compute this, with k_s and b_s in place of the misprinted k_t and 0.5 b_t.

    Args:
      z_t, p_0, k_t, k_s: as in `mixture_posterior_probs`, except for the meaning of p_0.
    """
    z_t = at_least_float32(z_t)
    e = step_flip_prob(k_t, k_s)
    stay = 1 - flip_target(z_t, forward_probs(p_0, k_s))  # without the evidence of z_t
    stay = (1 - e) * stay / ((1 - e) * stay + e * (1 - stay))
    return _ones_from_stays(z_t, stay)


def renoised_probs(probs: Array, p_0: Array, k_s: Array, renoise: float | Array) -> Array:
    """Returns (1 - r) probs + r q(z_s = 1 | p_0): a step that draws a share r of the bits anew.

    The new bits come from the forward process of a predicted z_0, independently of z_t. Given z_0,
    z_s still follows q(z_s | z_0): the Psi-posteriors of Deschenaux et al. (2026, Duo, chapter II).

    Args:
      probs: P(z_s = 1) of the step, codes' shape.
      p_0: P(z_0 = 1 | z_t), including the bit's own evidence.
      k_s: the schedule at s.
      renoise: r in [0, 1); 0 returns `probs`.
    """
    return probs + renoise * (forward_probs(p_0, k_s) - probs)


def corrector_flip_probs(balanced_logit: Array, k_t: Array, size: float | Array) -> Array:
    """Returns the probability that a corrector step flips each bit of z_t.

    With probability `size`, each bit is drawn anew from its conditional given the others,
    q(z_t^i | z_t^-i). The other value has probability b_t (1 - p) + (1 - b_t) p, where p is its
    probability in z_0 given the other bits. For one bit at a time this is Gibbs sampling, which
    preserves q(z_t). For all bits at once the error is of second order in `size`.

    Args:
      balanced_logit: log-odds of p, which is a flip logit minus `flip_evidence`. For a flip logit
        divided by a temperature this holds with the p(z_0 | z_t) that the steps use.
      k_t: the schedule at t, below 1.
      size: in [0, 1].
    """
    return size * forward_probs(jax.nn.sigmoid(balanced_logit), k_t)
