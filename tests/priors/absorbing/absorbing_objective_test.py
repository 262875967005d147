"""Which units are hidden when, and the loss, whose weights are checked against the bound."""

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_conditionals import TrueNetwork, given
from scipy import integrate, stats

from binlatent.priors import schedules
from binlatent.priors.absorbing import objective, process
from binlatent.priors.absorbing.prior import AbsorbingPrior
from binlatent.priors.step import draw_batch
from binlatent.priors.transformer import Transformer

SCHEDULES = (*schedules.NAMES, (1.0, 0.7, 0.2, 0.0))
U = 6


# Hidden units


@pytest.mark.parametrize("unit, g", [("token", 12), ("bit", 1), (3, 3), ("4", 4), (12, 12)])
def test_units_are_groups_of_bits_of_a_token(unit, g):
    assert process.bits_of_unit(unit, 12) == g
    units = jax.random.uniform(jax.random.key(0), (2, 3, 3, 12 // g))
    bits = process.by_bits(units, g)
    assert bits.shape == (2, 3, 3, 12)
    for i in range(12):
        np.testing.assert_array_equal(bits[..., i], units[..., i // g])
    np.testing.assert_array_equal(process.by_units(bits, g)[..., -1], units)


@pytest.mark.parametrize("unit", ["bits", 0, -3, 5, "1.5", 24, ""])
def test_units_that_do_not_divide_a_token_are_refused(unit):
    with pytest.raises(ValueError, match="divides the 12 bits of a token; got"):
        process.bits_of_unit(unit, 12)


def test_lowest_takes_as_many_as_asked_for_of_each_image():
    score = jnp.array([[3.0, 1, 2, 1], [0, 0, 0, 0], [jnp.inf, 1, jnp.inf, 0]])[:, :, None]
    found = process.lowest(score, jnp.array([3, 2, 2]))[:, :, 0]
    np.testing.assert_array_equal(
        found, [[False, True, True, True], [True, True, False, False], [False, True, False, True]]
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_times_of_counts_are_where_the_schedule_has_them(schedule):
    times = process.times_of_counts(schedule, 50)
    np.testing.assert_allclose(times[[0, -1]], [0, 1], atol=1e-12)
    np.testing.assert_allclose(
        schedules.keep_at(schedule, times), 1 - np.arange(51) / 50, atol=1e-9
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_units", [6, 64, 384])
def test_each_call_reveals_at_least_one_unit_and_follows_the_schedule(schedule, num_units):
    for steps in {1, 2, 5, num_units // 2, num_units}:
        counts = process.hidden_counts(schedule, num_units, steps)
        assert counts[0] == num_units and counts[-1] == 0 and len(counts) == steps + 1
        assert np.all(np.diff(counts) <= -1)
        if num_units / steps > 30:  # up to rounding
            share = 1 - schedules.keep_at(schedule, np.linspace(1, 0, steps + 1))
            np.testing.assert_allclose(counts / num_units, share, atol=1 / num_units)
    np.testing.assert_array_equal(process.hidden_counts("linear", 8, 4), [8, 6, 4, 2, 0])


def make_prior(**fields):
    return AbsorbingPrior((1, 1, 6), TrueNetwork(), **{"unit": "bit"} | fields)


@pytest.mark.parametrize("schedule", ["linear", "cos"])
def test_a_unit_is_hidden_with_the_schedules_probability(schedule):
    # Up to whole units, at each of 400 times.
    shape, n = (4, 4, 8), 400
    prior = AbsorbingPrior(shape, None, unit=4, schedule=schedule)
    _, _, noise = draw_batch(prior, jax.random.key(0), jnp.full((n, *shape), 0.5), None)
    assert noise.order.shape == (n, 4, 4, 2) and noise.u.shape == (n,)
    order = np.sort(noise.u)
    np.testing.assert_allclose(order, (np.arange(n) + 0.5) / n, atol=0.5 / n + 1e-6)
    seen = {}

    class Recorder:
        def apply(self, params, z, time, label, given):
            seen.update(z=np.asarray(z), time=np.asarray(time))
            return jnp.zeros(z.shape)

    bits = jnp.ones((n, *shape))
    times = process.times_of_counts(schedule, 32)
    objective.image_terms(Recorder(), {}, bits, None, noise, times)
    hidden = seen["z"] == 0.5  # halfway between the bits, so that the network embeds it as 0
    assert np.all(hidden | (seen["z"] == 1))
    share = 1 - schedules.keep_at(schedule, np.asarray(noise.u, np.float64))
    count = np.maximum(np.ceil(32 * share - 1e-4), 1)
    np.testing.assert_array_equal(hidden.sum(axis=(1, 2, 3)), 4 * count)
    np.testing.assert_allclose(seen["time"], hidden.mean(axis=(1, 2, 3)), rtol=1e-6)
    units = hidden.reshape(n, 4, 4, 2, 4)
    assert np.all(units == units[..., :1])
    rate = units[..., 0].mean(axis=0)  # of each of the 32 units
    deviation = np.sqrt(np.mean(share * (1 - share)) / n)
    assert np.abs(rate - share.mean() - 1 / 64).max() < 4.5 * deviation


# The loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weights_make_the_mean_the_bound_in_continuous_time(schedule):
    # Any cross-entropy for each number of hidden units; the bound by its integral.
    nats = np.random.default_rng(0).uniform(1, 2, U + 1) * np.arange(U + 1)

    def integrand(u):
        keep = float(schedules.keep_at(schedule, np.float64(u)))
        slope = np.diff(schedules.keep_at(schedule, np.array([u - 1e-6, u + 1e-6])))[0] / 2e-6
        masks = stats.binom.pmf(np.arange(U + 1), U, 1 - keep)  # each unit drawn independently
        return -slope / (1 - keep) * (masks @ nats)

    kinks = [1 / 3, 2 / 3] if isinstance(schedule, tuple) else None
    bound, _ = integrate.quad(integrand, 1e-5, 1 - 1e-5, points=kinks, epsabs=1e-7, limit=200)
    times = process.times_of_counts(schedule, U)
    found = np.diff(times) @ (process.bound_weights(times) * nats)[1:]
    np.testing.assert_allclose(found, bound, rtol=2e-4)
    if schedule == "linear":
        np.testing.assert_allclose(process.bound_weights(times)[1:], U / np.arange(1, U + 1))


@pytest.mark.parametrize("schedule", ["linear", "cos"])
@pytest.mark.parametrize("unit, g", [("bit", 1), (2, 2), ("token", 6)])
def test_the_mean_loss_is_the_bound_of_one_unit_a_call(schedule, unit, g):
    prior = make_prior(unit=unit, schedule=schedule)
    num = 6 // g
    # All sets of hidden units, by brute force; sets of one size are equally likely.
    expected, losses = np.zeros(64), np.zeros(64)
    times = process.times_of_counts(schedule, num)
    codes = jnp.asarray(chain.STATES, jnp.float32).reshape(64, 1, 1, 6)
    loss = jax.jit(lambda noise: prior.image_metrics({}, codes, None, noise)["bce"])
    for hidden in np.array(list(np.ndindex(*(2,) * num)), bool)[1:]:
        m = hidden.sum()
        share = 1 / stats.binom.pmf(m, num, 0.5) / 2**num  # of the sets of that size
        bits = np.repeat(hidden, g)
        for i, code in enumerate(chain.STATES):
            p = given(tuple(~bits), tuple(code))
            nats = -np.log(np.where(code == 1, p, 1 - p))[bits].sum()
            expected[i] += share * nats / m
        order = np.where(hidden, 0.1, 0.9)
        u = (times[m] + times[m - 1]) / 2
        noise = objective.Noise(
            jnp.broadcast_to(jnp.asarray(order, jnp.float32), (64, 1, 1, num)), jnp.full(64, u)
        )
        losses += share * (times[m] - times[m - 1]) * np.asarray(loss(noise), np.float64)
    np.testing.assert_allclose(losses * 6, expected, rtol=1e-5)
    if g == 1:  # for the truth, the sum over bits is the entropy
        length = chain.P_DATA @ losses * 6 / np.log(2)
        np.testing.assert_allclose(length, chain.ENTROPY_BITS, rtol=1e-5)


class Zeros(TrueNetwork):
    """Gives 1/2 for each bit."""

    def apply(self, params, z, time, label=None, given=None):
        return jnp.zeros(z.shape)


def test_falling_weights_are_one_less_the_time():
    n, shape = 64, (4, 4, 8)
    prior = AbsorbingPrior(shape, Zeros(), time_weight="falling")
    bits, condition, noise = draw_batch(prior, jax.random.key(1), jnp.full((n, *shape), 0.5), None)
    loss, metrics = jax.jit(prior.loss)({}, bits, condition, noise)
    u = np.asarray(noise.u, np.float64)
    expected = np.mean((1 - u) * np.ceil(16 * u) / 16 * np.log(2))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["loss"] == loss and 0.3 < metrics["accuracy"] < 0.7
    # A network without information has a bound of one bit per bit, for each image.
    bce = jax.jit(prior.image_metrics)({}, bits, condition, noise)["bce"]
    np.testing.assert_allclose(bce, np.log(2), rtol=1e-5)


def test_accuracy_is_of_the_hidden_bits_alone():
    prior = make_prior(unit="bit")
    codes = jnp.asarray(chain.STATES, jnp.float32).reshape(64, 1, 1, 6)
    hidden = np.array([True, False, False, True, False, True])
    noise = objective.Noise(
        jnp.broadcast_to(jnp.where(hidden, 0.1, 0.9), (64, 1, 1, 6)), jnp.full(64, 0.45)
    )
    _, metrics = jax.jit(prior.loss)({}, codes, None, noise)
    right = [
        np.mean((given(tuple(~hidden), tuple(code)) > 0.5)[hidden] == code[hidden])
        for code in chain.STATES
    ]
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-5)


def test_gradients_are_finite_in_bfloat16():
    network = Transformer(16, 1, 2, dtype=jnp.bfloat16)
    prior = AbsorbingPrior((4, 4, 8), network, unit="bit", schedule="cos")

    @jax.jit
    def gradients():
        params = jax.tree.map(lambda x: x + 0.1, prior.init(jax.random.key(0), None))
        bits, _, noise = draw_batch(prior, jax.random.key(1), jnp.full((8, 4, 4, 8), 0.5), None)
        u = jnp.array([1e-30, 1e-6, 0.01, 0.5, 0.9, 0.99, 1 - 1e-7, 1.0])  # with both ends
        return jax.grad(prior.loss, has_aux=True)(params, bits, None, noise._replace(u=u))[0]

    found = gradients()
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
    assert any(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(found))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"unit": 5}, "divides the 6 bits of a token; got 5"),
        ({"schedule": "sin"}, "schedule must be one of linear, .*got 'sin'"),
        ({"schedule": "given"}, "config.prior.absorbing.keep, k_0 to k_T, must be set if"),
        ({"schedule": "given", "keep": (1.0, 0.5)}, "must end at 0, .* its last k is 0.5"),
        ({"time_weight": "mean"}, "time_weight must be one of bound, falling; got 'mean'"),
    ],
)
def test_what_is_no_process_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_prior(**fields)
