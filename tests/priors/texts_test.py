"""Texts of several lengths, no text at all, and guidance against another label."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from updates import N, Parts, check_same_params_and_metrics, run

from binlatent.priors import attention
from binlatent.priors import step as prior_step
from binlatent.priors.absorbing.prior import AbsorbingPrior
from binlatent.priors.autoregressive.prior import AutoregressivePrior
from binlatent.priors.bernoulli.prior import BernoulliPrior
from binlatent.priors.conditions import Condition, Conditioning, count_tokens
from binlatent.priors.guidance import noise_from_keys
from binlatent.priors.transformer import CrossAttention
from binlatent.runtime.devices import spread
from binlatent.runtime.errors import UserError
from binlatent.training.state import create_state

SHAPE, WIDTH = (2, 2, 3), 6
KINDS = {
    **dict.fromkeys(("bernoulli", "dit"), BernoulliPrior),  # "dit" has the network of that name
    **{"absorbing": AbsorbingPrior, "ar": AutoregressivePrior},
}
FIELDS = {
    **dict.fromkeys(("bernoulli", "dit"), {"num_timesteps": 8, "evidence": False}),
    "absorbing": {},
    "ar": {"head": "independent"},
}
STEPS = {**dict.fromkeys(("bernoulli", "dit", "absorbing"), {"steps": 4}), "ar": {}}


def texts(*lengths, m=4, seed=0):
    """Features (n, m, e) of texts of these lengths, zeros in the padding."""
    rows = np.random.default_rng(seed).standard_normal((len(lengths), m, WIDTH))
    return np.where(np.arange(m)[None, :, None] < np.reshape(lengths, (-1, 1, 1)), rows, 0).astype(
        np.float32
    )


@functools.cache
def make_prior(kind, condition="text_cross"):
    """A prior, and random weights for it."""
    network = KINDS[kind].make_network(
        SHAPE,
        {"head": "independent", "group": 1},
        name="dit" if kind == "dit" else "released",
        width=16,
        num_layers=1,
        num_heads=2,
        condition=condition,
        num_classes=3,
        text_width=WIDTH,
        dtype=jnp.float32,
    )
    prior = KINDS[kind](SHAPE, network, **FIELDS[kind])
    label = Conditioning(condition, 3, WIDTH).example()
    shapes = jax.eval_shape(lambda key: prior.init(key, label), jax.random.key(0))
    rng = np.random.default_rng(0)
    return prior, jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape, np.float32), shapes)


@functools.partial(jax.jit, static_argnames="network")
def outputs(network, params, bits, time, label=None, given=None):
    return network.apply(params, bits, time, label, given).reshape(bits.shape)


# The mask of the padding


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_attention_is_to_the_tokens_of_the_text_alone(monkeypatch, platform):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, **ways: ways[platform](*x))
    attention._attend_by_heads.clear_cache()  # it may have been traced for the other platform
    n, tokens, d, heads = 5, 3, 8, 2
    text, given = texts(4, 2, 0, 3, 4), np.array([True, True, True, True, False])
    text[3, 1] = 0  # no padding, as another token follows
    x = np.random.default_rng(1).standard_normal((n * tokens, d)).astype(np.float32)
    module = CrossAttention(heads, WIDTH)
    shapes = jax.eval_shape(lambda key: module.init(key, x, n, None, None), jax.random.key(0))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    num_tokens = count_tokens(text, given)
    assert num_tokens.tolist() == [4, 2, 0, 3, 0]
    with jax.default_matmul_precision("highest"):
        found, kept = module.apply(params, x, n, text, num_tokens, mutable="cache")
        again = module.apply({**params, **kept}, x, n, text, num_tokens)
        without = module.apply(params, x, n, None, None)
    attention._attend_by_heads.clear_cache()

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)["params"]

    def layer(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    def expected(x, text):
        q = layer("query", x).reshape(-1, heads, d // heads)
        k, v = np.split(layer("kv", text), 2, axis=-1)
        k, v = (y.reshape(-1, heads, d // heads) for y in (k, v))
        weights = np.exp(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d // heads))
        weights /= weights.sum(-1, keepdims=True)
        return layer("proj", np.einsum("hqk,khd->qhd", weights, v).reshape(-1, d))

    for i, m in enumerate([4, 2, 0, 3, 0]):
        rows = slice(tokens * i, tokens * (i + 1))
        own = expected(x[rows], text[i, :m] if m else params["null_emb"])
        np.testing.assert_allclose(found[rows], own, atol=2e-5)
        null = expected(x[rows], params["null_emb"])
        np.testing.assert_allclose(without[rows], null, atol=2e-5)
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize("kind", ["bernoulli", "dit", "ar"])
def test_padding_changes_neither_the_loss_nor_its_gradient(kind):
    prior, params = make_prior(kind)
    n, given = 5, np.array([True, True, True, True, False])
    bits = (np.random.default_rng(0).uniform(size=(n, *SHAPE)) < 0.5).astype(np.float32)
    noise = prior.draw_noise(jax.random.split(jax.random.key(0)), n)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, label):
        return prior.loss(params, bits, Condition(label, given), noise)

    label = texts(4, 2, 0, 1, 3)
    padded = np.pad(label, ((0, 0), (0, 5), (0, 0)))
    (one, _), gradient = loss(params, label)
    (other, _), gradient_padded = loss(params, padded)
    np.testing.assert_allclose(other, one, atol=1e-6)
    for x, y in zip(*map(jax.tree.leaves, (gradient, gradient_padded)), strict=True):
        assert np.all(np.isfinite(x))
        np.testing.assert_allclose(y, x, atol=1e-6)
    # Rows that are nearly zero are tokens.
    (wrong, _), _ = loss(params, np.where(padded == 0, 1e-3, padded))
    assert abs(wrong - one) > 1e-4


@pytest.mark.parametrize("kind", ["bernoulli", "dit", "ar"])
def test_samples_are_the_same_with_more_padding(kind):
    prior, params = make_prior(kind)
    keys = jax.random.split(jax.random.key(0), 3)
    settings = prior.check_settings(prior.Settings(guidance=1.5, **STEPS[kind]))
    label, against = texts(4, 2, 1), texts(1, 3, 0, m=3, seed=1)
    codes = prior.sample(params, keys, Condition(label, None, against), settings)
    label, against = (np.pad(x, ((0, 0), (0, 3), (0, 0))) for x in (label, against))
    padded = prior.sample(params, keys, Condition(label, None, against), settings)
    np.testing.assert_array_equal(padded, codes)


# No text


@pytest.mark.parametrize("condition", ["text_token", "text_cross"])
@pytest.mark.parametrize("kind", ["bernoulli", "dit", "ar"])
def test_a_text_of_zeros_is_no_text(kind, condition):
    prior, params = make_prior(kind, condition)
    bits = (np.random.default_rng(0).uniform(size=(3, *SHAPE)) < 0.5).astype(np.float32)
    label = texts(4, 0, 2)
    label = label[:, 0] if condition == "text_token" else label
    logits = functools.partial(outputs, prior.network, params, bits, np.full(3, 0.5, np.float32))
    found, without = logits(label), logits()
    np.testing.assert_allclose(found[1], without[1], atol=1e-6)
    np.testing.assert_allclose(logits(label, np.array([True, True, False]))[1:], without[1:], 1e-5)
    np.testing.assert_allclose(logits(np.zeros_like(label)), without, atol=1e-6)
    assert np.all(np.abs(np.asarray(found - without)).max(axis=(1, 2, 3))[[0, 2]] > 1e-3)


def test_a_batch_gives_labels_that_are_neither_dropped_nor_no_text():
    prior, n = make_prior("bernoulli")[0], 64
    key, probs = jax.random.key(3), np.zeros((n, *SHAPE), np.float32)
    dropped = np.asarray(jax.random.bernoulli(jax.random.split(key, 4)[3], 0.3, (n,)))
    lengths = np.arange(n) % 4
    for label in (texts(*lengths), texts(*lengths)[:, 0]):
        _, condition, _ = prior_step.draw_batch(prior, key, probs, label, 0.3)
        np.testing.assert_array_equal(condition.given, ~dropped & (lengths > 0))
        assert condition.against is None
    _, condition, _ = prior_step.draw_batch(prior, key, probs, lengths, 0.3)
    np.testing.assert_array_equal(condition.given, ~dropped)  # 0 is a class


# Guidance against another label


def first_draws(kind, prior, params, condition, keys, w):
    """Returns the first draws of the sampler; for an autoregressive prior, all draws.

    Returns:
      The codes and times that the network gets; the uniforms of the draws, and the bits drawn. Of
      a Bernoulli prior, P(z_0 = 1) in place of bits.
    """
    settings = prior.check_settings(prior.Settings(guidance=w, **STEPS[kind]))
    if kind == "ar":
        codes = prior.sample(params, keys, condition, settings)
        of_tokens = noise_from_keys(keys, SHAPE[-1:])
        uniform = np.stack([of_tokens(i) for i in range(4)], axis=1).reshape(codes.shape)
        return codes, None, uniform, codes
    passed = prior.trajectory(params, keys, condition, settings)
    z_t = np.asarray(passed.z_t, np.float32)
    if kind == "absorbing":
        start = np.full_like(z_t[:, 0], 0.5)
        uniform = noise_from_keys(keys, SHAPE)(0)
        return start, np.ones(len(keys), np.float32), uniform, z_t[:, 1]
    return z_t[:, 0], np.full(len(keys), 7 / 8, np.float32), None, passed.p_0[:, 0]


LABELS = {
    "class": (np.array([0, 1, 2, 0]), np.array([1, 0, 0, 2]), [True] * 4),
    "text_token": (texts(1, 1, 0, 1, m=1)[:, 0], texts(1, 0, 1, 1, m=1, seed=1)[:, 0], None),
    "text_cross": (texts(4, 2, 0, 1), texts(2, 0, 3, 3, m=3, seed=1), None),
}


@pytest.mark.parametrize(
    "kind, condition",
    [
        ("bernoulli", "class"),
        ("bernoulli", "text_cross"),
        ("dit", "class"),
        ("dit", "text_token"),
        ("dit", "text_cross"),
        ("absorbing", "text_token"),
        ("absorbing", "text_cross"),
        ("ar", "text_token"),
        ("ar", "text_cross"),
    ],
)
def test_guidance_goes_against_a_label(kind, condition):
    prior, params = make_prior(kind, condition)
    label, against, has_against = LABELS[condition]
    has_against = has_against or [True, False, True, True]
    keys, w = jax.random.split(jax.random.key(1), len(label)), 2.0
    z, time, uniform, drawn = first_draws(
        kind, prior, params, Condition(label, None, against), keys, w
    )
    logits = functools.partial(outputs, prior.network, params, np.asarray(z), time)
    with_label = np.asarray(logits(label), np.float64)
    if condition != "class":
        with_label[2] = logits()[2]
    other = np.where(np.reshape(has_against, (-1, 1, 1, 1)), logits(against), logits())
    expected = 1 / (1 + np.exp(-((1 + w) * with_label - w * other)))
    if kind in ("bernoulli", "dit"):  # P(z_0 = 1), of flips
        np.testing.assert_allclose(drawn, np.abs(np.asarray(z) - expected), atol=1e-5)
    else:
        sure = np.abs(uniform - expected) > 1e-5
        np.testing.assert_array_equal(drawn[sure], (uniform < expected)[sure])
        assert np.mean(sure) > 0.9

    def changes(w):
        """Returns which images change with another negative label."""
        settings = prior.check_settings(prior.Settings(guidance=w, **STEPS[kind]))
        conditions = Condition(label, None, against), Condition(label)
        pairs = (prior.sample(params, keys, each, settings) for each in conditions)
        return np.any(np.not_equal(*pairs), axis=(1, 2, 3))

    assert not np.any(changes(0.0))
    changed = changes(50.0)
    assert np.any(changed) and not np.any(changed & ~np.array(has_against))


# On several devices


def test_one_and_four_devices_learn_the_same_from_texts():
    prior, params = make_prior("bernoulli")
    optimizer, probs = optax.sgd(0.5), np.full((N, *SHAPE), 0.5, np.float32)
    label = texts(*(np.arange(N) % 5))
    parts = Parts(
        create_state(jax.random.key(1), params, optimizer),
        prior_step.draw_batch(prior, jax.random.key(3), probs, label, 0.1),
        functools.partial(prior_step.update, prior=prior, optimizer=optimizer, ema_decay=0.9),
    )
    check_same_params_and_metrics(run(parts, 1, steps=1), run(parts, 4, steps=1))


@pytest.mark.parametrize("kind", KINDS)
def test_four_devices_draw_the_same_samples(kind):
    prior, params = make_prior(kind)
    settings = prior.check_settings(prior.Settings(guidance=2.0, **STEPS[kind]))
    keys = jax.random.split(jax.random.key(1), 4)
    label, against, _ = LABELS["text_cross"]
    condition = Condition(label, np.ones(4, bool), against)
    alone = prior.sample(params, keys, condition, settings)
    on_four = prior.sample(params, *spread([keys, condition]), settings)
    assert len(on_four.sharding.device_set) == 4
    np.testing.assert_array_equal(on_four, alone)


# Arguments of callers


def test_texts_of_several_lengths_are_padded():
    conditioning, rows = Conditioning("text_cross", 0, WIDTH), texts(4, 2)
    labels = conditioning.labels([rows[0], rows[1, :2]], 2)
    np.testing.assert_array_equal(labels, rows)
    np.testing.assert_array_equal(conditioning.labels(rows[0], 2), rows[[0, 0]])
    with pytest.raises(UserError, match="must be arrays of the same width"):
        conditioning.labels([rows[0], rows[1, :2, :3]], 2)


@pytest.mark.parametrize("kind, shape", [("text_token", (3, 9)), ("text_cross", (3, 4, 9))])
def test_a_width_that_is_not_known_yet_lets_any_pass(kind, shape):
    conditioning = Conditioning.of_config(kind, 0, 0)
    labels = np.ones(shape, np.float32)
    assert conditioning.known(None, labels) is labels
    with pytest.raises(UserError, match=f"condition = '{kind}', takes"):
        conditioning.known(None, labels[..., None, :])
    with pytest.raises(UserError, match="config.prior.text_width is 0"):
        conditioning.example()
