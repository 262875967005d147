"""The causal network: causality, cache, precision, and updates on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from updates import check_same_params_and_metrics, prior_parts, run

from binlatent.experiment import resolve
from binlatent.priors.autoregressive.prior import AutoregressivePrior, AutoregressiveSettings
from binlatent.priors.conditions import Condition

SHAPE, N = (2, 3, 5), 4
BITS = jax.random.bernoulli(jax.random.key(5), shape=(N, *SHAPE)).astype(jnp.float32)
LABELS = {
    "none": None,
    "class": jnp.array([0, 1, 2, 1]),
    "text_token": jax.random.normal(jax.random.key(7), (N, 6)),
    "text_cross": jax.random.normal(jax.random.key(8), (N, 3, 6)),
}
HEADS = ["independent", "joint"]


def make_network(condition="class", head="joint", dtype=jnp.float32, num_layers=1):
    """A network, and small random weights for it."""
    network = AutoregressivePrior.make_network(
        SHAPE,
        {"head": head, "group": 2},
        width=16,
        num_layers=num_layers,
        num_heads=2,
        condition=condition,
        num_classes=3,
        text_width=6,
        dtype=dtype,
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), BITS, None, LABELS[condition])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), shapes)
    return network, params


@functools.partial(jax.jit, static_argnames="network")
def logits(network, params, bits, label=None, given=None):
    return network.apply(params, bits, None, label, given)


@functools.partial(jax.jit, static_argnames="network")
def cached_logits(network, params, bits, label=None, given=None):
    """The same logits, computed token by token and group by group."""
    n, (h, w, c), groups = len(bits), SHAPE, network.head.num_groups
    tokens = bits.reshape(n, h * w, c)

    def step(cache, place):
        before = tokens[:, jnp.maximum(place - 1, 0)]
        variables = {**params, "cache": cache}
        hidden, changed = network.apply(
            *(variables, before, place, label, given), method="advance", mutable="cache"
        )
        own = [
            network.apply(params, hidden, tokens[:, place], jnp.asarray(j), method="group_logits")
            for j in range(groups)
        ]
        return changed["cache"], jnp.stack(own, axis=1)

    cache = network.empty_cache(params, n, label, given)
    return jax.lax.scan(step, cache, jnp.arange(h * w))[1].swapaxes(0, 1)


def test_an_untrained_prior_gives_every_code_a_bit_a_bit():
    prior = AutoregressivePrior(SHAPE, make_network("none")[0], "joint", 2)
    params = jax.jit(prior.init, static_argnums=1)(jax.random.key(0), None)
    found = prior.code_lengths(params, None, None, BITS, None, 1)
    np.testing.assert_allclose(found, np.prod(SHAPE), rtol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_a_token_sees_all_earlier_ones_and_no_later_one(head):
    network, params = make_network(head=head)
    base = logits(network, params, BITS, LABELS["class"])
    for place in range(6):
        tokens = BITS.reshape(N, 6, 5)
        other = tokens.at[:, place].set(1 - tokens[:, place]).reshape(BITS.shape)
        change = np.abs(np.asarray(logits(network, params, other, LABELS["class"]) - base))
        change = change.max(axis=(0, 3))  # (l, G)
        assert np.all(change[:place] == 0) and np.all(change[place + 1 :] > 1e-4)
        # A group sees the groups before it in its token; independent bits see none.
        assert np.all(change[place, :1] == 0) and np.all(change[place, 1:] > 1e-4)


def test_a_group_sees_the_bits_of_the_groups_before_alone():
    network, params = make_network("none")
    base = logits(network, params, BITS)
    for bit in range(5):  # groups of 2, 2 and 1
        other = logits(network, params, BITS.at[:, 0, 1, bit].set(1 - BITS[:, 0, 1, bit]))
        change = np.abs(np.asarray(other - base))[:, 1].max(axis=(0, 2))
        np.testing.assert_array_equal(change > 0, np.arange(3) > bit // 2)


@pytest.mark.parametrize(
    "condition, head, num_layers",
    [
        ("none", "independent", 1),
        ("class", "joint", 2),
        ("text_token", "independent", 1),
        ("text_cross", "joint", 1),
    ],
)
def test_cached_logits_are_those_of_one_pass(condition, head, num_layers):
    network, params = make_network(condition, head, num_layers=num_layers)
    label = LABELS[condition]
    given = None if label is None else jnp.array([True, False, True, True])
    expected = logits(network, params, BITS, label, given)
    found = cached_logits(network, params, BITS, label, given)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if label is None:
        return
    # An image without a label equals one in a batch without labels; the others see theirs.
    without = logits(network, params, BITS)
    np.testing.assert_allclose(expected[1], without[1], atol=1e-5)
    assert np.all(np.abs(np.asarray(expected - without))[[0, 2, 3]].max(axis=(2, 3)) > 1e-4)


def test_the_cache_of_bfloat16_is_of_bfloat16_and_agrees_roughly():
    network, params = make_network("text_cross", dtype=jnp.bfloat16)
    cache = network.empty_cache(params, N, LABELS["text_cross"], None)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    rounded = network.round_weights(params)
    found = cached_logits(network, rounded, BITS, LABELS["text_cross"])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, logits(network, params, BITS, LABELS["text_cross"]), atol=0.3)
    inner = rounded["params"]["head"]
    assert inner["mlp_0"]["kernel"].dtype == jnp.bfloat16 and inner["weights"].dtype == np.float32


def test_gradients_are_finite_in_bfloat16_and_none_is_zero():
    network, params = make_network("class", "joint", jnp.bfloat16)
    prior = AutoregressivePrior(SHAPE, network, "joint", 2)
    condition = Condition(LABELS["class"], jnp.array([True, False, True, True]))
    gradient = jax.jit(jax.grad(lambda params: prior.loss(params, BITS, condition, ())[0]))(params)
    for path, x in jax.tree_util.tree_leaves_with_path(gradient):
        assert x.dtype == jnp.float32 and np.all(np.isfinite(x)), path
        assert np.any(np.asarray(x) != 0), path


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_a_sample_takes_the_products_of_one_pass_a_network(guidance):
    # In the loop over tokens, rows of one token are counted; before it, those of the text.
    network, params = make_network("text_cross")
    prior = AutoregressivePrior(SHAPE, network, "joint", 2)
    keys, label = jax.random.split(jax.random.key(0), N), LABELS["text_cross"]
    settings = AutoregressiveSettings(guidance=guidance)
    program = jax.make_jaxpr(lambda label: prior.sample(params, keys, Condition(label), settings))
    calls = prior.network_calls(settings, True)
    assert calls == (1, int(guidance > 0))
    rows = products(program(label).jaxpr)
    one_pass = products(jax.make_jaxpr(lambda: logits(network, params, BITS, label))().jaxpr)
    # Except for the first token, which embeds no token, and a text's query of zeros.
    extra = N * 5 * 16 + N * (16 * 16 * 2 + 2 * 3 * 16)
    assert rows == sum(calls) * (one_pass + extra)


def products(jaxpr, times=1):
    """The multiplications of matrix products of a program, its loops unrolled."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += (
                times * np.prod(eqn.outvars[0].aval.shape) * np.prod([shape[i] for i in contracted])
            )
        count = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        branches = eqn.params.get("branches", ())[-1:]  # of platforms, all alike here
        inner = [x for x in eqn.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        for other in (*branches, *inner):
            total += products(getattr(other, "jaxpr", other), times * count)
    return total


def test_one_and_four_devices_give_the_same_update(tiny_config):
    tiny_config.prior.kind = "autoregressive"
    parts = prior_parts(resolve(tiny_config).with_classes(10), optax.sgd(0.5))
    one = run(parts, 1, steps=2)
    check_same_params_and_metrics(one, run(parts, 4, steps=2))
    first = jax.tree.leaves(parts.state.params)
    assert any(np.any(x != y) for x, y in zip(first, jax.tree.leaves(one[0]), strict=True))
