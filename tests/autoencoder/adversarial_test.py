"""Adversarial losses in closed form; augmentations by brute force in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from binlatent.autoencoder import adversarial

BOTH = ("colour", "translation")


def random_images(n, height=8, width=8, channels=3):
    return jax.random.uniform(jax.random.key(0), (n, height, width, channels), minval=-1)


# Losses


def test_hinge_losses_computed_by_hand():
    real = jnp.array([[3.0, 1.0], [0.5, -1.0]])  # 0, 0, 0.5, 2
    fake = jnp.array([[-3.0, -1.0], [0.5, 1.0]])  # 0, 0, 1.5, 2
    loss = adversarial.hinge_discriminator_loss(real, fake)
    np.testing.assert_allclose(loss, 0.5 * (2.5 / 4 + 3.5 / 4), rtol=1e-6)
    np.testing.assert_allclose(adversarial.generator_loss(fake), 2.5 / 4, rtol=1e-6)
    # The size of the map does not matter.
    np.testing.assert_allclose(
        adversarial.hinge_discriminator_loss(real, fake[:1]), 0.5 * 2.5 / 4, rtol=1e-6
    )


def test_hinge_loss_pulls_only_inside_its_margin():
    gradient = jax.grad(adversarial.hinge_discriminator_loss, argnums=(0, 1))
    real, fake = gradient(jnp.array([2.0, 0.0]), jnp.array([-2.0, 0.0]))
    np.testing.assert_allclose(real, [0, -0.25])
    np.testing.assert_allclose(fake, [0, 0.25])


def test_adaptive_weight_is_the_ratio_of_norms_up_to_its_maximum():
    reconstruction = jnp.array([3.0, 4.0]).reshape(1, 1, 1, 2)
    for generator, maximum, expected in (
        ([6.0, 8.0], 1.0, 5 / 10.0001),
        ([0.6, 0.8], 1.0, 1.0),
        ([0.6, 0.8], 1e4, 5 / 1.0001),
        ([0.0, 0.0], 1e6, 5e4),
    ):
        generator = jnp.array(generator).reshape(1, 1, 1, 2)
        weight = adversarial.adaptive_weight(reconstruction, generator, maximum)
        np.testing.assert_allclose(weight, expected, rtol=1e-6)
        assert weight.shape == ()
    assert adversarial.adaptive_weight(0 * generator, 0 * generator, 1.0) == 0


def test_adaptive_weight_passes_no_gradient_on():
    gradient = jax.grad(adversarial.adaptive_weight, argnums=(0, 1))(
        jnp.ones((2, 2)), 3 * jnp.ones((2, 2)), 1.0
    )
    np.testing.assert_array_equal(gradient, np.zeros((2, 2, 2)))


def test_r1_of_quadratic_logits_equals_the_closed_form():
    images = random_images(5, 4, 3, 2)
    weights = jax.random.normal(jax.random.key(1), (1, 4, 3, 1))

    def penalty(a):
        # One logit per pixel; the gradient of their mean at x is 2 a w x / 12.
        return adversarial.r1_penalty(
            lambda x: a * jnp.sum(weights * x**2, axis=-1, keepdims=True), images
        )

    value, gradient = jax.value_and_grad(penalty)(1.7)
    norms = np.sum((2 * 1.7 / 12 * np.float64(weights) * np.float64(images)) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(value, 0.5 * norms.mean(), rtol=1e-5)
    # It is quadratic in a.
    np.testing.assert_allclose(gradient, 2 * value / 1.7, rtol=1e-5)


# Augmentation


@functools.cache
def draws():
    draw = functools.partial(adversarial.draw_augmentation, policy=BOTH)
    return {name: np.asarray(x) for name, x in draw(jax.random.key(0), 20_000, 28, 16).items()}


def test_colours_are_drawn_uniformly_within_their_ranges():
    low, high = np.array([-0.5, 0.0, 0.5]), np.array([0.5, 2.0, 1.5])
    unit = (draws()["colour"] - low) / (high - low)
    assert unit.shape == (20_000, 3)
    assert np.all((unit >= 0) & (unit <= 1))
    # Six standard errors, of the deciles of a uniform variable and of correlations.
    shares = np.apply_along_axis(lambda u: np.histogram(u, 10, (0, 1))[0], 0, unit) / 20_000
    np.testing.assert_allclose(shares, 0.1, atol=6 * np.sqrt(0.09 / 20_000))
    np.testing.assert_allclose(np.corrcoef(unit.T), np.eye(3), atol=6 / np.sqrt(20_000))


def test_shifts_are_drawn_uniformly_within_an_eighth_of_the_sides():
    shifts = draws()["translation"]
    # int(28 / 8 + 0.5) = 4 and int(16 / 8 + 0.5) = 2; all pairs have equal probability.
    pairs, counts = np.unique(shifts, axis=0, return_counts=True)
    assert pairs.tolist() == [[i, j] for i in range(-4, 5) for j in range(-2, 3)]
    p = 1 / 45
    np.testing.assert_allclose(counts / 20_000, p, atol=6 * np.sqrt(p * (1 - p) / 20_000))


def test_only_the_policys_noise_is_drawn():
    for policy in ((), ("colour",), ("translation",), BOTH):
        assert set(adversarial.draw_augmentation(jax.random.key(0), 2, 8, 8, policy)) == set(policy)
    # All numbers differ, between keys too.
    amounts = draws()["colour"][:100]
    assert len(np.unique(amounts)) == 300
    other = adversarial.draw_augmentation(jax.random.key(1), 100, 28, 16, BOTH)["colour"]
    assert not np.any(amounts == other)


def test_colour_is_that_of_float64():
    images = random_images(20)
    amounts = draws()["colour"][:20]
    got = adversarial.augment(images, {"colour": amounts}, ("colour",))
    for image, (brightness, saturation, contrast), result in zip(
        np.float64(images), np.float64(amounts), got, strict=True
    ):
        image = image + brightness
        for pixel in image.reshape(-1, 3):
            pixel[:] = (pixel - pixel.mean()) * saturation + pixel.mean()
        np.testing.assert_allclose(
            result, (image - image.mean()) * contrast + image.mean(), atol=1e-6
        )


def test_invariants_of_each_colour_amount():
    images = random_images(3)

    def change(*amounts):
        return np.float64(adversarial.colour(images, jnp.tile(jnp.array([amounts]), (3, 1))))

    original = np.float64(images)
    np.testing.assert_allclose(change(0.0, 1.0, 1.0), original, atol=1e-6)
    np.testing.assert_allclose(change(0.3, 1.0, 1.0), original + 0.3, atol=1e-6)
    grey = change(0.0, 0.0, 1.0)
    np.testing.assert_allclose(grey, np.repeat(original.mean(3, keepdims=True), 3, 3), atol=1e-6)
    # Only brightness changes an image's mean.
    mean = change(0.0, 1.9, 0.6).mean((1, 2, 3))
    np.testing.assert_allclose(mean, original.mean((1, 2, 3)), atol=1e-6)
    flat = change(0.0, 1.0, 0.0)
    np.testing.assert_allclose(flat.std((1, 2, 3)), 0, atol=1e-6)


def test_saturation_leaves_images_of_one_channel():
    images = random_images(3, channels=1)
    amounts = jnp.array([[0.0, 0.0, 1.0], [0.0, 0.7, 1.0], [0.0, 2.0, 1.0]])
    np.testing.assert_allclose(adversarial.colour(images, amounts), images, atol=1e-6)


@pytest.mark.parametrize("height, width, channels", [(16, 9, 3), (8, 20, 1), (3, 12, 2)])
def test_translation_by_every_shift_is_that_of_brute_force(height, width, channels):
    down, right = int(height / 8 + 0.5), int(width / 8 + 0.5)
    shifts = np.array(
        [[i, j] for i in range(-down, down + 1) for j in range(-right, right + 1)], np.int32
    )
    images = np.asarray(random_images(len(shifts), height, width, channels))
    expected = np.zeros_like(images)
    for n, (i, j) in enumerate(shifts):
        for y in range(height):
            for x in range(width):
                if 0 <= y - i < height and 0 <= x - j < width:
                    expected[n, y, x] = images[n, y - i, x - j]
    augment = jax.jit(functools.partial(adversarial.augment, policy=("translation",)))
    np.testing.assert_array_equal(augment(images, {"translation": shifts}), expected)


def test_policies_are_applied_in_the_order_given():
    images = random_images(6, 16, 16)
    noise = adversarial.draw_augmentation(jax.random.key(3), 6, 16, 16, BOTH)
    coloured = adversarial.colour(images, noise["colour"])
    moved = adversarial.translate(images, noise["translation"])
    for policy, expected in (
        ((), images),
        (BOTH, adversarial.translate(coloured, noise["translation"])),
        (BOTH[::-1], adversarial.colour(moved, noise["colour"])),
    ):
        got = adversarial.augment(images, noise, policy)
        np.testing.assert_array_equal(got, expected)


def test_gradients_are_those_of_finite_differences():
    images = random_images(3, 9, 8)
    noise = adversarial.draw_augmentation(jax.random.key(3), 3, 9, 8, BOTH)
    check_grads(
        lambda x: adversarial.augment(x, noise, BOTH), (images,), 1, atol=1e-2, rtol=1e-2, eps=0.1
    )
    # Pixels that are shifted out have no gradient.
    shift = jnp.array([[1, 0]], jnp.int32)
    gradient = jax.grad(lambda x: jnp.sum(adversarial.translate(x, shift)))(images[:1])
    np.testing.assert_array_equal(gradient[0, :, 0, 0], [1] * 8 + [0])


def test_unknown_policy_is_refused():
    assert adversarial.POLICIES == BOTH
    for call in (
        lambda: adversarial.draw_augmentation(jax.random.key(0), 1, 8, 8, ("colour", "cutout")),
        lambda: adversarial.augment(random_images(1), {}, ("cutout",)),
    ):
        with pytest.raises(ValueError, match="'colour' or 'translation', got 'cutout'"):
            call()
