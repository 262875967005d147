"""Six bits in a chain: a data distribution far from a product, and exact results for it.

Everything is summed over all 64 codes in float64, except the denoiser, which samplers call in JAX.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

BITS = 6
STATES = np.array(list(itertools.product((0, 1), repeat=BITS)), np.float64)


def _probabilities() -> np.ndarray:
    """Each bit repeats the one before with a probability that is higher after a 1 and later on."""
    p = np.where(STATES[:, 0] == 1, 0.7, 0.3)
    for i in range(1, BITS):
        repeat = np.where(STATES[:, i - 1] == 1, 0.8 + 0.03 * i, 0.65 + 0.04 * i)
        p = p * np.where(STATES[:, i] == STATES[:, i - 1], repeat, 1 - repeat)
    return p


P_DATA = _probabilities()
MARGINALS = P_DATA @ STATES
ENTROPY_BITS = -np.sum(P_DATA * np.log2(P_DATA))


def transition(k_ts: float) -> np.ndarray:
    """(64, 64), q(z_t | z_s), from the definition of the noise: row z_s, column z_t."""
    same = STATES[:, None] == STATES[None]
    return np.where(same, (1 + k_ts) / 2, (1 - k_ts) / 2).prod(axis=-1)


def marginal(k_t: float) -> np.ndarray:
    """(64,), q(z_t)."""
    return P_DATA @ transition(k_t)


def bits_given(k_t: float, k_s: float) -> np.ndarray:
    """(64, 6), p(z_s^i = 1 | z_t), one row per z_t."""
    joint = marginal(k_s)[:, None] * transition(k_t / k_s)  # [z_s, z_t]
    return (joint / joint.sum(0)).T @ STATES


def bits_given_others(k_t: float) -> np.ndarray:
    """(64, 6), P(z_0^i = 1 | all bits of z_t except the i-th), one row per z_t."""
    same = STATES[:, None] == STATES[None]
    noise = np.where(same, (1 + k_t) / 2, (1 - k_t) / 2)  # [z_0, z_t, i]
    result = np.empty_like(STATES)
    for i in range(BITS):
        joint = P_DATA[:, None] * np.delete(noise, i, axis=-1).prod(axis=-1)
        result[:, i] = (joint * STATES[:, None, i]).sum(0) / joint.sum(0)
    return result


def product_kernel(probs: np.ndarray) -> np.ndarray:
    """(64, 64), the kernel that redraws bit i of a state, with `probs`, (64, 6), by state."""
    probs = np.asarray(probs, np.float64)[:, None]
    return np.where(STATES[None] == 1, probs, 1 - probs).prod(axis=-1)


def denoise(z_t: jax.Array, k_t: jax.Array) -> jax.Array:
    """The exact flip log-odds of bits (..., 6), float32; k_t is a scalar or one per chain."""
    same = jnp.asarray(STATES, jnp.float32)[None] == z_t.reshape(-1, 1, BITS)
    k_t = jnp.reshape(k_t, (-1, 1, 1))
    noise = jnp.where(same, jnp.log1p(k_t), jnp.log1p(-k_t))
    joint = jnp.log(jnp.asarray(P_DATA, jnp.float32))[None] + jnp.sum(noise, axis=-1)
    one = jnp.asarray(STATES, jnp.float32)[None] == 1

    def log_odds(where):
        return jax.nn.logsumexp(jnp.where(where, joint[..., None], -jnp.inf), axis=1)

    odds = log_odds(one) - log_odds(~one)
    return odds.reshape(z_t.shape) * (1 - 2 * z_t)
