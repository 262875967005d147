"""The transformer agrees with the authors' network; its invariances and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from binlatent.convert import released
from binlatent.priors.transformer import Transformer, sine_positions_2d


def make_transformer(condition):
    return Transformer(16, 2, 2, condition, num_classes=3, text_width=6)


def with_random_head(params, seed=0):
    """Gives the head, which starts at zero, random values."""
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
    # In float32 nothing changes.
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
