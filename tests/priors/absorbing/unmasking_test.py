"""Sampling and the bound of the absorbing diffusion, on the chain against brute force."""

import functools
import itertools

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_conditionals import TrueNetwork, check_drawn, distance, given, sampled

from binlatent.priors.absorbing import process, sampling
from binlatent.priors.absorbing.objective import logits
from binlatent.priors.absorbing.prior import AbsorbingPrior, AbsorbingSettings
from binlatent.priors.conditions import Condition
from binlatent.priors.guidance import noise_from_keys
from binlatent.priors.prior import Known

N = 20_000
BITS = AbsorbingPrior((1, 1, 6), TrueNetwork(), unit="bit")
PAIRS = AbsorbingPrior((1, 1, 6), TrueNetwork(), unit=2)
TOKENS = AbsorbingPrior((1, 3, 2), TrueNetwork(), unit="token")


def draw(prior, steps, n=N, known=None, key=0, **settings):
    keys = jax.random.split(jax.random.key(key), n)
    return prior.sample({}, keys, None, AbsorbingSettings(steps=steps, **settings), known)


def certainty(p, drawn):
    return np.mean(np.abs(2 * p - 1))


def likelihood(p, drawn):
    return np.sum(np.log(np.where(drawn == 1, p, 1 - p)))


# Random order


def test_one_bit_a_call_in_random_order_draws_the_data():
    np.testing.assert_allclose(sampled(range(6, -1, -1), 1), chain.P_DATA, rtol=1e-12)
    check_drawn(draw(BITS, 6), chain.P_DATA)


@pytest.mark.parametrize(
    "prior, steps", [(BITS, 1), (BITS, 2), (BITS, 4), (PAIRS, 1), (PAIRS, 2), (PAIRS, 3)]
)
def test_fewer_calls_draw_what_brute_force_predicts(prior, steps):
    counts = process.hidden_counts("linear", prior.max_steps, steps)
    expected = sampled(counts, prior.g)
    codes = draw(prior, steps)
    check_drawn(codes, expected)
    if steps == 1:  # all at once is the product of the marginals
        product = np.where(chain.STATES == 1, chain.MARGINALS, 1 - chain.MARGINALS).prod(axis=1)
        np.testing.assert_allclose(expected, product, rtol=1e-9)


def test_more_calls_are_nearer_to_the_data():
    far = [
        distance(sampled(process.hidden_counts("linear", 6, steps), 1), chain.P_DATA)
        for steps in (1, 2, 3, 6)
    ]
    assert far[0] > far[1] > far[2] > far[3] and far[3] < 1e-12, far


def test_tokens_on_a_grid_are_units_as_groups_of_a_token_are():
    codes = draw(TOKENS, 2)
    assert codes.shape == (N, 1, 3, 2)
    check_drawn(codes, sampled(process.hidden_counts("linear", 3, 2), 2))


def test_the_temperature_divides_the_log_odds():
    p = given((False,) * 6, (0,) * 6)
    sharper = 1 / (1 + ((1 - p) / p) ** 2)
    codes = draw(BITS, 1, temperature=0.5)
    np.testing.assert_allclose(np.mean(codes, axis=(0, 1, 2)), sharper, atol=4 * 0.5 / N**0.5)
    surest = draw(BITS, 6, n=200, temperature=1e-4)
    assert np.abs(np.asarray(surest) - 0.5).min() == 0.5


# By confidence


@pytest.mark.parametrize("prior, steps", [(BITS, 6), (BITS, 3), (PAIRS, 3), (PAIRS, 2)])
@pytest.mark.parametrize("score", [certainty, likelihood])
def test_the_order_by_confidence_draws_what_brute_force_predicts(prior, steps, score):
    counts = process.hidden_counts("linear", prior.max_steps, steps)
    expected = sampled(counts, prior.g, score)
    settings = dict(order="confidence", score=score.__name__, order_temperature=0.0)
    check_drawn(draw(prior, steps, **settings), expected)


def test_the_bias_of_the_order_by_confidence():
    # Total variation from the data, of bits by random order, certainty and likelihood.
    def biases(steps):
        counts = process.hidden_counts("linear", 6, steps)
        return [
            distance(sampled(counts, 1, s), chain.P_DATA) for s in (None, certainty, likelihood)
        ]

    # The most certain bit depends only on the visible bits, so one bit per call stays exact. A
    # choice that depends on the drawn bits is not exact.
    np.testing.assert_allclose(biases(6), [0, 0, 0.538], atol=1e-3)
    np.testing.assert_allclose(biases(3), [0.139, 0.174, 0.485], atol=1e-3)


