"""The prior's losses and the likelihood bound against the goldens, brute force and the entropy."""

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, rel_entr

from binlatent.priors import schedules
from binlatent.priors.bernoulli import likelihood, losses, process
from binlatent.priors.guidance import noise_from_keys

GOLDEN = np.load("tests/data/prior_losses.npz")
Z_0, Z_T, LOGITS = (jnp.asarray(GOLDEN[name], jnp.float32) for name in ("z0", "zt", "logits"))
TIMES = jnp.asarray(GOLDEN["t"], jnp.float32)
K_T, K_S = (schedules.keep_at("linear", t / 64)[:, None, None] for t in (TIMES, TIMES - 1))
FLIPPED = process.flip_target(Z_T, Z_0)


def weighted(loss, name):
    return jnp.mean(losses.time_weight(TIMES, 64, name)[:, None, None] * loss)


@pytest.mark.parametrize("kind, loss", [("plain", losses.bce), ("balanced", losses.balanced_bce)])
def test_flip_losses_agree_with_the_reference_numbers(kind, loss):
    got = weighted(loss(LOGITS, FLIPPED), "mean")
    np.testing.assert_allclose(got, GOLDEN[f"{kind}_flip__loss"], atol=1e-5)
    right = jnp.mean((LOGITS > 0) == (FLIPPED > 0))
    np.testing.assert_allclose(right, GOLDEN[f"{kind}_flip__acc"], atol=1e-6)


def test_the_weighted_and_the_z_0_losses_agree_with_the_reference_numbers():
    got = weighted(losses.balanced_bce(LOGITS, FLIPPED), "falling")
    np.testing.assert_allclose(got, GOLDEN["balanced_flip_weighted__loss"], atol=1e-5)
    got = weighted(losses.bce(LOGITS, Z_0), "mean")
    np.testing.assert_allclose(got, GOLDEN["plain_z0__loss"], atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "balanced"])
def test_vlb_term_is_the_reference_cross_entropy_less_the_posterior_entropy(kind):
    # KL(q || p) = CE(q, p) - H(q), with the plug-in posterior that the reference uses: the mixture
    # of the logits with the evidence added. At t = 1 the reference uses the prediction itself.
    kl = losses.posterior_kl(LOGITS + process.flip_evidence(K_T), Z_T, Z_0, K_T, K_S)
    entropy = losses.entropy(process.posterior_probs(Z_T, Z_0, K_T, K_S))
    first = (TIMES == 1)[:, None, None]
    auxiliary = jnp.mean(jnp.where(first, losses.bce(LOGITS, FLIPPED), kl + entropy))
    np.testing.assert_allclose(auxiliary, GOLDEN[f"{kind}_flip_vlb0.1__aux_loss"], atol=1e-5)
    residual = {"plain": losses.bce, "balanced": losses.balanced_bce}[kind]
    total = jnp.mean(residual(LOGITS, FLIPPED)) + 0.1 * auxiliary
    np.testing.assert_allclose(total, GOLDEN[f"{kind}_flip_vlb0.1__loss"], atol=1e-5)


def test_posterior_kl_is_the_divergence_of_the_two_posteriors():
    def posterior(z_0):
        k_ts, z_t, k_s = (np.float64(x) for x in (K_T / K_S, Z_T, K_S))
        one = (k_ts * z_t + (1 - k_ts) / 2) * (k_s * z_0 + (1 - k_s) / 2)
        zero = (k_ts * (1 - z_t) + (1 - k_ts) / 2) * (k_s * (1 - z_0) + (1 - k_s) / 2)
        return one / (one + zero)

    flip = expit(np.float64(LOGITS))
    p_0 = np.abs(np.float64(Z_T) - flip)
    q = posterior(np.float64(Z_0))
    p = p_0 * posterior(1.0) + (1 - p_0) * posterior(0.0)
    truth = rel_entr(q, p) + rel_entr(1 - q, 1 - p)
    got = losses.posterior_kl(LOGITS, Z_T, Z_0, K_T, K_S)
    np.testing.assert_allclose(got, truth, atol=1e-5)
    # t = 1: the negative log-likelihood.
    np.testing.assert_allclose(got[0], losses.bce(LOGITS, FLIPPED)[0], atol=1e-5)


