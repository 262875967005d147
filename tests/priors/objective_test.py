"""The loss (13) of the whole prior: its noise, its value at the start, and its minimum."""

import dataclasses
import functools

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.priors.bernoulli import objective, process, targets
from binlatent.priors.bernoulli.prior import BernoulliPrior, BernoulliSettings
from binlatent.priors.conditions import Condition
from binlatent.priors.step import draw_batch
from binlatent.priors.transformer import Transformer

T = 8
B = np.arange(1, T + 1) / (2 * T)  # b_1 to b_8 of the linear schedule
SHAPE = (4, 4, 8)


def make_prior(**fields):
    network = Transformer(16, 1, 2, "class", num_classes=10)
    return BernoulliPrior(SHAPE, network, **{"num_timesteps": T, **fields})


def entropy(p):
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


# Noise


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("continuous", [False, True])
def test_times_are_uniform(continuous, stratified):
    draw = functools.partial(
        objective.draw_times, n=1000, continuous=continuous, stratified=stratified
    )
    t = np.concatenate([draw(jax.random.key(i), num_timesteps=64) for i in range(30)])
    assert t.min() > 0 and t.max() <= 64
    np.testing.assert_allclose(np.mean(t), 32 if continuous else 32.5, atol=0.5)
    if continuous:
        assert np.mean(t == np.rint(t)) < 0.01
    else:
        counts = np.bincount(t.astype(int), minlength=65)
        assert np.all(t == np.rint(t)) and counts[0] == 0
        np.testing.assert_allclose(counts[1:], len(t) / 64, rtol=0.25)
    # Large T: the last of the uniforms below 1 must not round to T + 1.
    assert draw(jax.random.key(0), num_timesteps=10**6).max() <= 10**6


def test_stratified_times_have_one_in_each_part_and_a_less_noisy_mean():
    draw = functools.partial(objective.draw_times, n=16, num_timesteps=64, continuous=True)
    keys = jax.random.split(jax.random.key(0), 200)
    strata = np.sort(np.stack([draw(key, stratified=True) for key in keys]))
    np.testing.assert_allclose(np.diff(strata), 4, atol=1e-4)
    plain = np.stack([draw(key, stratified=False) for key in keys])
    assert strata.mean(1).std() < 0.35 * plain.mean(1).std()
    # Each place of the batch gets all times.
    places = np.stack([draw(key, stratified=True) for key in keys])
    assert np.ptp(places, axis=0).max() > 3


# At the start


def losses_at_start(n=4_000, **fields):
    """The mean loss and its terms, of an untrained prior on random codes, over all times."""
    prior = make_prior(**fields)
    params = prior.init(jax.random.key(0), jax.ShapeDtypeStruct((1,), jnp.int32))
    probs, label = jnp.full((n, *SHAPE), 0.5), jnp.zeros(n, jnp.int32)
    bits, condition, noise = draw_batch(prior, jax.random.key(1), probs, label)
    return prior.loss(params, bits, condition, noise._replace(t=jnp.arange(n) % T + 1.0))


def test_untrained_prior_with_evidence_has_the_entropy_of_the_noise(optimised):
    # The network starts at zero, so f = b_t: its BCE at t is the entropy of a B(b_t) flip. Random
    # codes have no structure, so L_vlb, whose terms telescope, is that of fair bits.
    # In tests XLA adds numbers sequentially, so the fifth digit is inexact.
    loss, metrics = losses_at_start(vlb_weight=0.5)
    np.testing.assert_allclose(metrics["residual"], entropy(B).mean(), atol=0.005)
    np.testing.assert_allclose(metrics["vlb"], np.log(2) / 8, atol=0.002)
    np.testing.assert_allclose(loss, metrics["residual"] + 0.5 * metrics["vlb"], rtol=5e-5)
    assert metrics["loss"] == loss


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(target="flip"), np.log(2)),
        (dict(target="z_0"), np.log(2)),
        # Within an image a share of about b_t is flipped: b (1 - b) + (1 - b) b, times log 2.
        (dict(pair="balanced_plugin"), np.log(2) * np.mean(2 * B * (1 - B))),
        (dict(time_weight="falling"), np.log(2) * np.mean(1 - np.arange(8) / 8)),
    ],
)
def test_without_evidence_the_untrained_prior_says_one_half(fields, expected):
    loss, metrics = losses_at_start(evidence=False, vlb_weight=0.0, **fields)
    assert "vlb" not in metrics  # a weight of 0 costs nothing
    np.testing.assert_allclose(loss, expected, atol=0.005)


def test_predicting_z_s_is_trained_by_the_bound_alone():
    loss, metrics = losses_at_start(evidence=False, target="z_s")
    # KL(q(z_s | z_t, z_0) || B(1/2)) = log 2 - H, by Bayes' rule for each of agree and disagree.
    b_s = np.append(0, B[:-1])
    e = (1 - (1 - 2 * B) / (1 - 2 * b_s)) / 2
    agree, disagree = (1 - e) * (1 - b_s) / (1 - B), (1 - e) * b_s / B
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = (1 - B) * np.nan_to_num(entropy(agree)) + B * np.nan_to_num(entropy(disagree))
    np.testing.assert_allclose(loss, np.log(2) - terms.mean(), atol=0.005)
    assert set(metrics) == {"loss", "vlb", "flip_accuracy"}