def test_a_hot_order_is_a_random_one_and_it_cools():
    # With much noise the score does not matter; the last call keeps all that is left.
    expected = sampled([6, 4, 2, 0], 1)
    settings = dict(order="confidence", score="likelihood", order_temperature=1e6)
    check_drawn(draw(BITS, 3, **settings), expected)


def test_gumbel_noise_has_its_distribution():
    x = np.asarray(sampling.gumbel(jax.random.uniform(jax.random.key(0), (200_000,))))
    for value in (-1.0, 0.0, 1.0, 3.0):
        assert np.mean(x < value) == pytest.approx(np.exp(-np.exp(-value)), abs=0.005)
    assert np.isfinite(sampling.gumbel(jnp.zeros(1))).all()


def test_scores_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    logit, drawn = rng.normal(size=(5, 2, 2, 6)), rng.integers(0, 2, (5, 2, 2, 6))
    hidden = rng.integers(0, 2, (5, 2, 2, 6)).astype(bool)
    p = 1 / (1 + np.exp(-logit))
    for score in (certainty, likelihood):
        found = sampling.confidence(
            score.__name__,
            *(jnp.asarray(logit, jnp.float32), jnp.asarray(drawn, jnp.float32), hidden, 3),
        )
        for place in np.ndindex(5, 2, 2, 2):
            bits = (*place[:3], slice(3 * place[3], 3 * place[3] + 3))
            at = hidden[bits]
            if at.any():
                expected = score(p[bits][at], drawn[bits][at])
                np.testing.assert_allclose(found[place], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "second, third",
    [
        # The second call is certain of 2 to 5, so the units that the first kept are hidden again.
        ([0, 0, 9, 8, 7, 6], {0, 1, 5}),
        # Or it is no more certain than before: 2 is the most certain, and the first two stay.
        ([0, 0, 0.3, 0.2, 0.1, 0], {3, 4, 5}),
    ],
)
def test_revision_hides_again_what_was_least_sure_when_it_was_drawn(second, third):
    def hidden_at_each_call(revise):
        outputs = jnp.array([[0.5, 0.4, 0.3, 0.2, 0.1, 0.0], second, [0.0] * 6])

        def predict(z, hidden, w):  # its guidance is the index of the call
            return outputs[w][None, None, None]

        unmask = functools.partial(
            *(sampling.unmask, predict),
            order="confidence",
            revise=revise,
            return_trajectory=True,
            g=1,
        )
        unmask = jax.jit(unmask, static_argnums=0)
        _, passed = unmask(
            lambda i: jnp.full((1, 1, 1, 6), 0.5),
            jnp.zeros((1, 1, 1, 6)),
            jnp.ones((1, 1, 1, 6), bool),
            counts=jnp.array([6, 4, 3, 0]),
            guidance=jnp.arange(3),
        )
        return [set(np.flatnonzero(x).tolist()) for x in passed.hidden]

    everything = set(range(6))
    assert hidden_at_each_call(True) == [everything, {2, 3, 4, 5}, third, set()]
    assert hidden_at_each_call(False) == [everything, {2, 3, 4, 5}, {3, 4, 5}, set()]


# Known bits


def known_of(mask, bits, n=N):
    tile = functools.partial(np.broadcast_to, shape=(n, 1, 1, 6))
    return Known(jnp.asarray(tile(np.float32(bits))), jnp.asarray(tile(np.float32(mask))))


@pytest.mark.parametrize("mask", [[1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1]])
def test_bit_by_bit_completions_follow_the_conditional_exactly(mask):
    code = np.array([1, 0, 0, 1, 0, 1])
    match = (code == chain.STATES)[:, np.array(mask, bool)].all(axis=1)
    conditional = np.where(match, chain.P_DATA, 0) / chain.P_DATA[match].sum()
    # Unknown bits are ignored.
    codes = draw(BITS, 6, known=known_of(mask, np.where(mask, code, 7.0)))
    check_drawn(codes, conditional)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("score", [None, certainty])
