"""Bits in groups: the head, exact steps and bounds on chains, a network against brute force."""

import dataclasses
import functools
import json

import chain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from scipy.special import expit, rel_entr
from scipy.stats import chi2

from binlatent.benchmark import flops
from binlatent.convert import released
from binlatent.experiment import of_checkpoint
from binlatent.experiment.resume import check_same_model
from binlatent.priors.bernoulli import joint, losses, objective
from binlatent.priors.bernoulli.prior import BernoulliPrior, BernoulliSettings
from binlatent.priors.conditions import Condition
from binlatent.priors.prior import Known
from binlatent.priors.settings import with_options
from binlatent.priors.transformer import Transformer
from binlatent.runtime.errors import UserError

ONE = jax.ShapeDtypeStruct((1,), jnp.int32)


def make_prior(shape, groups, **fields):
    fields = {"num_timesteps": 8, "groups": groups, **fields}
    trunk = Transformer(
        *(8, 1, 2, "class"),
        num_classes=3,
        self_conditioning=fields.get("self_conditioning", False),
    )
    network = joint.JointNetwork(trunk, shape[2], groups) if groups > 1 else trunk
    return BernoulliPrior(shape, network, **fields)


def some_params(prior):
    """Parameters without the zeros of an untrained network."""
    rng = np.random.default_rng(0)
    params = prior.init(jax.random.key(0), ONE)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.4, x.shape).astype(np.float32), params)


# The head


def test_groups_are_split_in_order_and_merged():
    x = np.arange(2 * 3 * 6).reshape(2, 3, 6)
    parts = joint.split_groups(jnp.asarray(x), 3)
    np.testing.assert_array_equal(parts[1], x[..., 2:4])
    np.testing.assert_array_equal(joint.merge_groups(parts), x)


@pytest.fixture(scope="module")
def head():
    """A head of 6 bits in 3 groups, its parameters, features and times, and what applies it."""
    module = joint.JointHead(6, 3, 8)
    features = jax.random.normal(jax.random.key(1), (2, 1, 2, 8))
    time, bits = jnp.array([0.1, 0.7]), jnp.zeros((2, 1, 2, 6))
    params = module.init(jax.random.key(0), features, time, bits)
    np.testing.assert_array_equal(module.apply(params, features, time, bits), 0 * bits)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.5, x.shape).astype(np.float32), params)
    return functools.partial(module.apply, params), features, time


