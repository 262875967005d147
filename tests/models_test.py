"""Shapes, invariances and precision of the transformer."""

import jax
import jax.numpy as jnp
import numpy as np

from binlatent.models.transformer import Transformer, sine_positions_2d


def make_transformer(**fields):
    return Transformer(width=16, num_layers=2, num_heads=2, **fields)


def with_random_head(params, seed=0):
    """The head starts at zero; gives it values, so that the output says something."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def test_transformer_starts_at_zero_and_keeps_the_shape_of_the_code():
    z = jnp.ones((3, 4, 2, 5))
    model = make_transformer(num_classes=10)
    output, _ = model.init_with_output(jax.random.key(0), z, jnp.ones(3), jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(output, np.zeros_like(z))


def test_transformer_reads_time_label_and_every_token():
    model = make_transformer(num_classes=10)
    z = jax.random.bernoulli(jax.random.key(5), shape=(1, 4, 4, 5)).astype(jnp.float32)
    t, label = jnp.array([0.5]), jnp.array([3])
    params = with_random_head(model.init(jax.random.key(0), z, t, label))
    base = model.apply(params, z, t, label)
    flipped = z.at[0, 3, 3, 0].set(1 - z[0, 3, 3, 0])
    for other in (
        model.apply(params, z, jnp.array([0.25]), label),
        model.apply(params, z, t, jnp.array([10])),
        model.apply(params, flipped, t, label),
    ):
        # The first token's output changes, so information travels to it.
        assert np.abs(np.asarray(other - base))[0, 0, 0].max() > 1e-5


def test_transformer_treats_images_of_a_batch_apart():
    model = make_transformer(num_classes=3)
    z = jax.random.bernoulli(jax.random.key(5), shape=(4, 2, 2, 5)).astype(jnp.float32)
    t, label = jnp.array([0.1, 0.5, 0.7, 1.0]), jnp.array([0, 1, 2, 3])
    params = with_random_head(model.init(jax.random.key(0), z, t, label))
    together = model.apply(params, z, t, label)
    for i in range(4):
        alone = model.apply(params, z[i : i + 1], t[i : i + 1], label[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_transformer_in_bfloat16_gives_float32_logits_that_agree_roughly():
    z = jax.random.bernoulli(jax.random.key(5), shape=(4, 2, 2, 5)).astype(jnp.float32)
    t, label = jnp.array([0.1, 0.5, 0.7, 1.0]), jnp.array([0, 1, 2, 3])
    full, half = (make_transformer(num_classes=3, dtype=d) for d in (jnp.float32, jnp.bfloat16))
    params = half.init(jax.random.key(0), z, t, label)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    params = with_random_head(params)
    logits = half.apply(params, z, t, label)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, full.apply(params, z, t, label), atol=0.1)


def test_transformer_without_classes_needs_no_label():
    model = make_transformer()
    z = jnp.ones((1, 2, 2, 5))
    params = model.init(jax.random.key(0), z, jnp.ones(1))
    assert not any("Embed" in jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(params))
    assert model.apply(params, z, jnp.ones(1)).shape == z.shape


def test_positions_are_sines_of_row_and_column():
    positions = np.asarray(sine_positions_2d(3, 5, 16))
    row, column = 2, 4
    frequencies = 10_000.0 ** -(np.arange(4) / 4)
    expected = np.concatenate([f(x * frequencies) for x in (row, column) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(positions[row * 5 + column], expected, atol=1e-6)
    assert len(np.unique(positions.round(4), axis=0)) == 15  # no two positions alike
