"""`renoise`: the formula, bits together, and the sampler with it."""

import functools
import itertools

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import call_main

from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.priors import schedules
from binlatent.priors.absorbing.prior import AbsorbingPrior, AbsorbingSettings
from binlatent.priors.autoregressive.prior import AutoregressivePrior, AutoregressiveSettings
from binlatent.priors.bernoulli import process, sampling
from binlatent.priors.bernoulli.prior import BernoulliPrior, BernoulliSettings
from binlatent.priors.guidance import noise_from_keys
from binlatent.priors.settings import with_options
from binlatent.runtime.errors import UserError

SAMPLERS = [{}, {"renoise": 0.3}, {"renoise": 0.9}]
KEEP = schedules.keep_schedule("linear", 8)


@jax.jit
def step_probs(z_t, p_0, k_t, k_s, renoise=0.0):
    """P(z_s = 1) by the formulas of the process."""
    probs = process.mixture_posterior_probs(z_t, p_0, k_t, k_s)
    return process.renoised_probs(probs, p_0, k_s, renoise)


# One step


@pytest.mark.parametrize("options", SAMPLERS)
def test_a_step_from_noise_of_z_0_gives_noise_of_z_0(options):
    for s, t in itertools.combinations(range(9), 2):
        for z_0 in (0, 1):
            to_t = np.where(np.arange(2) == z_0, 1 + KEEP[t], 1 - KEEP[t]) / 2
            ones = [step_probs(z_t, z_0, KEEP[t], KEEP[s], **options) for z_t in (0, 1)]
            expected = KEEP[s] * z_0 + (1 - KEEP[s]) / 2
            np.testing.assert_allclose(to_t @ np.array(ones), expected, atol=1e-6)


def test_renoise_makes_bits_leave():
    # The reversed formula would not preserve q(z_s | z_0) for both values of z_0.
    for z_0, (s, t) in itertools.product((0.0, 1.0), itertools.combinations(range(1, 8), 2)):
        stay = [step_probs(1.0, z_0, KEEP[t], KEEP[s], **options) for options in SAMPLERS]
        ancestral, little, much = map(float, stay)
        assert much < little < ancestral


@pytest.mark.parametrize("options", SAMPLERS)
@pytest.mark.parametrize(
    "k_t, k_s", [(0, 1), (0, 0), (0, 1e-6), (1, 1), (1 - 1e-7, 1), (0.5, 0.5), (0.3, 0.9)]
)
def test_probabilities_are_probabilities_at_every_level_of_noise(options, k_t, k_s):
    z_t, p_0 = (
        x.ravel() for x in jnp.meshgrid(jnp.arange(2.0), jnp.array([0, 1e-7, 0.3, 1 - 6e-8, 1]))
    )
    probs = step_probs(z_t, p_0, jnp.float32(k_t), jnp.float32(k_s), **options)
    assert np.all((probs >= 0) & (probs <= 1)), probs


# Two bits, equal with probability (1 + C) / 2

C = 0.8
TWO = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
EQUAL = np.array([1, -1, -1, 1])


def correlation(steps, last=1.0, **options):
    """E of (2 a - 1)(2 b - 1) at the schedule's value `last`, by the formulas, with the true p_0.

    Steps are evenly spaced in k, from 0; the distribution is exact, without sampling error.
    """
    k = np.linspace(0, last, steps + 1)
    noise = np.where(TWO[:, None] == TWO[None], 1 + k[:-1, None, None, None], 0)
    noise = np.where(noise, noise, 1 - k[:-1, None, None, None]).prod(-1) / 4  # [t, z_0, z_t]
    joint = ((1 + C * EQUAL) / 4)[:, None] * noise
    p_0 = np.swapaxes(joint / joint.sum(1, keepdims=True), 1, 2) @ TWO
    z_t, p_0, k_t, k_s = (
        jnp.asarray(x, jnp.float32) for x in (TWO[None], p_0, k[:-1, None, None], k[1:, None, None])
    )
    probs = np.asarray(step_probs(z_t, p_0, k_t, k_s, **options), np.float64)
    kernels = np.where(TWO == 1, probs[:, :, None], 1 - probs[:, :, None]).prod(-1)
    return functools.reduce(np.matmul, kernels, np.full(4, 0.25)) @ EQUAL


def closed_form(steps, last=1.0, renoise=0.0):
    """The same in closed form: given z_t, bits of z_s are independent; m is their agreement."""

    def agreement(k, c, v):  # E[z_0 z_t] as signs, of bits with correlation c where z_t's is v
        return k * (1 + c * v) / (1 + c * v * k**2)

    now = 0.0
    for k_t, k_s in itertools.pairwise(np.linspace(0, last, steps + 1)):
        after = 0.0
        for v in (1, -1):
            z_0 = agreement(k_t, C, v)
            m = agreement(k_t / k_s, C * k_s**2, v)
            m = (1 - renoise) * m + renoise * k_s * z_0
            after += (1 + v * now) / 2 * v * m**2
        now = after
    return now