def test_a_group_sees_the_groups_before_alone(head):
    apply, features, time = head
    bits = jax.random.bernoulli(jax.random.key(2), shape=(2, 1, 2, 6)).astype(jnp.float32)
    base = apply(features, time, bits)
    for i in range(6):
        other = apply(features, time, bits.at[..., i].set(1 - bits[..., i]))
        changed = np.any(np.abs(other - base) > 1e-4, axis=(0, 1, 2))
        np.testing.assert_array_equal(changed, np.arange(6) // 2 > i // 2)
    # Bits of one token do not affect another; features and the time s do.
    other = apply(features, time, bits.at[:, :, 0].set(1 - bits[:, :, 0]))
    np.testing.assert_array_equal(other[:, :, 1], base[:, :, 1])
    assert np.all(np.abs(apply(features, time + 0.1, bits) - base).max(axis=(1, 2, 3)) > 1e-3)


def test_group_after_group_is_as_all_at_once(head):
    apply, features, time = head
    bits = jax.random.bernoulli(jax.random.key(2), shape=(2, 1, 2, 6)).astype(jnp.float32)
    begun, found = apply(features, time, method="begin"), []
    for group, own in enumerate(joint.split_groups(bits.reshape(-1, 6), 3)):
        found.append(apply(begun, jnp.asarray(group), method="group_logits"))
        begun = apply(begun, own, jnp.asarray(group), method="add")
    found = np.stack(found, axis=1).reshape(bits.shape)
    np.testing.assert_allclose(found, apply(features, time, bits), atol=1e-5)


# Chains with known conditionals


class TrueHead:
    """The true conditionals of the six bits of a token, given z_t and the first groups of z_s."""

    def __init__(self, groups, p_data=chain.P_DATA, num_timesteps=64):
        self.groups, self.p_data, self.num_timesteps = groups, p_data, num_timesteps

    def apply(self, params, *inputs, method="__call__", **drawn):
        return getattr(self, f"_{method.strip('_')}")(*inputs, **drawn)

    def _keep(self, time):
        return 1 - (time + 1 / self.num_timesteps)

    def _features(self, z_t, time, label=None, given=None):
        keep = jnp.broadcast_to(self._keep(time)[:, None, None, None], (*z_t.shape[:3], 1))
        return jnp.concatenate([z_t, keep], axis=-1)

    def _call(self, z_t, time, label=None, given=None, z_s=None, time_s=None):
        if z_s is None:
            z_s, time_s = z_t, time
        return self._logits(self._features(z_t, time), time_s, z_s)

    def _logits(self, features, time, bits):
        begun, found = self._begin(features, time), []
        for group, own in enumerate(joint.split_groups(bits, self.groups)):
            found.append(self._group_logits(begun, group).reshape(own.shape))
            begun = self._add(begun, own.reshape(-1, own.shape[-1]), group)
        return jnp.concatenate(found, axis=-1)

    def _begin(self, features, time):
        rows = features.reshape(-1, chain.BITS + 1)
        keep = jnp.repeat(self._keep(time), len(rows) // len(time))[:, None]
        return joint.Begun(jnp.concatenate([rows, keep], axis=-1), 0 * rows[:, :6])

    def _add(self, begun, bits, group):
        start = group * (chain.BITS // self.groups)
        hidden = jax.lax.dynamic_update_slice(begun.hidden, bits, (0, start))
        return begun._replace(hidden=hidden)

    def _group_logits(self, begun, group):
        z_t, k_t, k_s = begun.linear[:, :6], begun.linear[:, 6:7], begun.linear[:, 7:]
        k_t, k_s = k_t[:, None], jnp.minimum(k_s[:, None], 1)
        states = jnp.asarray(chain.STATES, jnp.float32)

        def log_noise(one, other, keep):
            return jnp.log(jnp.maximum(jnp.where(one == other, 1 + keep, 1 - keep) / 2, 1e-20))

        z_t, z_s = z_t[:, None], begun.hidden[:, None]
        of_t = log_noise(states[None], z_t, k_t)
        both = log_noise(states[None], z_s, k_s) + log_noise(z_s, z_t, k_t / k_s)
        size = chain.BITS // self.groups
        drawn = (jnp.arange(chain.BITS) < group * size)[None, None]
        log_data = jnp.log(jnp.maximum(jnp.asarray(self.p_data, jnp.float32), 1e-20))[None]
        log_joint = log_data + jnp.sum(jnp.where(drawn, both, of_t), axis=-1)

        def total(value):
            there = jnp.where(states[None] == value, log_joint[..., None], -jnp.inf)
            return jax.nn.logsumexp(there, axis=1)

        odds = total(1) - total(0)
        return jax.lax.dynamic_slice(odds, (0, group * size), (len(odds), size))

    def round_weights(self, params):
        return params


def true_prior(groups, **fields):
    network = TrueHead(groups, **fields)
    settings = dict(target="z_0", evidence=False, groups=groups)
    return BernoulliPrior((1, 1, chain.BITS), network, 64, **settings)


def frequencies(codes):
    codes = np.asarray(codes).reshape(len(codes), -1)
    bits = codes.shape[1]
    numbers = (codes @ 2 ** np.arange(bits - 1, -1, -1)).astype(int)
    return np.bincount(numbers, minlength=2**bits) / len(codes)


def draw(prior, n, steps, known=None, condition=None, params=None, **options):
    settings = prior.check_settings(BernoulliSettings(steps=steps, **options))
    keys = jax.random.split(jax.random.key(0), n)
    return prior.sample(params or {}, keys, condition, settings, known)


def test_with_as_many_groups_as_bits_few_steps_draw_the_data(optimised):
    n = 6_000
    far = [np.abs(frequencies(draw(true_prior(g), n, 2)) - chain.P_DATA).sum() for g in (6, 1)]
    # The first is sampling error: sum_i sqrt(2 p_i (1 - p_i) / (pi n)), twice the total variation.
    noise = np.sum(np.sqrt(2 * chain.P_DATA * (1 - chain.P_DATA) / (np.pi * n)))
    assert far[0] < 1.5 * noise < 0.6 * far[1], (far, noise)


def test_one_step_draws_bits_that_are_all_alike_and_independent_bits_are_not():
    p_data = np.zeros(64)
    p_data[[0, -1]] = 0.3, 0.7
    codes = [np.asarray(draw(true_prior(g, p_data=p_data), 4_000, 1)) for g in (6, 1)]
    alike = [np.all(x == x[..., :1], axis=(1, 2, 3)) for x in codes]
    assert np.all(alike[0])
    np.testing.assert_allclose(codes[0].mean(), 0.7, atol=0.03)
    np.testing.assert_allclose(alike[1].mean(), 0.7**6 + 0.3**6, atol=0.03)
    # In each group the last step rounds to the likeliest bits.
    rounded = draw(true_prior(6, p_data=p_data), 50, 1, threshold_last=True)
    np.testing.assert_array_equal(rounded, np.ones((50, 1, 1, 6)))
    # Later groups are drawn given the known bits of the first.
    first = jnp.broadcast_to(jnp.array([1.0, 0, 0, 0, 0, 0]), (50, 1, 1, 6))
    for value in (0.0, 1.0):
        completed = draw(true_prior(6, p_data=p_data), 50, 1, Known(value * first, first))
        np.testing.assert_array_equal(completed, np.full((50, 1, 1, 6), value))


@pytest.mark.parametrize("groups, steps", [(6, 1), (6, 3), (3, 3), (2, 1), (1, 3)])
def test_the_bound_is_that_of_a_sampler_in_groups(groups, steps):
    prior, copies = true_prior(groups), 1 + np.rint(3_000 * chain.P_DATA).astype(int)
    codes = chain.STATES.repeat(copies, axis=0).astype(np.float32)[:, None, None]
    keys = jax.random.split(jax.random.key(0), len(codes))
    settings = BernoulliSettings(steps=steps)
    lengths = prior.code_lengths({}, keys, None, codes, settings, num_draws=2)
    found = np.asarray(lengths, np.float64) @ (chain.P_DATA / copies).repeat(copies)
    expected = chain.expected_bound(np.linspace(1, 0, steps + 1), groups)
    np.testing.assert_allclose(found, expected, atol=0.05)
    if groups == 6:
        np.testing.assert_allclose(expected, chain.ENTROPY_BITS, rtol=1e-6)
        if steps == 1:  # and for each code it is the exact length
            expected = -np.log2(chain.P_DATA).repeat(copies)
            np.testing.assert_allclose(lengths, expected, rtol=1e-3)


# A network against brute force


@pytest.fixture(scope="module")
def random_prior():
    """A prior of one token of 4 bits in 2 groups, at random, and its parameters."""
    prior = make_prior((1, 1, 4), 2, target="z_0")
    return prior, some_params(prior)


STATES = ((np.arange(16)[:, None] >> np.arange(3, -1, -1)) & 1).astype(np.float32)


def step_logits(prior, params, t, s, label=None):
    """Log-odds of flips for all z_t and z_s, float64 (16, 16, 4)."""
    z_t, z_s = (x.reshape(256, 1, 1, 4) for x in (STATES.repeat(16, 0), np.tile(STATES, (16, 1))))
    condition = None if label is None else Condition(jnp.full(256, label))
    times = jnp.full(256, float(t)), jnp.full(256, float(s))
    output = prior.output(params, jnp.asarray(z_t), times[0], condition, None, z_s, times[1])
    b_t = t / 16
    evidence = np.log(b_t) - np.log1p(-b_t)
    return np.asarray(output * (1 - 2 * z_t), np.float64).reshape(16, 16, 4) + evidence


def step_probs(logits, t, s):
    """p(z_s | z_t), (16, 16), from flip log-odds given z_t and the groups before of z_s."""
    k_t, k_s = 1 - t / 8, 1 - s / 8
    z_t, z_s = STATES.astype(np.float64)[:, None], STATES.astype(np.float64)[None]

    def posterior(z_0):  # q(z_s = 1 | z_t, z_0), by Bayes
        one, zero = (
            np.where(z_t == x, 1 + k_t / k_s, 1 - k_t / k_s) * np.where(z_0 == x, 1 + k_s, 1 - k_s)
            for x in (1, 0)
        )
        return one / (one + zero)

    flip = expit(logits)
    ones = (1 - flip) * posterior(z_t) + flip * posterior(1 - z_t)
    return np.where(z_s == 1, ones, 1 - ones).prod(axis=-1)


@pytest.mark.parametrize("t, s", [(8, 0), (8, 3), (5, 4), (2, 0)])
def test_a_steps_divergence_is_the_mean_of_its_groups(random_prior, t, s):
    prior, params = random_prior
    logits = step_logits(prior, params, t, s)
    p = step_probs(logits, t, s)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)
    k_t, k_s = np.float32(1 - t / 8), np.float32(1 - s / 8)
    noise = lambda a, b, k: np.where(a == b, (1 + k) / 2, (1 - k) / 2).prod(axis=-1)  # noqa: E731
    for z_0 in STATES[[0, 5, 14]]:
        q = noise(z_0, STATES, k_s)[None] * noise(STATES[:, None], STATES[None], k_t / k_s)
        q /= q.sum(axis=1, keepdims=True)
        truth = rel_entr(q, p).sum(axis=1)
        terms = losses.posterior_kl(
            *(jnp.asarray(logits, jnp.float32), STATES[:, None], z_0[None, None]), k_t, k_s
        )
        terms = np.asarray(terms, np.float64).sum(axis=-1)
        np.testing.assert_allclose((q * terms).sum(axis=1), truth, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options", [dict(), dict(guidance=1.5, temperature=0.7), dict(pair="balanced_plugin")]
)
def test_samples_are_as_often_as_brute_force_has_them(random_prior, options):
    prior, params = random_prior
    n, times, label = 10_000, (8, 3, 0), 1
    p = np.full(16, 1 / 16)
    for t, s in zip(times[:-1], times[1:], strict=True):
        logits = step_logits(prior, params, t, s, label)
        w = options.get("guidance", 0.0)
        logits = (1 + w) * logits - w * step_logits(prior, params, t, s)
        p = p @ step_probs(logits / options.get("temperature", 1.0), t, s)
    condition = Condition(jnp.full(n, label))
    codes = draw(prior, n, 1, times=times, condition=condition, params=params, **options)
    statistic = n * np.sum((frequencies(codes) - p) ** 2 / p)  # Pearson's, of 15 free frequencies
    assert chi2.sf(statistic, 15) > 0.01
    assert np.abs(p - 1 / 16).sum() > 0.2


# Training


@pytest.mark.parametrize("continuous", [False, True])
def test_the_loss_draws_earlier_times_and_their_bits_and_the_rest_as_before(continuous):
    keys, n = jax.random.split(jax.random.key(3)), 4_000
    prior = make_prior((1, 1, 4), 2, continuous=continuous)
    noise = prior.draw_noise(keys, n)
    before = make_prior((1, 1, 4), 1, continuous=continuous).draw_noise(keys, n)
    np.testing.assert_array_equal(noise.z_t, before.z_t)
    np.testing.assert_array_equal(noise.t, before.t)
    assert before.z_s is None and before.s is None
    assert not np.any(noise.z_s == noise.z_t)
    s = np.asarray(objective.earlier_times(prior, noise))
    assert np.all((s >= 0) & (s <= noise.t))
    if continuous:
        np.testing.assert_allclose(np.mean(s / noise.t), 0.5, atol=0.02)
        return
    for t in (1, 4, 8):  # uniform on 0..t
        share = np.bincount(s[noise.t == t].astype(int)) / np.sum(noise.t == t)
        np.testing.assert_allclose(share, np.full(t + 1, 1 / (t + 1)), atol=0.08)


def test_the_loss_is_of_each_group_given_those_before(random_prior):
    prior, params = random_prior
    prior = dataclasses.replace(prior, vlb_weight=0.5)
    n = 12
    z_0 = jnp.asarray(STATES[:n]).reshape(n, 1, 1, 4)
    noise = prior.draw_noise(jax.random.split(jax.random.key(5)), n)
    t = np.asarray(noise.t, np.float64)
    s = np.floor(np.asarray(noise.s) * (t + 1))
    residual, vlb = 0.0, 0.0
    for i in range(n):
        k_t, k_s = 1 - t[i] / 8, 1 - s[i] / 8
        code = STATES[i].astype(np.float64)
        z_t = (np.asarray(noise.z_t[i]).ravel() < k_t * code + (1 - k_t) / 2).astype(float)
        one, zero = (
            np.where(z_t == x, 1 + k_t / k_s, 1 - k_t / k_s) * np.where(code == x, 1 + k_s, 1 - k_s)
            for x in (1, 0)
        )
        q = one / (one + zero)
        z_s = (np.asarray(noise.z_s[i]).ravel() < q).astype(float)
        rows = [int(z @ [8, 4, 2, 1]) for z in (z_t, z_s)]
        own = step_logits(prior, params, t[i], s[i])[tuple(rows)]
        flipped = z_t != code
        residual += np.mean(np.log1p(np.exp(np.where(flipped, -own, own)))) / n
        kl = losses.posterior_kl(*(jnp.float32(x) for x in (own, z_t, code, k_t, k_s)))
        vlb += np.mean(kl) / n
    loss, metrics = jax.jit(prior.loss)(params, z_0, None, noise)
    np.testing.assert_allclose(metrics["residual"], residual, rtol=1e-4)
    np.testing.assert_allclose(metrics["vlb"], vlb, rtol=1e-3)
    np.testing.assert_allclose(loss, residual + 0.5 * vlb, rtol=1e-3)
    # The metric of test images uses predictions given only z_t: z_s = z_t at s = t.
    bce = jax.jit(prior.image_metrics)(params, z_0, None, noise)["bce"]
    z_t = (np.asarray(noise.z_t[0]).ravel() < (1 - t[0] / 8) * STATES[0] + t[0] / 16) * 1
    row = int(z_t @ [8, 4, 2, 1])
    own = step_logits(prior, params, t[0], t[0])[row, row]
    expected = np.mean(np.log1p(np.exp(np.where(z_t != STATES[0], -own, own))))
    np.testing.assert_allclose(bce[0], expected, rtol=1e-4)


def test_a_trained_head_draws_bits_that_are_all_alike_in_one_step():
    n, prior = 64, make_prior((1, 1, 4), 4, target="z_0", stratified=True)
    params, adam = prior.init(jax.random.key(0), ONE), optax.adam(0.02)

    @jax.jit
    def step(params, state, key):
        bits = jax.random.bernoulli(key, shape=(n, 1, 1, 1)).astype(jnp.float32)
        noise = prior.draw_noise(jax.random.split(jax.random.fold_in(key, 1)), n)
        gradient = jax.grad(lambda x: prior.loss(x, jnp.tile(bits, 4), None, noise)[0])(params)
        updates, state = adam.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = adam.init(params)
    for i in range(120):
        params, state = step(params, state, jax.random.key(i))
    codes = np.asarray(draw(prior, 2_000, 1, params=params))
    # Independent bits agree in one of eight codes.
    assert np.mean(np.all(codes == codes[..., :1], axis=-1)) > 0.75
    np.testing.assert_allclose(codes.mean(), 0.5, atol=0.1)


# Other parts


def test_it_goes_with_self_conditioning_guidance_correctors_and_known_bits():
    prior = make_prior((2, 2, 4), 2, self_conditioning=True)
    params, n = some_params(prior), 6
    condition, keys = Condition(jnp.arange(n) % 3), jax.random.split(jax.random.key(0), n)
    settings = BernoulliSettings(steps=3, guidance=1.0, corrector_steps=1, known="noised")
    settings = prior.check_settings(settings)
    mask = jnp.broadcast_to(jnp.array([1.0, 0, 1, 0]), (n, 2, 2, 4))
    bits = jnp.broadcast_to(jnp.array([1.0, 0, 0, 0]), mask.shape)
    codes = np.asarray(prior.sample(params, keys, condition, settings, Known(bits, mask)))
    np.testing.assert_array_equal(codes[..., ::2], bits[..., ::2])
    passed = prior.trajectory(params, keys, condition, settings)
    assert passed.p_0.shape == (n, 3, 2, 2, 4) and np.all(np.isfinite(passed.p_0))
    # The trajectory shows predictions given only z_t; the first step has no estimate.
    z_T = jnp.asarray(passed.z_t[:, 0], jnp.float32)
    apply = jax.jit(lambda asked: prior.output(params, z_T, jnp.full(n, 8.0), asked))
    output = apply(condition), apply(None)
    odds = (2 * output[0] - output[1]) * (1 - 2 * z_T)
    np.testing.assert_allclose(passed.p_0[:, 0], jax.nn.sigmoid(odds), atol=1e-4)
    lengths = prior.code_lengths(params, keys, condition, codes, settings, 1)
    assert lengths.shape == (n,) and np.all(np.isfinite(lengths))
    noise = prior.draw_noise(jax.random.split(keys[0]), n)
    gradient = jax.jit(jax.grad(lambda x: prior.loss(x, bits, condition, noise)[0]))(params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


def test_the_whole_network_starts_at_zero_and_rounds_its_matrices():
    prior = make_prior((2, 2, 4), 2)
    params = prior.init(jax.random.key(0), ONE)
    z_t = jnp.ones((1, 2, 2, 4))
    np.testing.assert_array_equal(prior.network.apply(params, z_t, jnp.ones(1)), 0 * z_t)
    inner = params["params"]
    assert set(inner) == {"trunk", "joint"} and "head" not in inner["trunk"]
    half = prior.network.clone(trunk=prior.network.trunk.clone(dtype=jnp.bfloat16))
    params = some_params(prior)
    rounded = half.round_weights(params)
    assert rounded["params"]["trunk"]["blocks_0"]["mlp_0"]["kernel"].dtype == jnp.bfloat16
    assert rounded["params"]["joint"]["head"]["kernel"].dtype == jnp.float32
    apply = jax.jit(half.apply)
    found = apply(rounded, z_t, jnp.ones(1))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, apply(params, z_t, jnp.ones(1)))
    np.testing.assert_allclose(found, prior.network.apply(params, z_t, jnp.ones(1)), atol=0.3)


@pytest.mark.parametrize("name", ["released", "dit"])
def test_a_config_makes_it_of_either_network(tiny_experiment, name):
    values = {"prior.bernoulli.groups": 4, "prior.network.name": name}
    experiment = tiny_experiment.change(values)
    prior, network = experiment.prior.prior, experiment.prior.prior.network
    assert isinstance(network, joint.JointNetwork) and prior.groups == network.groups == 4
    assert network.num_bits == TINY["autoencoder.num_bits"] == 8
    plain = tiny_experiment.change({"prior.network.name": name})
    assert plain.prior.prior.network == network.trunk
    output = jax.eval_shape(
        network.apply,
        experiment.prior.init(jax.random.key(0)),
        jnp.zeros((2, 4, 4, 8)),
        jnp.ones(2),
    )
    assert output.shape == (2, 4, 4, 8)
    # The head's products replace those of the unused layer: 4 x 4 tokens, width 16.
    trunk, whole = (flops.count_network(x, (4, 4, 8), True) for x in (network.trunk, network))
    assert whole - trunk == 2 * 16 * (16 * 16 + 2 * 8 * 16) + 2 * 2 * 16 * 16


def test_a_checkpoint_without_the_key_has_one_group(tiny_experiment):
    stored = json.loads(json.dumps({"config": tiny_experiment.config, "version": "0.2.0"}))
    del stored["config"]["prior"]["bernoulli"]["groups"]
    found = of_checkpoint(stored, "runs/x/prior")
    assert found.prior == tiny_experiment.prior
    changed = tiny_experiment.change({"prior.bernoulli.groups": 2})
    with pytest.raises(UserError, match="groups is 1 there and 2 here"):
        check_same_model(changed, found, "prior")
    with pytest.raises(UserError, match="The authors' code draws bits in one group"):
        released.prior_state(changed.prior, changed.prior.init(jax.random.key(0)), None)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(groups=3), "groups is 3, which does not divide the 4 bits of a token"),
        (dict(groups=0), "groups is 0, which does not divide"),
        (dict(target="z_s", evidence=False), 'groups above 1 needs the target "flip" or "z_0"'),
        (dict(pair="balanced_plugin", evidence=False), 'and the pair "plain_mixture"'),
    ],
)
def test_what_does_not_fit_is_refused(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        make_prior((1, 1, 4), **{"groups": 2, **fields})


def test_renoise_is_refused_with_groups():
    prior = make_prior((1, 1, 4), 2)
    with pytest.raises(UserError, match="groups above 1: set it to 0"):
        with_options(prior, BernoulliSettings(steps=4), {"renoise": 0.5})
