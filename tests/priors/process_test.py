"""The process, its posteriors and the targets against sums over all 64 codes of a chain."""

import itertools

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.priors import schedules
from binlatent.priors.bernoulli import losses, process, targets

T = 8
KEEP = schedules.keep_schedule("linear", T)
PAIRS_OF_TIMES = list(itertools.combinations(range(T + 1), 2))  # all s < t
CODES = jnp.asarray(chain.STATES, jnp.float32)


def logit(p):
    return np.log(p) - np.log1p(-p)


def true_flips(k_t):
    """(64, 6), P(z_0^i != z_t^i | z_t), by brute force."""
    return np.abs(chain.bits_given(k_t, 1.0) - chain.STATES)


def other_flips(k_t):
    """(64, 6), the same without the i-th bit's own evidence."""
    return np.abs(chain.bits_given_others(k_t) - chain.STATES)


def test_composed_steps_equal_the_direct_jump_and_the_functions():
    for s, t in PAIRS_OF_TIMES:
        composed = np.eye(64)
        for i in range(s, t):
            composed = composed @ chain.transition(KEEP[i + 1] / KEEP[i])
        np.testing.assert_allclose(composed, chain.transition(KEEP[t] / KEEP[s]), atol=1e-14)
        got = process.transition_probs(CODES, KEEP[t], KEEP[s])
        np.testing.assert_allclose(chain.product_kernel(got), composed, atol=1e-6)
        np.testing.assert_allclose(
            chain.P_DATA @ chain.product_kernel(process.forward_probs(CODES, KEEP[t])),
            chain.marginal(KEEP[s]) @ composed,
            atol=1e-6,
        )


def test_posterior_is_bayes_rule_for_all_pairs_of_times():
    for s, t in PAIRS_OF_TIMES:
        for z_0, z_t in itertools.product((0, 1), repeat=2):
            to_s = np.array([1 - KEEP[s], 1 + KEEP[s]]) / 2  # of z_0 = 1: P(z_s = 0), P(z_s = 1)
            k_ts = KEEP[t] / KEEP[s]
            to_t = np.where(np.arange(2) == z_t, (1 + k_ts) / 2, (1 - k_ts) / 2)
            joint = (to_s if z_0 else to_s[::-1]) * to_t
            got = process.posterior_probs(z_t, z_0, KEEP[t], KEEP[s])
            np.testing.assert_allclose(got, joint[1] / joint.sum(), atol=1e-6)


@pytest.mark.parametrize("name", schedules.NAMES)
def test_the_two_pairs_are_exact_a_bit_at_a_time(name):
    keep = schedules.keep_schedule(name, T)
    for s, t in PAIRS_OF_TIMES:
        truth = chain.bits_given(keep[t], keep[s])
        plain = jnp.asarray(chain.bits_given(keep[t], 1.0), jnp.float32)
        balanced = jnp.asarray(chain.bits_given_others(keep[t]), jnp.float32)
        mixture = process.mixture_posterior_probs(CODES, plain, keep[t], keep[s])
        plugin = process.plugin_posterior_probs(CODES, balanced, keep[t], keep[s])
        np.testing.assert_allclose(mixture, truth, atol=2e-6)
        np.testing.assert_allclose(plugin, truth, atol=2e-6)


def test_the_crossed_pairs_are_not_exact():
    errors = {"mixture": 0.0, "plugin": 0.0}
    for s, t in PAIRS_OF_TIMES:
        truth = chain.bits_given(KEEP[t], KEEP[s])
        plain = jnp.asarray(chain.bits_given(KEEP[t], 1.0), jnp.float32)
        balanced = jnp.asarray(chain.bits_given_others(KEEP[t]), jnp.float32)
        mixture = process.mixture_posterior_probs(CODES, balanced, KEEP[t], KEEP[s])
        plugin = process.plugin_posterior_probs(CODES, plain, KEEP[t], KEEP[s])
        errors["mixture"] = max(errors["mixture"], np.abs(mixture - truth).max())
        errors["plugin"] = max(errors["plugin"], np.abs(plugin - truth).max())
    assert errors["mixture"] > 0.15 and errors["plugin"] > 0.15, errors


