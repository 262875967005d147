"""The transformer agrees with the authors'; its invariances and precision."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from binlatent.convert import released
from binlatent.priors import transformer
from binlatent.priors.transformer import Transformer, sine_positions_2d


def make_transformer(condition):
    return Transformer(16, 2, 2, condition, num_classes=3, text_width=6)


def with_random_head(params, seed=0):
    """The head starts at zero; gives it values, so that the output says something."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


LABELS = {
    "none": None,
    "class": jnp.array([0, 1, 2, 1]),
    "text_token": jax.random.normal(jax.random.key(7), (4, 6)),
    "text_cross": jax.random.normal(jax.random.key(8), (4, 3, 6)),
}
Z = jax.random.bernoulli(jax.random.key(5), shape=(4, 2, 3, 5)).astype(jnp.float32)
TIME = jnp.array([0.0, 0.5, 0.7, 0.99])


@pytest.fixture(params=LABELS)
def made(request):
    """A network of each condition, with its parameters and labels."""
    model, label = make_transformer(request.param), LABELS[request.param]
    params = model.init(jax.random.key(0), Z, TIME, label)
    return model, with_random_head(params), label


@pytest.mark.parametrize("name", reference.PRIORS)
def test_logits_agree_with_the_reference_numbers(name):
    condition, io = name.removeprefix("prior_"), reference.io(name)
    condition = "none" if condition == "uncond" else condition
    width = io["label"].shape[-1] if condition.startswith("text") else 0
    model = Transformer(64, 3, 4, condition, num_classes=10, text_width=width)
    z, time = io["z"].reshape(3, 8, 8, 16).astype(np.float32), (io["t"] - 1) / np.float32(64)
    label = io.get("label")
    like = jax.eval_shape(model.init, jax.random.key(0), z, time, label)
    params = {"params": reference.variables(name, like["params"], released.prior_tensors)}

    @jax.jit
    @jax.default_matmul_precision("highest")
    def logits(*condition):
        return model.apply(params, z, time, *condition).reshape(3, 64, 16)

    np.testing.assert_allclose(logits(label), io["logits"], atol=2e-5)
    if label is None:
        return
    np.testing.assert_allclose(logits(), io["logits_uncond"], atol=2e-5)
    given = np.array([True, False, True])  # images of both kinds in one batch
    expected = np.where(given[:, None, None], io["logits"], io["logits_uncond"])
    np.testing.assert_allclose(logits(label, given), expected, atol=2e-5)


def test_transformer_starts_at_zero_and_keeps_the_shape_of_the_code(made):
    model, _, label = made
    output, _ = model.init_with_output(jax.random.key(0), Z, TIME, label)
    np.testing.assert_array_equal(output, np.zeros_like(Z))


def test_transformer_reads_time_label_and_every_token(made):
    model, params, label = made
    base = model.apply(params, Z, TIME, label)
    others = [
        model.apply(params, Z, TIME + 0.1, label),
        model.apply(params, Z.at[:, 1, 2, 0].set(1 - Z[:, 1, 2, 0]), TIME, label),
    ]
    if label is not None:
        others += [model.apply(params, Z, TIME, label[::-1]), model.apply(params, Z, TIME)]
    for other in others:
        # The first token's output changes, so information travels to it.
        assert np.abs(np.asarray(other - base))[0, 0, 0].max() > 1e-5


def test_transformer_treats_images_of_a_batch_apart(made):
    model, params, label = made
    given = jnp.array([True, False, True, True])
    together = model.apply(params, Z, TIME, label, given)
    for i in range(4):
        own = None if label is None or not given[i] else label[i : i + 1]
        alone = model.apply(params, Z[i : i + 1], TIME[i : i + 1], own)
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_a_label_that_is_not_given_has_no_gradient(made):
    model, params, label = made
    if label is None or label.dtype == jnp.int32:
        return
    given = jnp.array([True, False, True, True])
    gradient = jax.grad(lambda x: jnp.sum(model.apply(params, Z, TIME, x, given) ** 2))(label)
    size = np.abs(np.asarray(gradient)).reshape(4, -1).max(axis=1)
    np.testing.assert_array_equal(size > 0, given)


