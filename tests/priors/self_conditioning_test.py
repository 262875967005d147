"""Self-conditioning: which images of a batch get an estimate, the sampler's calls, the bound."""

import dataclasses
import functools
import json

import chain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from updates import check_same_params_and_metrics, prior_parts, run

from binlatent.convert import released
from binlatent.experiment import of_checkpoint
from binlatent.experiment.resume import check_same_model
from binlatent.priors.bernoulli.prior import BernoulliPrior, BernoulliSettings
from binlatent.priors.conditions import Condition
from binlatent.priors.prior import Known
from binlatent.priors.transformer import Transformer
from binlatent.runtime.errors import UserError

T, SHAPE, N = 8, (2, 2, 3), 6


def make_prior(**fields):
    network = Transformer(8, 1, 2, "class", num_classes=3, self_conditioning=True)
    fields = {"num_timesteps": T, "self_conditioning": True, **fields}
    return BernoulliPrior(SHAPE, network, **fields)


def some_params(prior):
    """Parameters without the zeros, which an untrained network has at both ends."""
    params = prior.init(jax.random.key(0), jax.ShapeDtypeStruct((1,), jnp.int32))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


# The network


def test_the_second_input_adds_one_matrix_of_zeros():
    prior, key = make_prior(), jax.random.key(0)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    plain = dataclasses.replace(
        prior, network=prior.network.clone(self_conditioning=False), self_conditioning=False
    )
    found, before = (dict(x.init(key, label)["params"]) for x in (prior, plain))
    np.testing.assert_array_equal(found.pop("estimate_emb")["kernel"], np.zeros((3, 8)))
    jax.tree.map(np.testing.assert_array_equal, found, before)


def test_an_estimate_of_one_half_is_none():
    prior = make_prior()
    params = some_params(prior)
    z_t = jax.random.bernoulli(jax.random.key(2), shape=(N, *SHAPE)).astype(jnp.float32)
    time, label = jnp.linspace(0, 0.9, N), jnp.arange(N) % 3
    apply = jax.jit(prior.network.apply)
    none = apply(params, z_t, time, label)
    half = apply(params, z_t, time, label, None, jnp.full_like(z_t, 0.5))
    np.testing.assert_array_equal(none, half)
    # A network without self-conditioning on 2 c bits, whose head predicts the first c.
    estimate = jax.random.uniform(jax.random.key(3), z_t.shape)
    wide = dict(params["params"])
    both = wide["tok_emb"]["kernel"], wide.pop("estimate_emb")["kernel"]
    wide["tok_emb"] = {"kernel": jnp.concatenate(both)}
    wide["head"] = jax.tree.map(lambda x: jnp.concatenate([x, 0 * x], axis=-1), wide["head"])
    plain = prior.network.clone(self_conditioning=False)
    wanted = jax.jit(plain.apply)(
        {"params": wide}, jnp.concatenate([z_t, estimate], -1), time, label
    )
    found = apply(params, z_t, time, label, None, estimate)
    np.testing.assert_allclose(found, wanted[..., :3], atol=1e-5)
    assert np.abs(found - none).max() > 0.01


# Training


@pytest.mark.parametrize("n", [6, 7])
def test_half_of_a_batch_gets_an_estimate_and_times_are_spread_over_either_half(n):
    prior = make_prior(stratified=True, continuous=True)
    noise = prior.draw_noise(jax.random.split(jax.random.key(0)), n)
    np.testing.assert_array_equal(noise.estimated, np.arange(n) < n / 2)
    times = np.sort(noise.t)
    np.testing.assert_allclose(np.diff(times), T / n, rtol=1e-4)
    for half in (noise.estimated, ~noise.estimated):
        # Every second time, except where the times wrap around.
        places = np.flatnonzero(np.isin(times, noise.t[half]))
        assert np.sum(np.diff(places) != 2) <= 1