def test_flip_evidence_is_the_difference_of_the_pairs_logits():
    for k_t in KEEP[1:]:
        evidence = process.flip_evidence(k_t)
        np.testing.assert_allclose(
            logit(other_flips(k_t)) + evidence, logit(true_flips(k_t)), atol=1e-5
        )
    b = (1 - KEEP[1:]) / 2
    np.testing.assert_allclose(process.flip_evidence(KEEP[1:]), logit(b), atol=1e-6)
    assert process.flip_evidence(0.0) == 0  # t = T: z_T has no information


def test_ancestral_sampling_with_the_truth_gives_the_data_marginals():
    # The exact distribution, step by step through all 64 times, without sampling error.
    keep = schedules.keep_schedule("linear", 64)
    p = np.full(64, 1 / 64)
    for t in range(64, 0, -1):
        p_0 = jnp.asarray(chain.bits_given(keep[t], 1.0), jnp.float32)
        probs = process.mixture_posterior_probs(CODES, p_0, keep[t], keep[t - 1])
        p = p @ chain.product_kernel(probs)
    np.testing.assert_allclose(p @ chain.STATES, chain.MARGINALS, atol=0.01)
    assert 0.5 * np.abs(p - chain.P_DATA).sum() < 0.03
    # In one step bits are independent: only the marginals are right.
    once = chain.product_kernel(chain.bits_given(0.0, 1.0)).mean(0)
    assert 0.5 * np.abs(once - chain.P_DATA).sum() > 0.2


def test_corrector_leaves_the_marginal_to_first_order():
    k_t = 0.6
    q = chain.marginal(k_t)
    balanced = jnp.asarray(logit(other_flips(k_t)), jnp.float32)
    changes = []
    for size in (0.2, 0.1, 0.05):
        flips = np.asarray(process.corrector_flip_probs(balanced, k_t, size), np.float64)
        kernel = chain.product_kernel(np.abs(chain.STATES - flips))
        changes.append(np.abs(q @ kernel - q).sum())
    # Second order: half the size gives a quarter of the change.
    np.testing.assert_allclose(changes[:-1], 4 * np.array(changes[1:]), rtol=0.2)
    assert changes[-1] < 0.05**2
    # It corrects errors: from uniform bits each step comes nearer to q.
    p, distances = np.full(64, 1 / 64), []
    for _ in range(30):
        distances.append(np.abs(p - q).sum())
        p = p @ kernel
    assert np.all(np.diff(distances) < 0) and distances[-1] < 0.5 * distances[0]


def test_corrector_draws_a_bit_from_its_conditional():
    k_t = 0.6
    q = chain.marginal(k_t)
    flips = process.corrector_flip_probs(jnp.asarray(logit(other_flips(k_t))), k_t, 1.0)
    for i in range(chain.BITS):
        other = q[np.arange(64) ^ (32 >> i)]  # of the code with the i-th bit flipped
        np.testing.assert_allclose(flips[:, i], other / (q + other), atol=1e-6)


# Targets


def test_targets_are_turned_into_each_other():
    for s, t in PAIRS_OF_TIMES:
        truth = logit(true_flips(KEEP[t]))
        z_0 = logit(chain.bits_given(KEEP[t], 1.0))
        np.testing.assert_allclose(targets.flip_from_z_0(z_0, CODES), truth, atol=1e-5)
        z_s = targets.z_s_from_flip(jnp.asarray(truth), CODES, KEEP[t], KEEP[s])
        brute = chain.bits_given(KEEP[t], KEEP[s])
        np.testing.assert_allclose(jax.nn.sigmoid(z_s), brute, atol=2e-6)
        back = targets.flip_from_z_s(z_s, CODES, KEEP[t], KEEP[s])
        np.testing.assert_allclose(jax.nn.sigmoid(back), true_flips(KEEP[t]), atol=1e-4)
    np.testing.assert_allclose(
        targets.z_0_probs(jnp.asarray(truth), CODES), jax.nn.sigmoid(z_0), atol=1e-6
    )


def test_impossible_z_s_become_the_nearest_possible():
    # A mixture is between q(z_s = 1 | z_t, z_0 = 0) and q(z_s = 1 | z_t, z_0 = 1).
    low, high = (float(process.posterior_probs(1.0, z_0, 0.5, 0.75)) for z_0 in (0.0, 1.0))
    wanted = jnp.array([low - 0.1, (low + high) / 2, high + 0.01])
    got = targets.flip_from_z_s(jnp.log(wanted / (1 - wanted)), jnp.ones(3), 0.5, 0.75)
    np.testing.assert_allclose(jax.nn.sigmoid(got), [1, 0.5, 0], atol=1e-5)