def test_transformer_in_bfloat16_gives_float32_logits_that_agree_roughly(made):
    model, params, label = made
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    half = model.clone(dtype=jnp.bfloat16)
    logits = half.apply(params, Z, TIME, label)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, model.apply(params, Z, TIME, label), atol=0.15)


def test_rounded_weights_give_the_same_logits_in_bfloat16(made):
    model, params, label = made
    half = model.clone(dtype=jnp.bfloat16)
    rounded = half.round_weights(params)
    np.testing.assert_array_equal(
        half.apply(rounded, Z, TIME, label), half.apply(params, Z, TIME, label)
    )
    blocks = rounded["params"]["blocks_0"]
    assert blocks["mlp_0"]["kernel"].dtype == blocks["attn"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert blocks["ln1"]["scale"].dtype == rounded["params"]["head"]["kernel"].dtype == jnp.float32
    # In float32 nothing is to be done.
    assert all(
        jax.tree.leaves(jax.tree.map(lambda x, y: x is y, params, model.round_weights(params)))
    )


def test_positions_are_sines_of_row_and_column():
    positions = np.asarray(sine_positions_2d(3, 5, 16))
    row, column = 2, 4
    frequencies = 10_000.0 ** -(np.arange(4) / 4)
    expected = np.concatenate([f(x * frequencies) for x in (column, row) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(positions[row * 5 + column], expected, atol=1e-6)
    assert len(np.unique(positions.round(4), axis=0)) == 15  # no two positions alike


@pytest.mark.parametrize("keys", [1, 2, 9, 18, 257])
def test_attention_on_cpus_is_the_average_by_softmax(keys):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, m, 3, 4)) for m in (5, keys, keys))
    mask = rng.uniform(size=(2, 1, 1, keys)) < 0.5
    mask[..., 0] = True

    def exact(mask):
        scores = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(4) + np.where(mask, 0, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("nhqk,nkhd->nqhd", weights / weights.sum(-1, keepdims=True), v)

    for given, expected in ((mask, exact(mask)), (None, exact(True))):
        for dtype, atol in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.05)):
            arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
            y = transformer._attend_on_cpu(*arrays, given)
            assert y.dtype == dtype
            np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=atol)


def test_attention_on_cpus_has_the_gradient_of_jaxs():
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((2, 17, 3, 4)).astype(np.float32) for _ in range(4))
    mask = np.arange(17)[None, None, None] < np.array([17, 9])[:, None, None, None]

    def gradients(attend):
        return jax.grad(lambda *x: jnp.sum(attend(*x, mask=mask) * g), argnums=(0, 1, 2))(q, k, v)

    with jax.default_matmul_precision("highest"):
        both = gradients(transformer._attend_on_cpu), gradients(jax.nn.dot_product_attention)
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_those_of_nn_dense(dtype):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((16, 3)), "bias": rng.standard_normal(3)}
    params = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), params)
    x, dy = (jnp.asarray(rng.standard_normal((5, width)), dtype) for width in (16, 3))
    y, transpose = jax.vjp(
        lambda *x: transformer._dense(3, dtype=dtype).apply({"params": x[0]}, x[1]), params, x
    )
    gradients, dx = transpose(dy)
    assert y.dtype == dx.dtype == dtype
    kernel, x, dy = (np.asarray(y, np.float64) for y in (params["kernel"], x, dy))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for ours, expected in (
        (y, x @ kernel + np.asarray(params["bias"])),
        (dx, dy @ kernel.T),
        (gradients["kernel"], x.T @ dy),
        (gradients["bias"], dy.sum(0)),
    ):
        np.testing.assert_allclose(np.asarray(ours, np.float64), expected, tolerance, tolerance)


@pytest.mark.parametrize("platform, summed", [("cpu", "f32"), ("cuda", "bf16"), ("tpu", "bf16")])
def test_products_of_16_bits_are_summed_in_float32_on_cpus_alone(platform, summed):
    x, kernel = jnp.ones((5, 16), jnp.bfloat16), jnp.ones((16, 3), jnp.bfloat16)
    product = jax.jit(transformer._dot_general, static_argnums=(2, 3))
    traced = product.trace(x, kernel, (((1,), (0,)), ((), ())), None)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    (line,) = (line for line in text.splitlines() if "stablehlo.dot_general" in line)
    assert line.split("->")[1].strip().startswith(f"tensor<5x3x{summed}>")