def test_a_mask_may_cover_part_of_a_unit(steps, score):
    mask, code = (True, False, False, False, True, True), (1, 0, 0, 0, 0, 1)
    counts = process.hidden_counts("linear", 3, steps)
    expected = sampled(counts, 2, score, mask, code)
    settings = dict(order="confidence", order_temperature=0.0) if score else {}
    check_drawn(draw(PAIRS, steps, known=known_of(mask, code), **settings), expected)


def test_each_image_has_its_own_mask_and_known_bits_never_change():
    rng = np.random.default_rng(0)
    known = Known(*(jnp.asarray(rng.integers(0, 2, (500, 1, 1, 6)), jnp.float32) for _ in "12"))
    for settings in ({}, dict(order="confidence", revise=True)):
        codes = np.asarray(draw(BITS, 3, 500, known, **settings))
        given_bits = np.asarray(known.mask) == 1
        np.testing.assert_array_equal(codes[given_bits], np.asarray(known.bits)[given_bits])
        assert set(np.unique(codes)) == {0, 1}


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_counts_of_the_largest_codes_are_met(steps):
    counts = process.hidden_counts("linear", 2**16, steps)  # products of which exceed an int32
    free = jnp.ones((2, 32, 32, 64), bool).at[1, 8:].set(False)
    _, passed = sampling.unmask(
        lambda z, hidden, w: jnp.zeros(z.shape),
        noise_from_keys(jax.random.split(jax.random.key(0), 2), (32, 32, 64)),
        jnp.zeros(free.shape),
        free,
        g=1,
        counts=jnp.asarray(counts),
        guidance=jnp.zeros(steps),
        return_trajectory=True,
    )
    whole, part = np.sum(passed.hidden, axis=(2, 3, 4)).T
    np.testing.assert_array_equal(whole, counts)
    expected = [2**14]
    for before, after in zip(counts.tolist(), counts[1:].tolist(), strict=False):
        expected.append(expected[-1] * after // before)
    np.testing.assert_array_equal(part, expected)


def test_variations_hide_and_redraw_a_share_of_the_units():
    bits = jnp.broadcast_to(jnp.array([1.0, 0, 1, 0, 0, 1]), (N, 1, 1, 6))
    keys = jax.random.split(jax.random.key(3), N)
    settings = AbsorbingSettings(steps=6)
    found = BITS.vary({}, keys, None, settings, bits, 0.4)  # 2.4 of 6: three
    expected = np.zeros(64)
    for hidden in itertools.combinations(range(6), 3):
        visible = tuple(i not in hidden for i in range(6))
        match = (chain.STATES == [1, 0, 1, 0, 0, 1])[:, np.array(visible)].all(axis=1)
        expected += np.where(match, chain.P_DATA, 0) / chain.P_DATA[match].sum() / 20
    check_drawn(found, expected)
    # All units are drawn again.
    check_drawn(BITS.vary({}, keys, None, settings, bits, 1.0), chain.P_DATA)


# Noise, guidance and what is returned


def test_a_sample_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(0), 8)
    for settings in (AbsorbingSettings(3), AbsorbingSettings(3, order="confidence", revise=True)):
        whole = BITS.sample({}, keys, None, settings)
        parts = [BITS.sample({}, some, None, settings) for some in (keys[:4], keys[4:])]
        np.testing.assert_array_equal(whole, np.concatenate(parts))
        assert np.any(np.asarray(whole) != np.asarray(whole)[:1])


def test_the_trajectory_starts_hidden_and_ends_in_the_codes():
    keys = jax.random.split(jax.random.key(0), 500)
    settings = AbsorbingSettings(steps=3)
    passed = BITS.trajectory({}, keys, None, settings)
    assert passed.z_t.shape == passed.hidden.shape == (500, 4, 1, 1, 6)
    assert passed.z_t.dtype == bool and not passed.z_t[:, 0].any()
    counts = np.asarray(passed.hidden).sum(axis=(2, 3, 4))
    np.testing.assert_array_equal(counts, np.tile([6, 4, 2, 0], (500, 1)))
    np.testing.assert_array_equal(passed.z_t[:, -1], BITS.sample({}, keys, None, settings) == 1)
    for j in range(1, 3):  # what is revealed stays
        seen = ~np.asarray(passed.hidden[:, j])
        np.testing.assert_array_equal(passed.z_t[:, j][seen], passed.z_t[:, j + 1][seen])


