"""Attention and products, by each implementation for devices, against NumPy and JAX."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.priors import attention
from binlatent.priors.transformer import Transformer


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
            y = attention._attend_on_cpu(*arrays, given)
            assert y.dtype == dtype
            np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=atol)


def test_attention_on_cpus_has_the_gradient_of_jaxs():
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((2, 17, 3, 4)).astype(np.float32) for _ in range(4))
    mask = np.arange(17)[None, None, None] < np.array([17, 9])[:, None, None, None]

    def gradients(attend):
        return jax.grad(lambda *x: jnp.sum(attend(*x, mask=mask) * g), argnums=(0, 1, 2))(q, k, v)

    with jax.default_matmul_precision("highest"):
        both = gradients(attention._attend_on_cpu), gradients(jax.nn.dot_product_attention)
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_those_of_nn_dense(dtype):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((16, 3)), "bias": rng.standard_normal(3)}
    params = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), params)
    x, dy = (jnp.asarray(rng.standard_normal((5, width)), dtype) for width in (16, 3))
    y, transpose = jax.vjp(
        lambda *x: attention.dense(3, dtype=dtype).apply({"params": x[0]}, x[1]), params, x
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
    product = jax.jit(attention._dot_general, static_argnums=(2, 3))
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
    attention._attend_by_heads.clear_cache()  # it may have been traced for the other platform
    y = attention.attend(*rows, 2, heads, jnp.array([tokens, 3])).reshape(q.shape)
    attention._attend_by_heads.clear_cache()
    for i, num_keys in enumerate((tokens, 3)):
        weights = np.exp(np.einsum("qhd,khd->hqk", q[i], k[i, :num_keys]) / np.sqrt(4))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("hqk,khd->qhd", weights, v[i, :num_keys])
        np.testing.assert_allclose(y[i], expected, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_causal_attention_is_to_no_later_key(monkeypatch, platform):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, **ways: ways[platform](*x))
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 7, 4, 4)) for _ in range(3))
    rows = [jnp.asarray(x.reshape(14, -1), jnp.float32) for x in (q, k, v)]
    for num_keys in (None, jnp.array([7, 3])):
        attention._attend_by_heads.clear_cache()  # it may have been traced for the other platform
        y = attention.attend(*rows, 2, 4, num_keys, causal=True).reshape(q.shape)
        seen = np.arange(7)[None] <= np.arange(7)[:, None]
        for i, first in enumerate((7, 7) if num_keys is None else (7, 3)):
            scores = np.einsum("qhd,khd->hqk", q[i], k[i]) / np.sqrt(4)
            weights = np.exp(scores) * (seen & (np.arange(7)[None] < first))
            weights /= weights.sum(-1, keepdims=True)
            np.testing.assert_allclose(y[i], np.einsum("hqk,khd->qhd", weights, v[i]), atol=1e-5)
    attention._attend_by_heads.clear_cache()


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
    assert attention._cudnn_attends(jax.ShapeDtypeStruct((2, keys, 8, width), dtype)) == fits


@pytest.mark.parametrize(
    "queries, keys, causal", [(5, 5, False), (5, 5, True), (5, 8, False), (4, 7, False)]
)
def test_attention_by_cudnn_is_asked_for_evenly_and_changes_nothing(
    monkeypatch, queries, keys, causal
):
    rng = np.random.default_rng(0)
    q, g = (rng.standard_normal((2 * queries, 12)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((2 * keys, 12)).astype(np.float32) for _ in range(2))
    attend, asked = jax.nn.dot_product_attention, []

    def without_a_gpu(q, k, v, implementation, **lengths):
        asked.append((implementation, q.shape[1] % 2, k.shape[1] % 2, lengths["is_causal"]))
        return attend(q, k, v, **lengths)

    def with_gradients(num_keys):
        attention._attend_by_heads.clear_cache()  # it may have been traced without these
        y, transpose = jax.vjp(lambda *x: attention.attend(*x, 2, 3, num_keys, causal), q, k, v)
        return y, *transpose(g)

    both = (None, jnp.array([keys, 3]))
    expected = [with_gradients(num_keys) for num_keys in both]
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, default, **_: default(*x))
    monkeypatch.setattr(jax.nn, "dot_product_attention", without_a_gpu)
    monkeypatch.setattr(attention, "_cudnn_attends", lambda k: True)
    for num_keys, ours in zip(both, expected, strict=True):
        for y, by_cudnn in zip(ours, with_gradients(num_keys), strict=True):
            np.testing.assert_allclose(by_cudnn, y, atol=1e-5)
    assert set(asked) == {("cudnn", 0, 0, causal)}
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    monkeypatch.setattr(attention, "_cudnn_attends", lambda k: False)
    for y, by_xla in zip(expected[0], with_gradients(None), strict=True):
        np.testing.assert_allclose(by_xla, y, atol=1e-5)
    attention._attend_by_heads.clear_cache()  # and others must not be traced with these


@pytest.mark.parametrize("condition, kinds", [("class", 1), ("text_cross", 2)])
def test_every_attention_of_the_network_asks_for_cudnn(monkeypatch, condition, kinds):
    asked = []
    monkeypatch.setattr(attention, "_cudnn_attends", lambda k: bool(asked.append(k)))
    network = Transformer(16, 3, 2, condition, num_classes=3, text_width=6)
    jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((2, 4, 4, 8)), jnp.zeros(2))
    assert len(asked) == 3 * kinds