@pytest.mark.parametrize("heads, tokens", [(3, 5), (4, 5), (8, 5), (8, 130), (16, 130)])
@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_attention_is_to_the_first_keys_alone(monkeypatch, platform, heads, tokens):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, **ways: ways[platform](*x))
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, tokens, heads, 4)) for _ in range(3))
    rows = [jnp.asarray(x.reshape(2 * tokens, -1), jnp.float32) for x in (q, k, v)]
    y = transformer._attend(*rows, 2, heads, jnp.array([tokens, 3]), cudnn=True).reshape(q.shape)
    for i, num_keys in enumerate((tokens, 3)):
        weights = np.exp(np.einsum("qhd,khd->hqk", q[i], k[i, :num_keys]) / np.sqrt(4))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("hqk,khd->qhd", weights, v[i, :num_keys])
        np.testing.assert_allclose(y[i], expected, atol=1e-5)


@pytest.mark.parametrize(
    "backend, capability, dtype, keys, width, fits",
    [
        ("gpu", "9.0", jnp.bfloat16, 257, 64, True),
        ("gpu", "8.0", jnp.float16, 64, 128, True),
        ("gpu", "10.3", jnp.bfloat16, 257, 64, True),
        ("gpu", "7.5", jnp.bfloat16, 257, 64, False),
        ("gpu", "gfx942", jnp.bfloat16, 257, 64, False),
        ("gpu", "9.0", jnp.float32, 257, 64, False),
        ("gpu", "9.0", jnp.bfloat16, 18, 64, False),
        ("gpu", "9.0", jnp.bfloat16, 257, 36, False),
        ("gpu", "9.0", jnp.bfloat16, 257, 256, False),
        ("tpu", "9.0", jnp.bfloat16, 257, 64, False),
        ("cpu", "9.0", jnp.bfloat16, 257, 64, False),
    ],
)
def test_cudnn_attends_where_it_can(monkeypatch, backend, capability, dtype, keys, width, fits):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert transformer._cudnn_attends(jax.ShapeDtypeStruct((2, keys, 8, width), dtype)) == fits


@pytest.mark.parametrize("queries, keys", [(5, 5), (5, 8), (4, 7)])
def test_attention_by_cudnn_is_asked_for_evenly_and_changes_nothing(monkeypatch, queries, keys):
    rng = np.random.default_rng(0)
    q, g = (rng.standard_normal((2 * queries, 12)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((2 * keys, 12)).astype(np.float32) for _ in range(2))
    attend, asked = jax.nn.dot_product_attention, []

    def without_a_gpu(q, k, v, implementation, **lengths):
        asked.append((implementation, q.shape[1] % 2, k.shape[1] % 2))
        return attend(q, k, v, **lengths)

    def with_gradients(num_keys, cudnn=True):
        transformer._attend_by_heads.clear_cache()  # it may have been traced without these
        y, transpose = jax.vjp(lambda *x: transformer._attend(*x, 2, 3, num_keys, cudnn), q, k, v)
        return y, *transpose(g)

    both = (None, jnp.array([keys, 3]))
    expected = [with_gradients(num_keys) for num_keys in both]
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))
    monkeypatch.setattr(jax.nn, "dot_product_attention", without_a_gpu)
    monkeypatch.setattr(transformer, "_cudnn_attends", lambda k: True)
    for num_keys, ours in zip(both, expected, strict=True):
        for y, by_cudnn in zip(ours, with_gradients(num_keys), strict=True):
            np.testing.assert_allclose(by_cudnn, y, atol=1e-5)
    assert set(asked) == {("cudnn", 0, 0)}
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    for y, by_xla in zip(expected[0], with_gradients(None, cudnn=False), strict=True):
        np.testing.assert_allclose(by_xla, y, atol=1e-5)
    transformer._attend_by_heads.clear_cache()  # nor shall others have been traced with these
