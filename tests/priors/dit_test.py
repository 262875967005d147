"""The network "dit": each of its parts by a closed form, and the released network with all off."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from binlatent.priors import attention
from binlatent.priors.absorbing.prior import AbsorbingPrior
from binlatent.priors.bernoulli.prior import BernoulliPrior
from binlatent.priors.conditions import Condition
from binlatent.priors.dit import DiT, DiTBlock, swiglu_width
from binlatent.priors.transformer import SelfAttention, Transformer

OFF = {"adaln": False, "qk_norm": False, "swiglu": False, "positions": "learned"}
H, W, C, D, E, HEADS, LAYERS, CLASSES = 2, 3, 5, 16, 6, 2, 2, 3
SHARED = dict(width=D, num_layers=LAYERS, num_heads=HEADS, num_classes=CLASSES, text_width=E)
rng = np.random.default_rng(0)
Z = rng.integers(0, 2, (4, H, W, C)).astype(np.float32)
TIME = np.array([0.0, 0.5, 0.7, 0.99], np.float32)
LABELS = {
    "none": None,
    "class": np.array([0, 1, 2, 1]),
    "text_token": rng.standard_normal((4, E)).astype(np.float32),
    "text_cross": rng.standard_normal((4, 3, E)).astype(np.float32),
}
GIVEN = np.array([True, False, True, True])


def shapes_of(network, condition):
    one = None if LABELS[condition] is None else LABELS[condition][:1]
    return jax.eval_shape(network.init, jax.random.key(0), Z[:1], TIME[:1], one)


@functools.cache
def make(condition, **fields):
    """A network, and random weights for it."""
    network = DiT(condition=condition, **SHARED, **fields)
    rng = np.random.default_rng(1)
    shapes = shapes_of(network, condition)
    return network, jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)


@functools.partial(jax.jit, static_argnames="network")
def outputs(network, params, *inputs):
    return network.apply(params, *inputs)


# All off


@pytest.mark.parametrize("condition", LABELS)
def test_all_off_is_the_released_network(condition):
    network, params = make(condition, **OFF)
    released = Transformer(condition=condition, **SHARED)
    like = shapes_of(released, condition)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, like)
    label = LABELS[condition]
    for asked in [()] if label is None else [(), (label, GIVEN)]:
        ours, theirs = (outputs(x, params, Z, TIME, *asked) for x in (network, released))
        np.testing.assert_array_equal(ours, theirs)
        assert np.abs(ours).max() > 0.1


def test_all_off_starts_as_the_released_network():
    networks = (DiT(condition="class", **SHARED, **OFF), Transformer(condition="class", **SHARED))
    ours, theirs = (
        jax.jit(network.init)(jax.random.key(3), Z, TIME, LABELS["class"]) for network in networks
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# Parameters


def count(condition, adaln, qk_norm, swiglu):
    """The closed form of the number of parameters."""
    f, head, norm = 8 * round(D / 3), D // HEADS, 2 * D
    block = D * 3 * D + 3 * D + D * D + D  # attention
    block += D * 2 * f + 2 * f + f * D + D if swiglu else D * 4 * D + 4 * D + 4 * D * D + D
    block += D * 6 * D + 6 * D if adaln else 2 * (norm + D)  # norms and gammas
    block += 2 * head if qk_norm else 0
    if condition == "text_cross":
        block += D * D + D + E * 2 * D + 2 * D + D * D + D + E + norm + D
        block += 2 * head if qk_norm else 0
    ends = C * D + H * W * D + 2 * (D * D + D) + D * C + C
    ends += D * 2 * D + 2 * D if adaln else norm
    ends += {"class": CLASSES * D, "text_token": E * D + D}.get(condition, 0)
    ends += D if adaln and condition in ("class", "text_token") else 0  # the vector for no label
    return LAYERS * block + ends


@pytest.mark.parametrize("condition", LABELS)
def test_parameters_are_those_of_the_closed_form(condition):
    names = ("adaln", "qk_norm", "swiglu")
    for values in itertools.product((False, True), repeat=3):
        fields = dict(zip(names, values, strict=True))
        # Rotations have no parameters.
        positions = "rotary" if sum(values) % 2 else "learned"
        network = DiT(condition=condition, **SHARED, **fields, positions=positions)
        leaves = jax.tree.leaves(shapes_of(network, condition))
        assert sum(x.size for x in leaves) == count(condition, **fields)
        assert {x.dtype for x in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("d", [64, 128, 256, 512, 768, 1024])
def test_a_swiglu_has_as_many_weights_as_the_mlp(d):
    assert swiglu_width(d) % 8 == 0
    assert abs(3 * d * swiglu_width(d) / (8 * d * d) - 1) <= 4 / (8 * d / 3)


# Parts, in float64


def test_swiglu_is_silu_of_one_half_times_the_other():
    x = np.random.default_rng(0).standard_normal((5, 14)).astype(np.float32)
    a, b = np.split(np.float64(x), 2, axis=1)
    np.testing.assert_allclose(attention.swiglu(x), a / (1 + np.exp(-a)) * b, rtol=1e-5)
    assert attention.swiglu(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def rotated(x, h, w):
    """Rotates (n, h w, heads, D) as complex numbers, row by row and column by column."""
    half = x.shape[-1] // 2
    frequencies = 100.0 ** -(np.arange(half // 2) / (half // 2))
    rows, columns = np.divmod(np.arange(h * w), w)
    angles = np.concatenate([np.outer(y, frequencies) for y in (rows, columns)], axis=1)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[None, :, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def test_rotated_scores_depend_on_the_relative_position_alone():
    h, w, width = 3, 4, 8
    q, k = np.random.default_rng(0).standard_normal((2, 2 * width))
    angles = attention.rotary_angles(h, w, width)
    rows = [np.tile(x, (h * w, 1)).astype(np.float32) for x in (q, k)]  # the same everywhere
    rows = [np.asarray(attention.rotate(x, angles, 2), np.float64) for x in rows]
    expected = [rotated(np.tile(x, (1, h * w, 1)).reshape(1, -1, 2, width), h, w) for x in (q, k)]
    for ours, theirs in zip(rows, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.reshape(h * w, -1), atol=1e-5)
    scores, seen = rows[0] @ rows[1].T, {}
    for i, j in itertools.product(range(h * w), repeat=2):
        place = tuple(np.subtract(np.divmod(j, w), np.divmod(i, w)))
        assert seen.setdefault(place, scores[i, j]) == pytest.approx(scores[i, j], abs=1e-4)
    values = np.array(list(seen.values()))
    assert len(values) == 5 * 7 and np.min(np.diff(np.sort(values))) > 1e-4  # all differ


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_with_qk_norm_against_float64(rotary):
    n, h, w, d, heads = 2, 2, 3, 16, 2
    rng = np.random.default_rng(0)
    x = 5 * rng.standard_normal((n * h * w, d)).astype(np.float32)
    module = SelfAttention(heads, qk_norm=True)
    angles = attention.rotary_angles(h, w, d // heads) if rotary else None
    shapes = jax.eval_shape(lambda key: module.init(key, x, n, None, angles), jax.random.key(0))
    params = jax.tree.map(lambda y: rng.standard_normal(y.shape, np.float32), shapes)
    with jax.default_matmul_precision("highest"):
        found = module.apply(params, x, n, None, angles)

    params = jax.tree.map(np.float64, params)["params"]
    qkv = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    q, k, v = (y.reshape(n, h * w, heads, -1) for y in np.split(qkv, 3, axis=1))
    q, k = (
        y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6) * params[name]["scale"]
        for name, y in (("q_norm", q), ("k_norm", k))
    )
    if rotary:
        q, k = rotated(q, h, w), rotated(k, h, w)
    weights = np.exp(np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(d // heads))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("nhqk,nkhd->nqhd", weights, v).reshape(-1, d)
    expected = y @ params["proj"]["kernel"] + params["proj"]["bias"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def layer_norm(x):
    mean, variance = (f(x, axis=-1, keepdims=True) for f in (np.mean, np.var))
    return (x - mean) / np.sqrt(variance + 1e-5)


def test_a_modulated_block_against_float64():
    n, tokens, d = 2, 3, 12
    rng = np.random.default_rng(0)
    x, condition = (rng.standard_normal(s).astype(np.float32) for s in ((n * tokens, d), (n, d)))
    block, rest = DiTBlock(1, swiglu=True), (None, None, None, None)
    shapes = jax.eval_shape(lambda key: block.init(key, x, n, condition, *rest), jax.random.key(0))
    params = jax.tree.map(lambda y: 0.5 * rng.standard_normal(y.shape, np.float32), shapes)
    with jax.default_matmul_precision("highest"):
        found = block.apply(params, x, n, condition, *rest)

    own = jax.tree.map(np.float64, params)["params"]

    def layer(name, x, own=own):
        return x @ own[name]["kernel"] + own[name]["bias"]

    vectors = np.split(layer("modulation", condition), 6, axis=1)
    shift, scale, gate, shift_2, scale_2, gate_2 = (np.repeat(y, tokens, axis=0) for y in vectors)
    qkv = layer("qkv", layer_norm(np.float64(x)) * (1 + scale) + shift, own["attn"])
    q, k, v = (y.reshape(n, tokens, d) for y in np.split(qkv, 3, axis=1))
    weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(d))
    y = (weights / weights.sum(-1, keepdims=True) @ v).reshape(-1, d)
    y = x + gate * layer("proj", y, own["attn"])
    a, b = np.split(layer("mlp_0", layer_norm(y) * (1 + scale_2) + shift_2), 2, axis=1)
    expected = y + gate_2 * layer("mlp_2", a / (1 + np.exp(-a)) * b)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


# The whole


@pytest.mark.parametrize("condition", ["class", "text_cross"])
def test_an_untrained_network_gives_zero_and_its_blocks_are_the_identity(condition):
    network, label = DiT(condition=condition, **SHARED), LABELS[condition]
    params = jax.jit(network.init)(jax.random.key(0), Z, TIME, label)
    np.testing.assert_array_equal(outputs(network, params, Z, TIME, label), np.zeros_like(Z))
    # For any head, blocks return their input.
    own = params["params"]
    own["head"]["kernel"] = np.random.default_rng(0).standard_normal((D, C), np.float32)
    found = outputs(network, params, Z, TIME, label)
    without = {k: x for k, x in own.items() if not k.startswith("blocks_")}
    expected = outputs(network.clone(num_layers=0), {"params": without}, Z, TIME, label)
    np.testing.assert_array_equal(found, expected)
    assert np.std(found) > 0.5


@pytest.mark.parametrize("adaln", [True, False])
@pytest.mark.parametrize("condition", ["class", "text_token", "text_cross"])
def test_an_image_without_its_label_is_as_in_a_batch_without_labels(condition, adaln):
    network, params = make(condition, adaln=adaln)
    label = LABELS[condition]
    mixed, none = outputs(network, params, Z, TIME, label, GIVEN), outputs(network, params, Z, TIME)
    every = outputs(network, params, Z, TIME, label)
    if adaln and condition != "text_cross":
        np.testing.assert_array_equal(mixed[~GIVEN], none[~GIVEN])
    np.testing.assert_allclose(mixed[~GIVEN], none[~GIVEN], atol=1e-5)
    np.testing.assert_allclose(mixed[GIVEN], every[GIVEN], atol=1e-5)
    assert np.all(np.abs(every - none).max(axis=(1, 2, 3)) > 1e-3)


def test_a_network_reads_its_time_every_token_and_the_place_of_each():
    network, params = make("none")
    base = outputs(network, params, Z, TIME)
    other = Z.copy()
    other[:, 1, 2, 0] = 1 - other[:, 1, 2, 0]
    for changed in (outputs(network, params, Z, TIME + 0.1), outputs(network, params, other, TIME)):
        assert np.all(np.abs(changed - base)[:, 0, 0].max(axis=-1) > 1e-4)
    # Equal tokens have different outputs at different places.
    alike = np.broadcast_to(Z[:1, :1, :1], (1, H, W, C))
    rows = np.asarray(outputs(network, params, alike, TIME[:1])).reshape(-1, C)
    assert min(np.abs(x - y).max() for x, y in itertools.combinations(rows, 2)) > 1e-3


def test_rotary_positions_are_not_the_learned_ones_alone():
    network, params = make("class")
    learned = network.clone(positions="learned")
    ours, theirs = (outputs(x, params, Z, TIME, LABELS["class"]) for x in (network, learned))
    assert np.abs(ours - theirs).max() > 1e-3


# bfloat16


@pytest.mark.parametrize("condition", ["class", "text_cross"])
def test_bfloat16_agrees_roughly_and_stays_finite_with_large_weights(condition):
    network, params = make(condition)
    half, label = network.clone(dtype=jnp.bfloat16), LABELS[condition]
    found = outputs(half, params, Z, TIME, label)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, outputs(network, params, Z, TIME, label), atol=0.3)
    rounded = half.round_weights(params)
    np.testing.assert_array_equal(outputs(half, rounded, Z, TIME, label), found)
    own = rounded["params"]["blocks_0"]
    assert own["modulation"]["kernel"].dtype == own["mlp_0"]["kernel"].dtype == jnp.bfloat16
    assert own["attn"]["q_norm"]["scale"].dtype == rounded["params"]["head"]["kernel"].dtype
    assert own["attn"]["q_norm"]["scale"].dtype == jnp.float32

    @jax.jit
    @jax.value_and_grad
    def total(params):
        return jnp.mean(half.apply(params, Z, TIME, label) ** 2)

    value, gradient = total(jax.tree.map(lambda x: 30 * x, params))
    assert value > 1e4**2
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


def test_qk_norm_keeps_scores_small_in_bfloat16():
    norm = attention.HeadNorm(2)
    x = np.random.default_rng(0).standard_normal((6, D)).astype(np.float32)
    params = {"params": {"scale": np.ones(D // 2, np.float32)}}
    for size in (1, 1e4, 1e15):
        y = norm.apply(params, jnp.asarray(size * x, jnp.bfloat16))
        assert y.dtype == jnp.bfloat16
        squares = np.mean(np.float64(y).reshape(6, 2, -1) ** 2, axis=-1)
        np.testing.assert_allclose(squares, 1, atol=0.02)
    zeros = norm.apply(params, jnp.zeros((6, D), jnp.bfloat16))
    np.testing.assert_array_equal(zeros, np.zeros((6, D)))


# With priors

PRIORS = {
    "bernoulli": (BernoulliPrior, {"num_timesteps": 8}),
    "absorbing": (AbsorbingPrior, {"unit": "bit"}),
}


@pytest.mark.parametrize("kind", PRIORS)
def test_a_prior_trains_samples_and_measures_with_it(kind):
    cls, fields = PRIORS[kind]
    network = DiT(condition="class", **{**SHARED, "num_layers": 1})
    prior = cls((H, W, C), network, **fields)
    key = jax.random.key(0)
    params = jax.jit(lambda key: prior.init(key, jax.ShapeDtypeStruct((1,), jnp.int32)))(key)
    # Two classes, each with one code.
    n, codes = 32, np.random.default_rng(0).integers(0, 2, (2, H, W, C)).astype(np.float32)
    label = np.arange(n) % 2
    bits, optimizer = jnp.asarray(codes[label]), optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        noise = prior.draw_noise(jax.random.split(key), n)
        condition = Condition(jnp.asarray(label), jnp.arange(n) % 8 > 1)
        (loss, _), gradient = jax.value_and_grad(prior.loss, has_aux=True)(
            params, bits, condition, noise
        )
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for i in range(200):
        params, state, loss = step(params, state, jax.random.fold_in(key, i))
        losses.append(loss)
    assert np.mean(losses[-10:]) < 0.2 * np.mean(losses[:5])

    keys, label = jax.random.split(key, 8), np.arange(8) % 2
    settings = prior.check_settings(prior.Settings(steps=8, guidance=1.0))
    found = prior.sample(params, keys, Condition(label), settings)
    assert np.mean(found == codes[label]) > 0.97
    lengths = prior.code_lengths(params, keys, Condition(label), codes[label], None, 1)
    assert np.mean(lengths) < 0.1 * H * W * C
    # Guidance away from the same label changes nothing: (1 + w) a - w a is a.
    settings = prior.check_settings(prior.Settings(steps=8, guidance=2.0))
    against = prior.sample(params, keys, Condition(label, None, label), settings)
    settings = prior.check_settings(prior.Settings(steps=8))
    without = prior.sample(params, keys, Condition(label), settings)
    assert np.mean(against == without) > 0.98