@pytest.mark.parametrize("target", ["flip", "z_0"])
def test_the_metric_of_an_image_is_its_flips_bce(target):
    # Untrained, with the evidence: each flip has the probability b_t, whatever the target.
    prior = make_prior(target=target)
    params = prior.init(jax.random.key(0), jax.ShapeDtypeStruct((1,), jnp.int32))
    probs, label = jnp.full((T, *SHAPE), 0.5), jnp.zeros(T, jnp.int32)
    bits, condition, noise = draw_batch(prior, jax.random.key(1), probs, label)
    noise = noise._replace(t=jnp.arange(T) + 1.0)
    b = B[:, None, None, None]
    z_t = np.asarray(noise.z_t) < np.where(np.asarray(bits) == 1, 1 - b, b)
    flipped = np.mean(z_t != (np.asarray(bits) == 1), axis=(1, 2, 3))
    expected = -flipped * np.log(B) - (1 - flipped) * np.log(1 - B)
    got = prior.image_metrics(params, bits, condition, noise)
    np.testing.assert_allclose(got["bce"], expected, rtol=1e-4)
    assert set(got) == {"bce"}


# With true conditionals in place of the network


class TrueNetwork:
    """A stand-in for a network, whose output is the truth about chains plus `params`."""

    def __init__(self, prior):
        self.prior = prior

    def apply(self, params, z_t, time, label, given):
        prior = self.prior
        t = time * prior.num_timesteps + 1
        k_t, k_s = (prior.keep_at(jnp.maximum(x, 0))[:, None, None, None] for x in (t, t - 1))
        per_chain = jnp.repeat(k_t.ravel(), z_t[0].size // chain.BITS)
        output = chain.denoise(z_t, per_chain)
        if prior.evidence or prior.pair == "balanced_plugin":
            output = output - process.flip_evidence(k_t)
        if prior.target == "z_0":
            output = targets.flip_from_z_0(output, z_t)
        elif prior.target == "z_s":
            output = targets.z_s_from_flip(output, z_t, k_t, k_s)
        return output + params

    def round_weights(self, params):
        return params


def true_prior(code_shape, **fields):
    prior = dataclasses.replace(make_prior(**fields), code_shape=code_shape)
    return dataclasses.replace(prior, network=TrueNetwork(prior))


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(time_weight="falling"),
        dict(evidence=False),
        dict(evidence=False, target="z_0"),
        dict(target="z_0"),
        dict(evidence=False, target="z_s"),
        dict(evidence=False, pair="balanced_plugin", vlb_weight=0.0),
        dict(evidence=False, pair="balanced_plugin"),
        dict(schedule="cos", continuous=True),
        dict(schedule="given", keep=(1, 0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1)),
    ],
)
def test_the_truth_is_the_minimum_of_every_loss(fields):
    prior = true_prior((16, 16, chain.BITS), stratified=True, **fields)
    chains = jax.random.choice(
        jax.random.key(0),
        jnp.asarray(chain.STATES, jnp.float32),
        (64, 16, 16),
        p=jnp.asarray(chain.P_DATA, jnp.float32),
    )
    label = jnp.zeros(64, jnp.int32)
    bits, condition, noise = draw_batch(prior, jax.random.key(1), chains, label)
    np.testing.assert_array_equal(bits, chains)
    loss = jax.jit(lambda shift: prior.loss(shift, bits, condition, noise))
    (best, metrics), (higher, _), (lower, _) = loss(0.0), loss(0.2), loss(-0.2)
    assert best < higher and best < lower
    # A parabola with its minimum at the truth.
    np.testing.assert_allclose((higher - lower) / (higher + lower - 2 * best), 0, atol=0.15)
    prediction = objective.predict(prior, 0.0, bits, condition, noise)
    flipped = process.flip_target(prediction.z_t, prediction.z_0)
    right = np.mean((prediction.flip_logit > 0) == (flipped > 0))
    assert right > 0.75
    np.testing.assert_allclose(metrics["flip_accuracy"], right, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        dict(evidence=False, target="z_0"),
        dict(evidence=False, target="z_s"),
        dict(evidence=False, pair="balanced_plugin"),
        dict(schedule="sigmoid"),
    ],
)
def test_the_sampler_works_with_every_target_and_pair(fields):
    prior = true_prior((1, 1, chain.BITS), num_timesteps=32, **fields)
    n = 10_000
    # Steps of length one and more: the target z_s is trained for s = t - 1 only.
    times = (32, 28, 24, 20, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1, 0)
    codes = prior.sample(
        0.0,
        jax.random.split(jax.random.key(0), n),
        Condition(jnp.zeros(n, jnp.int32)),
        prior.check_settings(BernoulliSettings(times=times)),
    )
    codes = np.asarray(codes).reshape(n, chain.BITS)
    np.testing.assert_allclose(codes.mean(0), chain.MARGINALS, atol=0.025)
    counts = np.bincount((codes @ 2 ** np.arange(5, -1, -1)).astype(int), minlength=64)
    assert 0.5 * np.abs(counts / n - chain.P_DATA).sum() < 0.1


def test_a_flip_logit_is_the_same_for_both_pairs_but_for_the_evidence():
    z_t = jax.random.bernoulli(jax.random.key(0), shape=(T, *SHAPE)).astype(jnp.float32)
    output, t = jax.random.normal(jax.random.key(1), z_t.shape), jnp.arange(1.0, T + 1)
    evidence = np.log(B / (1 - B))[:, None, None, None]
    for fields, plugin, mixture in (
        (dict(), 0, 1),
        (dict(evidence=False), -1, 0),
        (dict(evidence=False, pair="balanced_plugin"), 0, 1),
    ):
        prior = make_prior(**fields)
        got = prior.flip_logit(output, z_t, t)
        np.testing.assert_allclose(got, output + mixture * evidence, atol=1e-5)
        got = prior.flip_logit(output, z_t, t, "balanced_plugin", 0.5)
        np.testing.assert_allclose(got, (output + plugin * evidence) / 0.5, atol=1e-5)