def test_the_loss_has_estimates_of_a_first_call_without_their_gradient():
    prior = make_prior(vlb_weight=0.0)
    params = some_params(prior)
    z_0 = jax.random.bernoulli(jax.random.key(2), shape=(N, *SHAPE)).astype(jnp.float32)
    condition = Condition(jnp.arange(N) % 3, jnp.arange(N) % 2 == 0)
    noise = prior.draw_noise(jax.random.split(jax.random.key(3)), N)
    b_t = (noise.t / T / 2)[:, None, None, None]
    z_t = (noise.z_t < (1 - 2 * b_t) * z_0 + b_t).astype(jnp.float32)
    evidence = jnp.log(b_t) - jnp.log1p(-b_t)

    def flip_logit(params, estimate):
        inputs = (params, z_t, (noise.t - 1) / T, *condition[:2])
        return prior.network.apply(*inputs, estimate) + evidence

    flip = jax.nn.sigmoid(flip_logit(params, None))
    estimate = jnp.where(z_t == 1, 1 - flip, flip).at[3:].set(0.5)

    def expected(params):
        bce = optax.sigmoid_binary_cross_entropy(flip_logit(params, estimate), abs(z_t - z_0))
        return jnp.mean(bce)

    got, gradient = jax.jit(jax.value_and_grad(lambda x: prior.loss(x, z_0, condition, noise)[0]))(
        params
    )
    loss, wanted = jax.jit(jax.value_and_grad(expected))(params)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), gradient, wanted)
    assert np.abs(gradient["params"]["estimate_emb"]["kernel"]).max() > 1e-4
    # For the metric of test images, all have estimates.
    bce = jax.jit(prior.image_metrics)(params, z_0, condition, noise)["bce"]
    estimate = jnp.where(z_t == 1, 1 - flip, flip)
    wanted = optax.sigmoid_binary_cross_entropy(flip_logit(params, estimate), abs(z_t - z_0))
    np.testing.assert_allclose(bce, jnp.mean(wanted, axis=(1, 2, 3)), rtol=1e-4)


def test_parts_of_a_batch_make_the_same_update(tiny_experiment):
    experiment = tiny_experiment.change({"prior.bernoulli.self_conditioning": True})
    parts = prior_parts(experiment, optax.sgd(0.5))
    update = functools.partial(parts.update, accumulate=4)
    whole, in_parts = run(parts, 1), run(parts._replace(update=update), 1)
    check_same_params_and_metrics(whole, in_parts)
    assert np.any(whole[0]["params"]["estimate_emb"]["kernel"])


# Sampling and the bound


class Counted:
    """The truth about chains combined with an estimate; counts its calls."""

    def __init__(self, answer=lambda truth, estimate: truth):
        self.answer, self.calls = answer, {"labelled": 0, "unlabelled": 0}
        self.estimates = []

    def _count(self, labelled, estimate):
        self.calls["labelled" if labelled else "unlabelled"] += 1
        self.estimates.append(np.asarray(estimate))

    def apply(self, params, z_t, time, label, given, estimate):
        shown = jnp.full_like(z_t, 0.5) if estimate is None else estimate
        jax.debug.callback(self._count, label is not None, shown, ordered=True)
        t = time * 64 + 1
        truth = chain.denoise(z_t, 1 - t / 64)  # log-odds of a flip
        odds = truth * (1 - 2 * z_t)
        if estimate is not None:
            safe = jnp.clip(estimate, 1e-6, 1 - 1e-6)
            odds = self.answer(odds, jnp.log(safe) - jnp.log1p(-safe))
        # Without a label the odds differ, so that guidance has an effect.
        return odds + (0.5 if label is None else 0.0)

    def round_weights(self, params):
        return params


def chain_prior(network):
    fields = dict(target="z_0", evidence=False, self_conditioning=True)
    return BernoulliPrior((1, 1, chain.BITS), network, 64, **fields)


@pytest.mark.parametrize(
    "options, labelled",
    [
        (dict(), False),
        (dict(), True),
        (dict(guidance=2.0), True),
        (dict(guidance=2.0, guidance_interval=(0.3, 0.8), corrector_steps=2), True),
    ],
)
def test_sampling_takes_no_more_calls_and_each_gets_the_estimate_before(options, labelled):
    network = Counted(lambda truth, estimate: truth + 0.3 * estimate)
    prior = chain_prior(network)
    settings = prior.check_settings(BernoulliSettings(steps=4, temperature=0.8, **options))
    condition = Condition(jnp.zeros(5, jnp.int32)) if labelled else None
    keys = jax.random.split(jax.random.key(0), 5)
    passed = prior.trajectory({}, keys, condition, settings)
    jax.block_until_ready(passed)
    jax.effects_barrier()
    calls = network.calls["labelled"], network.calls["unlabelled"]
    assert prior.network_calls(settings, labelled) == calls
    np.testing.assert_array_equal(network.estimates[0], np.full((5, 1, 1, 6), 0.5))
    if settings.corrector_steps:
        return
    # Both calls of a guided step get the prediction from which the bits were drawn.
    a_step = 2 if settings.guidance else 1
    for i in range(3):
        for estimate in network.estimates[a_step * (i + 1) : a_step * (i + 2)]:
            np.testing.assert_allclose(estimate, passed.p_0[:, i], atol=1e-6)