@pytest.mark.parametrize("options", SAMPLERS)
def test_two_bits_have_the_correlation_of_the_closed_form(options):
    for steps in (1, 16):
        np.testing.assert_allclose(
            correlation(steps, **options), closed_form(steps, **options), atol=1e-5
        )
    # In one step from noise the bits are independent for any sampler.
    np.testing.assert_allclose(closed_form(1, **options), 0, atol=1e-12)


def errors(steps, last=1.0, **options):
    return np.array([C * last**2 - correlation(n, last, **options) for n in steps])


def test_ancestral_sampling_converges_with_the_number_of_steps():
    found = errors((16, 64, 256))
    assert np.all(found > 0) and found[-1] < 0.005
    np.testing.assert_allclose(found[:-1] / found[1:], 4, rtol=0.1)  # first order


def test_renoise_has_an_error_of_its_own_on_the_way():
    # At k = 3/4 more steps do not reduce it: it is r times a constant.
    (ancestral,) = errors((1024,), 0.75)
    found = [errors((256, 1024), 0.75, renoise=r) for r in (0.05, 0.1, 0.2)]
    few, many = np.array(found).T
    np.testing.assert_allclose(many - ancestral, [0.005, 0.01, 0.02], rtol=0.1)
    np.testing.assert_allclose(few, many, rtol=0.35)
    assert ancestral < 0.001 and many[0] > 0.005


def test_renoise_converges_slowly_at_the_end():
    # Near t = 0 few bits are redrawn. The rest falls as the square root of r / steps.
    few, many = np.array([errors((256, 1024), renoise=r) for r in (0.1, 0.4)]).T
    np.testing.assert_allclose(few / many, 2, rtol=0.2)
    np.testing.assert_allclose(many[1] / many[0], 2, rtol=0.1)


# The sampler, on the chain of six bits


def true_denoise(z_t, t, w):
    return chain.denoise(z_t, 1 - t / 64)


def without_evidence(z_t, t, w):
    return true_denoise(z_t, t, w) - process.flip_evidence(1 - t / 64)


def sample(n, steps, denoise=true_denoise, **options):
    times = schedules.visited_times(steps, 64)
    arguments = dict(
        noise=noise_from_keys(jax.random.split(jax.random.key(0), n), (1, 1, 6)),
        start_probs=jnp.full((n, 1, 1, 6), 0.5),
        times=times,
        keep=schedules.keep_at("linear", jnp.asarray(times) / 64),
        guidance=np.zeros(steps, np.float32),
        return_trajectory=True,
    )
    draw = functools.partial(sampling.reverse_process, denoise, **(arguments | options))
    return jax.jit(draw)()


def by_definition(z_t, k_t, k_s, renoise=0.0):
    """(n, 6), P(z_s = 1) with the truth, from the definitions, in float64."""
    rows = (np.reshape(z_t, (-1, 6)) @ 2 ** np.arange(5, -1, -1)).astype(int)
    z_0, probs = chain.bits_given(k_t, 1.0), chain.bits_given(k_t, k_s)
    return ((1 - renoise) * probs + renoise * (k_s * z_0 + (1 - k_s) / 2))[rows]


@pytest.mark.parametrize("pair", ["plain_mixture", "balanced_plugin"])
def test_every_bit_is_drawn_by_the_definition_with_both_pairs(pair):
    denoise = true_denoise if pair == "plain_mixture" else without_evidence
    noise = noise_from_keys(jax.random.split(jax.random.key(0), 200), (1, 1, 6))
    codes, passed = sample(200, 8, denoise, pair=pair, noise=noise, renoise=0.3)
    for i in range(8):
        probs = by_definition(passed.z_t[i], i / 8, (i + 1) / 8, renoise=0.3)
        uniform = np.asarray(noise(i + 1)).reshape(-1, 6)
        sure = np.abs(uniform - probs) > 1e-5  # rounding
        drawn = np.asarray(passed.z_t[i + 1]).reshape(-1, 6)
        np.testing.assert_array_equal(drawn[sure], (uniform < probs)[sure])
        # The predictions shown are those of ancestral sampling.
        z_0 = by_definition(passed.z_t[i], i / 8, 1.0)
        np.testing.assert_allclose(passed.p_0[i].reshape(-1, 6), z_0, atol=1e-5)
    np.testing.assert_array_equal(codes, passed.z_t[-1])