class Labelled(TrueNetwork):
    """Prefers ones with a label, zeros without."""

    def apply(self, params, z, time, label=None, given=None):
        return jnp.full(z.shape, -0.5 if label is None else 1.0)


def test_guidance_moves_the_log_odds_away_from_those_without_a_label():
    prior = AbsorbingPrior((1, 1, 6), Labelled(), unit="bit")
    keys, condition = jax.random.split(jax.random.key(0), N), Condition(jnp.zeros(N, jnp.int32))

    def rate(condition, **settings):
        codes = prior.sample({}, keys, condition, AbsorbingSettings(steps=6, **settings))
        return np.mean(codes)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    assert rate(None, guidance=2.0) == pytest.approx(sigmoid(-0.5), abs=0.006)
    assert rate(condition) == pytest.approx(sigmoid(1), abs=0.006)
    guided = sigmoid(1 + np.arange(6) / 5 * 2.0 * 1.5)
    assert rate(condition, guidance=2.0) == pytest.approx(guided[-1], abs=0.006)
    rising = dict(guidance=2.0, guidance_schedule="rising")
    assert rate(condition, **rising) == pytest.approx(guided.mean(), abs=0.006)
    # Times from 1 to 1/6; the last two calls are outside.
    inside = dict(guidance=2.0, guidance_interval=(0.4, 1.0))
    mean = (4 * guided[-1] + 2 * guided[0]) / 6
    assert rate(condition, **inside) == pytest.approx(mean, abs=0.006)


@pytest.mark.parametrize(
    "settings, labelled, calls",
    [
        ({}, True, (4, 0)),
        ({}, False, (0, 4)),
        (dict(guidance=1.0), True, (4, 4)),
        (dict(guidance=1.0), False, (0, 4)),
        (dict(guidance=1.0, guidance_schedule="rising"), True, (4, 3)),
        (dict(guidance=1.0, guidance_interval=(0.5, 0.8)), True, (4, 2)),
    ],
)
def test_network_calls_are_those_that_are_made(settings, labelled, calls):
    made = {"with": 0, "without": 0}

    class Counted(TrueNetwork):
        def apply(self, params, z, time, label=None, given=None):
            name = "without" if label is None else "with"
            jax.debug.callback(lambda: made.update({name: made[name] + 1}))
            return jnp.zeros(z.shape)

    prior = AbsorbingPrior((1, 1, 6), Counted(), unit="bit")
    settings = AbsorbingSettings(steps=4, **settings)
    condition = Condition(jnp.zeros(2, jnp.int32)) if labelled else None
    jax.block_until_ready(
        prior.sample({}, jax.random.split(jax.random.key(0), 2), condition, settings)
    )
    jax.effects_barrier()
    assert prior.network_calls(settings, labelled) == calls == (made["with"], made["without"])


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(steps=7), "between 1 and 6, the number of units of a code, .* got 7"),
        (dict(steps=0), "between 1 and 6"),
        (dict(temperature=0.0), "temperature must be above 0"),
        (dict(order_temperature=-1.0), "order_temperature must be at least 0"),
        (dict(guidance=-1.0), "guidance must not be negative"),
        (dict(guidance_schedule="falling"), 'guidance_schedule must be "constant" or "rising"'),
        (dict(order="raster"), 'order must be "random" or "confidence"; got \'raster\''),
        (dict(score="sure"), 'score must be "certainty" or "likelihood"'),
        (dict(revise=True), 'revise needs the order "confidence"'),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BITS.check_settings(AbsorbingSettings(**{"steps": 6} | fields))


# The bound


