"""The Bernoulli diffusion against brute force in float64 and closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.diffusion import bernoulli, sampling, schedules

T = 8


def transition(k_ts):
    """The 2x2 matrix P[a, b] = q(z_t = b | z_s = a) of (4), from its definition."""
    stay = (1 + k_ts) / 2
    return np.array([[stay, 1 - stay], [1 - stay, stay]])


@pytest.mark.parametrize("name", ["linear", "cos"])
def test_schedule_falls_from_one_to_zero(name):
    keep = schedules.keep_schedule(name, T)
    assert keep.shape == (T + 1,) and keep[0] == 1
    np.testing.assert_allclose(keep[T], 0, atol=1e-15)
    assert np.all(np.diff(keep) < 0)


def test_linear_schedule_has_the_closed_form_beta():
    keep = schedules.keep_schedule("linear", T)
    t = np.arange(1, T + 1)
    np.testing.assert_allclose(1 - keep[1:] / keep[:-1], 1 / (T - t + 1), rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "cos"])
def test_schedule_agrees_with_the_reference_numbers(name):
    golden = np.load("tests/data/schedules.npz")
    for steps in (64, 256):
        np.testing.assert_allclose(
            schedules.keep_schedule(name, steps), golden[f"{name}_{steps}_k"], atol=1e-6
        )


def test_schedule_refuses_unknown_names_and_no_steps():
    with pytest.raises(ValueError, match="'linear' or 'cos', got 'liner'"):
        schedules.keep_schedule("liner", T)
    with pytest.raises(ValueError, match="at least 1"):
        schedules.keep_schedule("linear", 0)


@pytest.mark.parametrize("steps", [1, 3, 16, 64])
def test_visited_times_fall_from_T_to_0_without_repeats(steps):
    times = schedules.visited_times(steps, 64)
    assert len(times) == steps + 1 and times[0] == 64 and times[-1] == 0
    assert np.all(np.diff(times) < 0)
    assert np.ptp(np.diff(times)) <= 1  # evenly spaced, up to rounding


@pytest.mark.parametrize("steps", [0, -1, 65])
def test_visited_times_refuse_impossible_numbers_of_steps(steps):
    with pytest.raises(ValueError, match="between 1 and 64"):
        schedules.visited_times(steps, 64)


def test_direct_jump_equals_composed_steps():
    keep = schedules.keep_schedule("linear", T)
    for z_0 in (0, 1):
        p = np.eye(2)[z_0]
        for t in range(1, T + 1):
            p = p @ transition(keep[t] / keep[t - 1])
            jump = bernoulli.forward_probs(jnp.float32(z_0), jnp.float32(keep[t]))
            np.testing.assert_allclose(jump, p[1], atol=1e-6)


def test_posterior_is_bayes_rule_for_all_pairs_of_times():
    keep = schedules.keep_schedule("linear", T)
    for s, t in itertools.combinations(range(T + 1), 2):
        to_s, s_to_t = transition(keep[s]), transition(keep[t] / keep[s])
        for z_0, z_t in itertools.product((0, 1), repeat=2):
            joint = to_s[z_0] * s_to_t[:, z_t]
            got = bernoulli.posterior_probs(
                jnp.float32(z_t), jnp.float32(z_0), jnp.float32(keep[t]), jnp.float32(keep[s])
            )
            np.testing.assert_allclose(got, joint[1] / joint.sum(), atol=1e-6)


def test_mixture_posterior_is_the_expectation_of_the_posterior():
    keep = schedules.keep_schedule("linear", T)
    p_0 = jnp.float32(0.3)
    for s, t in itertools.combinations(range(T + 1), 2):
        for z_t in (0.0, 1.0):
            k_t, k_s = jnp.float32(keep[t]), jnp.float32(keep[s])
            z_t = jnp.float32(z_t)
            by_hand = 0.3 * bernoulli.posterior_probs(
                z_t, jnp.float32(1), k_t, k_s
            ) + 0.7 * bernoulli.posterior_probs(z_t, jnp.float32(0), k_t, k_s)
            got = bernoulli.mixture_posterior_probs(z_t, p_0, k_t, k_s)
            np.testing.assert_allclose(got, by_hand, atol=1e-6)
            if s == 0:
                np.testing.assert_allclose(got, p_0, atol=1e-6)


def test_flip_evidence_is_the_log_odds_of_the_noise():
    keep = schedules.keep_schedule("linear", T)[1:]
    b = (1 - keep) / 2
    got = bernoulli.flip_evidence(jnp.asarray(keep, jnp.float32))
    np.testing.assert_allclose(got, np.log(b / (1 - b)), atol=1e-6)
    assert got[-1] == 0  # t = T: z_T says nothing


def test_flip_evidence_plus_the_other_bits_evidence_is_the_exact_flip_probability():
    # Three bits with a non-product distribution; by brute force over all of them.
    states = np.array(list(itertools.product((0, 1), repeat=3)))
    p_data = np.array([0.30, 0.02, 0.05, 0.13, 0.08, 0.12, 0.03, 0.27])
    k_t = 0.6
    noise = np.where(states[:, None] == states[None], (1 + k_t) / 2, (1 - k_t) / 2)
    joint = p_data[:, None] * noise.prod(axis=-1)  # [z_0, z_t]
    for bit in range(3):
        flipped = states[:, None, bit] != states[None, :, bit]
        truth = (joint * flipped).sum(0) / joint.sum(0)
        # What the other bits say: the same posterior with this bit's own noise left out.
        others = p_data[:, None] * np.delete(noise, bit, axis=-1).prod(axis=-1)
        odds = np.log((others * flipped).sum(0) / (others * ~flipped).sum(0))
        logit = odds + bernoulli.flip_evidence(jnp.float32(k_t))
        np.testing.assert_allclose(jax.nn.sigmoid(logit), truth, atol=1e-6)


def test_z_0_probs_turns_flips_into_values():
    logit = jnp.array([2.0, 2.0, -1.0, -1.0])
    z_t = jnp.array([0.0, 1.0, 0.0, 1.0])
    f = 1 / (1 + np.exp(-np.asarray(logit)))
    np.testing.assert_allclose(
        bernoulli.z_0_probs(logit, z_t), z_t * (1 - f) + (1 - z_t) * f, atol=1e-7
    )


def test_flip_loss_is_the_cross_entropy_of_the_flip():
    logit = jnp.array([0.7, -0.2])
    f = 1 / (1 + np.exp(-np.asarray(logit)))
    got = bernoulli.flip_loss(logit, jnp.array([1.0, 1.0]), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(got, [-np.log(f[0]), -np.log(1 - f[1])], rtol=1e-6)


# Sampling


def sample(denoise, n, steps, key=0, num_timesteps=64, known=None, mask=None, **options):
    shape = (n, 1, 1, 6) if known is None else known.shape
    nothing = jnp.zeros(shape)
    return sampling.reverse_process(
        jax.random.key(key),
        denoise,
        shape,
        times=schedules.visited_times(steps, num_timesteps),
        keep=jnp.asarray(schedules.keep_schedule("linear", num_timesteps), jnp.float32),
        temperature=options.pop("temperature", 1.0),
        known=nothing if known is None else known,
        known_mask=nothing if mask is None else mask,
        **options,
    )


@functools.cache
def six_bits():
    """All codes of six bits, and a distribution of them that is far from a product."""
    states = np.array(list(itertools.product((0, 1), repeat=6)), np.float64)
    weights = np.exp(3 * np.cos(states @ np.array([1.0, 2, 3, 4, 5, 6])))
    return states, weights / weights.sum()


def true_denoise(z_t, t):
    """The exact flip log-odds under the data distribution of `six_bits`."""
    states, p_data = six_bits()
    k_t = 1 - t / 64
    states = jnp.asarray(states, jnp.float32)
    same = states[None] == z_t.reshape(-1, 1, 6)
    noise = jnp.where(same, (1 + k_t) / 2, (1 - k_t) / 2)
    posterior = jnp.asarray(p_data, jnp.float32)[None] * jnp.prod(noise, axis=-1)
    p_0 = (posterior @ states) / jnp.sum(posterior, axis=-1, keepdims=True)
    p_0 = jnp.clip(p_0, 1e-6, 1 - 1e-6).reshape(z_t.shape)
    return jnp.log(p_0 / (1 - p_0)) * (1 - 2 * z_t)


@pytest.mark.parametrize("threshold_last", [False, True])
def test_ancestral_sampling_with_the_true_denoiser_gives_the_data_distribution(threshold_last):
    states, p_data = six_bits()
    n = 40_000
    codes, _ = sample(true_denoise, n, steps=64, threshold_last=threshold_last)
    codes = np.asarray(codes).reshape(n, 6)
    counts = np.bincount((codes @ 2 ** np.arange(5, -1, -1)).astype(int), minlength=64)
    # Bit marginals to four standard errors, and the joint distribution in total variation.
    np.testing.assert_allclose(codes.mean(0), p_data @ states, atol=0.01)
    assert 0.5 * np.abs(counts / n - p_data).sum() < 0.05


def test_one_step_draws_each_bit_from_the_prediction():
    # A denoiser that is sure that every flip leads to the code of ones.
    codes, states = sample(lambda z_t, t: 20 * (1 - 2 * z_t), 8, steps=1)
    assert np.all(np.asarray(codes) == 1)
    assert states.shape == (2, 8, 1, 1, 6)


def test_trajectory_starts_uniform_and_ends_in_the_codes():
    codes, states = sample(lambda z_t, t: jnp.zeros_like(z_t), 5_000, steps=4)
    np.testing.assert_allclose(np.mean(states[0]), 0.5, atol=0.02)
    np.testing.assert_array_equal(states[-1], codes.astype(bool))


def test_temperature_divides_the_flip_logits():
    # At the last step p_0 = sigmoid(logit / tau) for a bit that is 0, by (8) with s = 0.
    shares = []
    for temperature in (0.5, 2.0):
        codes, states = sample(
            lambda z_t, t: jnp.full_like(z_t, -1.0), 20_000, steps=1, temperature=temperature
        )
        was_zero = ~np.asarray(states[0])
        shares.append(np.asarray(codes)[was_zero].mean())
    np.testing.assert_allclose(shares, 1 / (1 + np.exp([2.0, 0.5])), atol=0.01)


def test_threshold_takes_the_likelier_bit_at_the_last_step():
    codes, states = sample(
        lambda z_t, t: jnp.full_like(z_t, -0.1), 100, steps=1, threshold_last=True
    )
    np.testing.assert_array_equal(codes, states[0])  # a flip is the less likely


def test_known_bits_never_change():
    known = jax.random.bernoulli(jax.random.key(3), shape=(200, 1, 1, 6)).astype(jnp.float32)
    mask = jnp.broadcast_to(jnp.array([1.0, 1, 1, 0, 0, 0])[None, None, None], known.shape)
    codes, states = sample(true_denoise, 200, steps=8, known=known, mask=mask)
    np.testing.assert_array_equal(
        np.asarray(states)[..., :3], np.tile(known[None, ..., :3].astype(bool), (9, 1, 1, 1, 1))
    )
    assert np.mean(states[0][..., 3:] != codes[..., 3:].astype(bool)) > 0.05  # the others do


def test_completions_follow_the_known_bits():
    states, p_data = six_bits()
    given = np.array([1, 0, 1])
    match = (states[:, :3] == given).all(axis=1)
    conditional = (p_data[match] @ states[match]) / p_data[match].sum()
    marginal = p_data @ states
    n = 20_000
    known = jnp.tile(jnp.array([1.0, 0, 1, 0, 0, 0])[None, None, None], (n, 1, 1, 1))
    mask = jnp.tile(jnp.array([1.0, 1, 1, 0, 0, 0])[None, None, None], (n, 1, 1, 1))
    codes, _ = sample(true_denoise, n, steps=64, known=known, mask=mask)
    got = np.mean(codes, axis=(0, 1, 2))
    np.testing.assert_array_equal(got[:3], given)
    # Not exact: the denoiser takes known bits for noisy ones. But nearer than ignoring them.
    far = np.abs(marginal - conditional)[3:]
    assert np.all(np.abs(got - conditional)[3:] < np.maximum(0.6 * far, 0.06)), (got, far)


def test_guidance_extrapolates_from_the_unconditional_logits():
    def conditional(z_t, t):
        return jnp.full_like(z_t, 2.0)

    def unconditional(z_t, t):
        return jnp.full_like(z_t, 0.5)

    z_t = jnp.zeros((1, 1, 1, 2))
    for w in (0.0, 1.0, 2.5):
        guided = sampling.with_guidance(conditional, unconditional, jnp.float32(w))
        np.testing.assert_allclose(guided(z_t, 1), (1 + w) * 2.0 - w * 0.5, rtol=1e-6)