def test_balanced_weights_are_the_shares_of_the_other_class():
    # Their effect on the minimum is tested in objective_test.py.
    target = jnp.zeros((1, 1000)).at[:, :200].set(1.0)
    loss = losses.balanced_bce(jnp.zeros_like(target), target)
    np.testing.assert_allclose(loss[0, [0, -1]], np.log(2) * np.array([0.8, 0.2]), rtol=1e-6)


def test_end_term_is_the_divergence_from_fair_bits():
    for k in (0.0, 0.3, 1.0):
        b = np.array([(1 - k) / 2, (1 + k) / 2])
        np.testing.assert_allclose(losses.end_kl(k), rel_entr(b, 0.5).sum(), atol=1e-6)


# The bound


def bound(num_timesteps, schedule="linear", num_draws=1, copies=400, **changes):
    """The bound of each state of the chain, (64,), averaged over `copies`."""
    keep = jnp.asarray(schedules.keep_schedule(schedule, num_timesteps), jnp.float32)[::-1]
    times = jnp.arange(num_timesteps, -1, -1.0)
    z_0 = jnp.tile(jnp.asarray(chain.STATES, jnp.float32), (copies, 1))[:, None, None]

    def denoise(z_t, t):
        return chain.denoise(z_t, jnp.interp(t, times[::-1], keep[::-1]))

    noise = noise_from_keys(jax.random.split(jax.random.key(0), len(z_0)), (1, 1, 6))
    arguments = dict(times=times, keep=keep, num_draws=num_draws) | changes
    bits = likelihood.likelihood_bound(denoise, noise, z_0, **arguments)
    return np.asarray(bits, np.float64).reshape(copies, 64).mean(0)


def expected_bound(num_timesteps):
    """The bound with the true posterior, summed over all z_0 and z_t; no sampling error."""
    keep = schedules.keep_schedule("linear", num_timesteps)
    codes = jnp.asarray(chain.STATES, jnp.float32)
    kl = jax.jit(losses.posterior_kl)
    total = 0.0
    for k_s, k_t in zip(keep[:-1], keep[1:], strict=True):
        flips = chain.denoise(codes[:, None, None], jnp.float32(k_t))[:, 0, 0]
        terms = kl(flips[None], codes[None], codes[:, None], jnp.float32(k_t), jnp.float32(k_s))
        joint = chain.P_DATA[:, None] * chain.transition(k_t)  # [z_0, z_t]
        total += np.sum(joint * np.asarray(terms, np.float64).sum(-1))
    return total / np.log(2)


def test_bound_is_above_the_entropy_and_approaches_it():
    gaps = np.array([expected_bound(steps) - chain.ENTROPY_BITS for steps in (1, 4, 16, 64, 256)])
    # One step: independent bits with the right marginals.
    p = chain.MARGINALS
    independent = -np.sum(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    np.testing.assert_allclose(gaps[0], independent - chain.ENTROPY_BITS, atol=1e-4)
    assert np.all(gaps > 0) and np.all(gaps[1:] < gaps[:-1] / 3), gaps


def test_bound_is_an_unbiased_estimate_of_its_expectation():
    for steps in (1, 4, 16):
        np.testing.assert_allclose(chain.P_DATA @ bound(steps), expected_bound(steps), atol=0.04)


def test_bound_takes_any_grid_and_any_number_of_draws():
    every = bound(64, copies=100)
    more = bound(64, num_draws=2, copies=50)
    np.testing.assert_allclose(chain.P_DATA @ every, chain.P_DATA @ more, atol=0.05)
    some = jnp.array([64, 60, 33, 7, 0])
    keep = 1 - some / 64
    coarse = chain.P_DATA @ bound(64, times=some.astype(jnp.float32), keep=keep, copies=200)
    assert chain.P_DATA @ every + 0.05 < coarse < 6


def test_bound_counts_what_a_schedule_leaves_at_T():
    # Unlike "linear", this schedule does not end in noise: z_T depends on z_0, so L_T is not 0.
    own = (1.0, 0.8, 0.5)
    total = chain.P_DATA @ bound(2, schedule=own)
    assert total > 6 * float(losses.end_kl(0.5)) / np.log(2) > 0.5
    assert total > chain.ENTROPY_BITS