def bound(counts, *, g=1, any_order=False):
    """The bound of each code over all orders of its units, without noise."""
    orders = np.array(list(itertools.permutations(range(6 // g))), np.float32) / 6
    codes = jnp.asarray(np.repeat(chain.STATES, len(orders), axis=0), jnp.float32)
    uniforms = np.tile(np.pad(orders, ((0, 0), (0, 6 - 6 // g))), (64, 1))
    found = sampling.likelihood_bound(
        lambda z, hidden: logits(TrueNetwork(), {}, z, hidden, None),
        lambda i: jnp.asarray(uniforms).reshape(-1, 1, 1, 6),
        codes.reshape(-1, 1, 1, 6),
        g=g,
        counts=jnp.asarray(counts),
        any_order=any_order,
    )
    return np.asarray(found, np.float64).reshape(64, -1).mean(axis=1)


def test_one_bit_a_call_has_the_entropy_for_its_bound():
    lengths = bound(range(6, -1, -1))
    np.testing.assert_allclose(lengths, -np.log2(chain.P_DATA), rtol=1e-5)
    np.testing.assert_allclose(chain.P_DATA @ lengths, chain.ENTROPY_BITS, rtol=1e-5)


@pytest.mark.parametrize("g, steps", [(1, 3), (2, 2), (2, 3)])
def test_the_bound_of_fewer_calls_is_that_of_their_sampler(g, steps):
    counts = process.hidden_counts("linear", 6 // g, steps)
    lengths, expected = bound(counts, g=g), np.zeros(64)
    orders = list(itertools.permutations(range(6 // g)))

    @functools.cache
    def surprise(visible):  # in bits, of each bit of each code
        p = np.array([given(visible, tuple(code)) for code in chain.STATES])
        return -np.log2(np.where(chain.STATES == 1, p, 1 - p))

    for order in orders:
        visible = np.zeros(6, bool)
        for count, after in itertools.pairwise(counts):
            revealed = np.repeat(np.isin(range(6 // g), order[6 // g - count : 6 // g - after]), g)
            expected += surprise(tuple(visible.tolist()))[:, revealed].sum(axis=1) / len(orders)
            visible |= revealed
    np.testing.assert_allclose(lengths, expected, rtol=1e-5)
    assert np.all(lengths > -np.log2(sampled(counts, g)) - 1e-5)  # Jensen


def test_any_order_takes_one_of_a_run_of_calls_and_is_right_on_average():
    n = 8_000
    index = np.random.default_rng(0).choice(64, n, p=chain.P_DATA)
    codes = jnp.asarray(chain.STATES[index], jnp.float32).reshape(n, 1, 1, 6)
    keys = jax.random.split(jax.random.key(0), n)
    found = sampling.likelihood_bound(
        lambda z, hidden: logits(TrueNetwork(), {}, z, hidden, None),
        noise_from_keys(keys, (1, 1, 6)),
        codes,
        g=1,
        counts=jnp.array([6, 4, 1, 0]),
        any_order=True,
    )
    error = np.asarray(found, np.float64) + np.log2(chain.P_DATA)[index]
    assert np.std(error) > 0.3  # of three calls in place of six
    assert abs(np.mean(error)) < 4 * np.std(error) / n**0.5
    # Without settings the bound is of all six; more draws of noise reduce its variance.
    whole = BITS.code_lengths({}, keys, None, codes, None, 1)
    twice = BITS.code_lengths({}, keys, None, codes, None, 4)
    errors = [np.asarray(x, np.float64) + np.log2(chain.P_DATA)[index] for x in (whole, twice)]
    for e in errors:
        assert abs(np.mean(e)) < 4 * np.std(e) / n**0.5
    assert np.std(errors[1]) == pytest.approx(np.std(errors[0]) / 2, rel=0.1)
    settings = AbsorbingSettings(steps=2, order="confidence", temperature=0.5)
    few = BITS.code_lengths({}, keys, None, codes, settings, 4)
    expected = chain.P_DATA @ bound([6, 3, 0])
    assert np.mean(few) == pytest.approx(expected, abs=4 * float(np.std(few)) / n**0.5)


def test_many_units_take_64_calls():
    shape = (4, 4, 32)
    calls = []

    class Zeros(TrueNetwork):
        def apply(self, params, z, time, label=None, given=None):
            jax.debug.callback(lambda t: calls.append(np.asarray(t)), time)
            return jnp.zeros(z.shape)

    prior = AbsorbingPrior(shape, Zeros(), unit="bit")
    keys = jax.random.split(jax.random.key(0), 3)
    lengths = prior.code_lengths({}, keys, None, jnp.ones((3, *shape)), None, 1)
    jax.effects_barrier()
    np.testing.assert_allclose(lengths, 512, rtol=1e-5)  # fair bits
    hidden = np.sort(np.rint(np.stack(calls) * 512), axis=0)
    assert len(hidden) == 64  # one of every eight calls, different for each image
    np.testing.assert_array_equal((hidden - 1) // 8, np.tile(np.arange(64)[:, None], 3))
    assert np.any(hidden[:, 0] != hidden[:, 1])