def test_zero_is_ancestral_sampling_bit_for_bit():
    plain, passed = sample(500, 8)
    zeros, others = sample(500, 8, renoise=0.0)
    np.testing.assert_array_equal(plain, zeros)
    np.testing.assert_array_equal(passed.z_t, others.z_t)


def test_one_step_is_that_of_ancestral_sampling():
    np.testing.assert_array_equal(sample(500, 1, renoise=0.9)[0], sample(500, 1)[0])


def test_bits_of_a_sure_prediction_are_as_noisy_as_they_should_be():
    _, passed = sample(5_000, 4, lambda z_t, t, w: 40 * (1 - 2 * z_t), renoise=0.5)  # of ones
    ones = np.mean(passed.z_t, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(ones, [0.5, 0.625, 0.75, 0.875, 1], atol=0.012)
    # Bits that agree with the prediction are drawn anew too.
    assert np.mean(passed.z_t[1:-1] < passed.z_t[:-2]) > 0.05


def test_it_works_with_known_bits_correctors_and_a_rounded_last_step():
    mask = jnp.broadcast_to(jnp.array([1.0, 1, 1, 0, 0, 0]), (200, 1, 1, 6))
    known = sampling.Known(jnp.broadcast_to(jnp.array([1.0, 0, 1, 0, 0, 0]), mask.shape), mask)
    found = []
    for renoise in (None, 0.5):
        codes, passed = sample(
            *(200, 8),
            renoise=renoise,
            known=known,
            corrector_steps=1,
            corrector_size=0.5,
            threshold_last=True,
        )
        given = np.asarray(passed.z_t)[..., :3]
        np.testing.assert_array_equal(given, np.ones_like(given) & [True, False, True])
        rounded = np.where(mask > 0, known.z_0, passed.p_0[-1] > 0.5)
        np.testing.assert_array_equal(codes, rounded)
        found.append(np.asarray(passed.z_t))
    assert np.any(found[0] != found[1])


# End to end


@pytest.fixture(scope="module")
def pipeline(untrained_workdir):
    return BinaryLatentDiffusion.from_workdir(untrained_workdir)


def test_renoise_changes_samples_and_neither_calls_nor_the_bound(pipeline):
    key = jax.random.key(0)
    draw = functools.partial(pipeline.sample_codes, 20, key, 0, steps=4)
    plain = draw()
    np.testing.assert_array_equal(draw(renoise=0), plain)
    assert np.any(draw(renoise=0.5) != plain)
    # The bound is that of ancestral sampling.
    of_bound = functools.partial(pipeline.code_lengths, plain, key, 0, steps=4)
    np.testing.assert_array_equal(of_bound(renoise=0.5), of_bound())
    prior = pipeline.experiment.prior.prior
    ancestral, renoised = (pipeline.settings({"steps": 4, "renoise": r}) for r in (0.0, 0.5))
    assert prior.network_calls(renoised, True) == prior.network_calls(ancestral, True)


def test_renoise_is_an_option_of_guided_variations_and_completions(pipeline):
    key, images = jax.random.key(1), np.zeros((4, 28, 28, 1), np.float32)
    mask = np.arange(28)[:, None] < np.full(28, 14)
    vary = functools.partial(pipeline.vary, images, key, 0, strength=0.9, guidance=1.0)
    inpaint = functools.partial(pipeline.inpaint, images, mask, key, 0, guidance=1.0)
    assert np.any(vary(renoise=0.9) != vary())
    assert np.any(inpaint(renoise=0.9) != inpaint())


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"renoise": 1.0}, "option renoise must be at least 0 and below 1; got 1"),
        ({"renoise": -0.1}, "option renoise must be at least 0 and below 1; got -0.1"),
        ({"renoise": float("nan")}, "option renoise must be at least 0 and below 1; got nan"),
        ({"renoise": "much"}, "renoise must be like 0.0, not 'much'"),
    ],
)
def test_what_is_out_of_range_is_refused(options, sentence):
    prior = BernoulliPrior((4, 4, 8), None, 8)
    with pytest.raises(UserError, match=sentence):
        with_options(prior, BernoulliSettings(steps=4), options)


def test_the_command_line_refuses_in_one_sentence(untrained_workdir, capsys):
    flags = (f"--workdir={untrained_workdir}", "--mode=sample", "--option=renoise=1")
    assert call_main(*flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "option renoise must be at least 0 and below 1; got 1" in line


@pytest.mark.parametrize(
    "prior, settings",
    [
        (AbsorbingPrior((4, 4, 8), None), AbsorbingSettings()),
        (AutoregressivePrior((4, 4, 8), None), AutoregressiveSettings()),
    ],
)
def test_other_kinds_say_why_they_have_none(prior, settings):
    with pytest.raises(UserError, match="^An a.* prior .*renoise"):
        with_options(prior, settings, {"renoise": 0.5})