def test_corrector_steps_get_and_leave_estimates():
    network = Counted(lambda truth, estimate: truth + 0.3 * estimate)
    prior = chain_prior(network)
    settings = BernoulliSettings(times=(64, 32, 0), corrector_steps=2, pair="plain_mixture")
    passed = prior.trajectory({}, jax.random.split(jax.random.key(0), 3), None, settings)
    jax.block_until_ready(passed)
    jax.effects_barrier()
    # Of the steps at 64 and 32, and of two corrector steps at 32 between.
    none, of_step, of_first, of_second = network.estimates
    np.testing.assert_allclose(of_step, passed.p_0[:, 0], atol=1e-6)
    assert np.all(none == 0.5) and np.all(np.abs(of_first - of_step).max(axis=(1, 2, 3)) > 1e-3)
    last = np.asarray(passed.p_0[:, 1])
    z_t = np.asarray(passed.z_t[:, 1], np.float32)
    odds = chain.denoise(jnp.asarray(z_t), 0.5) * (1 - 2 * z_t) + 0.5
    odds += 0.3 * (np.log(of_second) - np.log1p(-of_second))
    np.testing.assert_allclose(last, jax.nn.sigmoid(odds), atol=1e-4)


def bound(network, steps, n):
    """The bound by `code_lengths`, the mean over about n draws of the data, in bits."""
    copies = 1 + np.rint(n * chain.P_DATA).astype(int)
    codes = chain.STATES.repeat(copies, axis=0).astype(np.float32)[:, None, None]
    keys = jax.random.split(jax.random.key(0), len(codes))
    lengths = chain_prior(network).code_lengths(
        *({}, keys, Condition(jnp.zeros(len(codes), jnp.int32)), codes),
        BernoulliSettings(steps=steps),
        num_draws=1,
    )
    jax.effects_barrier()
    return np.asarray(lengths, np.float64) @ (chain.P_DATA / copies).repeat(copies)


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_the_bound_is_one_as_its_estimate_knows_z_t_alone(steps):
    # The first call returns the truth; the second takes half of it from the estimate.
    network = Counted(lambda truth, estimate: (truth + estimate) / 2)
    expected = chain.expected_bound(np.linspace(1, 0, steps + 1))
    found = bound(network, steps, 6_000)
    assert network.calls == {"labelled": 2 * steps, "unlabelled": 0}
    assert expected > chain.ENTROPY_BITS
    np.testing.assert_allclose(found, expected, atol=0.04)


def test_what_makes_too_much_of_its_estimates_has_a_bound_above_the_entropy():
    # Estimates from another z_t of the same code would give a value below the bound.
    network = Counted(lambda truth, estimate: truth + estimate)
    assert bound(network, 64, 1_000) > chain.ENTROPY_BITS + 0.3


def test_completions_and_variations_get_estimates():
    prior = chain_prior(Counted(lambda truth, estimate: (truth + 0.2 * estimate) / 1.2))
    n, keys = 300, jax.random.split(jax.random.key(0), 300)
    settings = prior.check_settings(BernoulliSettings(steps=8))
    mask = np.broadcast_to(np.array([1.0, 1, 1, 0, 0, 0], np.float32), (n, 1, 1, 6))
    bits = np.broadcast_to(np.array([1.0, 0, 1, 0, 0, 0], np.float32), mask.shape)
    completed = np.asarray(prior.sample({}, keys, None, settings, Known(bits, mask)))
    np.testing.assert_array_equal(completed[..., :3], bits[..., :3])
    near, far = (prior.vary({}, keys, None, settings, bits, x) for x in (0.1, 0.9))
    changed = [np.mean(x != bits) for x in (near, far)]
    assert changed[0] < 0.5 * changed[1], changed


# Configs and checkpoints


def test_a_checkpoint_without_the_key_has_none_and_cannot_go_on_with_it(tiny_experiment):
    stored = json.loads(json.dumps({"config": tiny_experiment.config, "version": "0.2.0"}))
    del stored["config"]["prior"]["bernoulli"]["self_conditioning"]
    found = of_checkpoint(stored, "runs/x/prior")
    assert found.prior == tiny_experiment.prior
    assert not found.prior.prior.network.self_conditioning
    changed = tiny_experiment.change({"prior.bernoulli.self_conditioning": True})
    assert changed.prior.prior.network.self_conditioning
    with pytest.raises(UserError, match="self_conditioning is False there and True here"):
        check_same_model(changed, found, "prior")


def test_the_authors_code_has_none(tiny_experiment):
    spec = tiny_experiment.change({"prior.bernoulli.self_conditioning": True}).prior
    with pytest.raises(UserError, match="The authors' code has no self-conditioning"):
        released.prior_state(spec, spec.init(jax.random.key(0)), np.zeros((8, 16)))
