"""Shapes, invariances and precision of the networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.models.autoencoder import (
    Autoencoder,
    Decoder,
    Encoder,
    depth_to_space,
    space_to_depth,
)
from binlatent.models.transformer import Transformer, sine_positions_2d


def make_autoencoder(factors, attention=None, dtype=jnp.float32, num_blocks=1):
    levels = dict(
        widths=(32,) * len(factors),
        factors=factors,
        attention=attention or (False,) * len(factors),
        num_blocks=num_blocks,
        dtype=dtype,
    )
    return Autoencoder(Encoder(num_bits=6, **levels), Decoder(num_channels=3, **levels))


@pytest.mark.parametrize("factors, side", [((7,), 4), ((1, 2, 2), 7), ((2, 2), 7), ((4, 7), 1)])
def test_downsampling_is_the_product_of_the_factors(factors, side):
    model = make_autoencoder(factors, attention=(False,) * (len(factors) - 1) + (True,))
    images = jnp.zeros((2, 28, 28, 3))
    (reconstruction, probs), params = model.init_with_output(jax.random.key(0), images)
    assert probs.shape == (2, side, side, 6)
    assert reconstruction.shape == images.shape
    np.testing.assert_array_equal(
        model.apply(params, jnp.round(probs), method="decode").shape, images.shape
    )


def test_space_to_depth_moves_each_patch_into_channels():
    images = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = space_to_depth(images, 2)
    assert patches.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(2, 2, 3), images[1, 2:4, 4:6])
    np.testing.assert_array_equal(depth_to_space(patches, 2), images)


def test_every_parameter_of_the_autoencoder_gets_a_gradient():
    model = make_autoencoder((1, 2), attention=(False, True))
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1)
    params = model.init(jax.random.key(1), images)
    uniform = jax.random.uniform(jax.random.key(2), (2, 4, 4, 6))
    gradient = jax.grad(lambda p: jnp.sum((model.apply(p, images, uniform)[0] - images) ** 2))(
        params
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)


def test_bfloat16_keeps_float32_parameters_and_agrees_roughly():
    images = jax.random.uniform(jax.random.key(0), (2, 14, 14, 3), minval=-1)
    params = make_autoencoder((7,)).init(jax.random.key(1), images)
    full, probs = make_autoencoder((7,)).apply(params, images)
    half, half_probs = make_autoencoder((7,), dtype=jnp.bfloat16).apply(params, images)
    assert half.dtype == half_probs.dtype == jnp.float32
    np.testing.assert_allclose(probs, half_probs, atol=0.05)
    half_params = make_autoencoder((7,), dtype=jnp.bfloat16).init(jax.random.key(1), images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half_params))


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