# Extreme values


@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("num_timesteps", [64, 1000, 4000])
def test_the_bound_is_finite_at_every_step_of_long_schedules(name, num_timesteps):
    rng = np.random.default_rng(0)
    u = np.sort(rng.uniform(0, 1, (20_000, 2)))  # and at any two times
    s = np.concatenate([np.arange(num_timesteps) / num_timesteps, u[:, 0]])
    t = np.concatenate([np.arange(1, num_timesteps + 1) / num_timesteps, u[:, 1]])
    keep = [schedules.keep_at(name, jnp.asarray(x, jnp.float32))[:, None, None] for x in (t, s)]
    logit, z_t, z_0 = (
        x.ravel()[None, :, None]
        for x in jnp.meshgrid(jnp.array([-9.0, 0, 9]), jnp.arange(2.0), jnp.arange(2.0))
    )
    kl = losses.posterior_kl(logit, z_t, z_0, *keep)
    assert np.all(np.isfinite(kl)) and np.all(kl > -1e-5)
    for probs in (*process.stay_probs(*keep), *process.leave_probs(*keep)):
        assert np.all((probs >= 0) & (probs <= 1))
    stays = zip(process.stay_probs(*keep), process.leave_probs(*keep), strict=True)
    for stay, leave in stays:
        np.testing.assert_allclose(stay + leave, 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "k_t, k_s",
    [
        (0, 1),
        (0, 0.5),
        (0, 1e-6),
        (0, 0),
        (0.999, 1),
        (1 - 1e-7, 1),
        (1, 1),
        (0.5, 0.5),
        (0.3, 0.9),
    ],
)
def test_everything_is_finite_at_every_level_of_noise(dtype, k_t, k_s):
    k_t, k_s = jnp.asarray(k_t, dtype), jnp.asarray(k_s, dtype)
    values = jnp.array([-60.0, -20.0, -1.0, 0.0, 2.0, 20.0, 60.0])
    output, z_t, z_0 = (
        x.ravel().astype(dtype) for x in jnp.meshgrid(values, jnp.arange(2.0), jnp.arange(2.0))
    )

    def everything(output):
        flips = output + process.flip_evidence(k_t)
        p_0 = targets.z_0_probs(flips, z_t)
        return {
            "kl": losses.posterior_kl(flips, z_t, z_0, k_t, k_s),
            "mixture": process.mixture_posterior_probs(z_t, p_0, k_t, k_s),
            "plugin": process.plugin_posterior_probs(z_t, p_0, k_t, k_s),
            "exact": process.posterior_probs(z_t, z_0, k_t, k_s),
            "z_s": targets.z_s_from_flip(flips, z_t, k_t, k_s),
            "flip": targets.flip_from_z_s(output, z_t, k_t, k_s),
            "corrector": process.corrector_flip_probs(output, k_t, 0.1),
            "forward": process.transition_probs(z_t, k_t, k_s),
            "bce": losses.bce(flips, process.flip_target(z_t, z_0)),
        }

    result = everything(output)
    for name, value in result.items():
        assert value.dtype == jnp.float32, name
        assert np.all(np.isfinite(value)), name
        gradient = jax.grad(lambda x, name=name: everything(x)[name].sum())(output)
        assert np.all(np.isfinite(gradient.astype(jnp.float32))), name
    for name in ("mixture", "plugin", "exact", "corrector", "forward"):
        assert np.all((result[name] >= 0) & (result[name] <= 1)), name
    assert np.all(result["kl"] >= -1e-5)


def test_half_precision_inputs_are_computed_in_single():
    # The inputs are exact in bfloat16, so the result must be exact in float32.
    half = process.posterior_probs(*(jnp.asarray(x, jnp.bfloat16) for x in (1, 0, 0.5, 0.75)))
    single = process.posterior_probs(*(jnp.asarray(x, jnp.float32) for x in (1, 0, 0.5, 0.75)))
    np.testing.assert_array_equal(half, single)
