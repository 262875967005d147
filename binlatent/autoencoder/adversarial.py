"""Adversarial losses, and the augmentation of the discriminator's images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Array = jax.Array

POLICIES = ("colour", "translation")

# Brightness, saturation, contrast: the bounds of their uniform distributions.
_COLOUR_LOW = (-0.5, 0.0, 0.5)
_COLOUR_HIGH = (0.5, 2.0, 1.5)


# Losses


def hinge_discriminator_loss(real_logits: Array, fake_logits: Array) -> Array:
    """Returns (mean(max(0, 1 - real)) + mean(max(0, 1 + fake))) / 2 (VQGAN's code).

    Args:
      real_logits, fake_logits: any shape; large means real.
    """
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real_logits)) + jnp.mean(jax.nn.relu(1 + fake_logits)))


def generator_loss(fake_logits: Array) -> Array:
    """Returns minus the mean of the logits of generated images, any shape."""
    return -jnp.mean(fake_logits)


def adaptive_weight(
    reconstruction_gradient: Array, generator_gradient: Array, maximum: float
) -> Array:
    """Returns the adversarial weight |g_rec| / (|g_gen| + 1e-4) (VQGAN, Esser et al., 2021, (7)).

    Args:
      reconstruction_gradient, generator_gradient: gradients of the two losses with respect to the
        decoder's last kernel, for the whole batch: under pmap, average them over devices first.
      maximum: the largest weight.

    Returns:
      A scalar in [0, maximum], without gradient.
    """
    # 1e-4 is from their code, the paper has 1e-6.
    ratio = optax.tree.norm(reconstruction_gradient) / (optax.tree.norm(generator_gradient) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, maximum))


def r1_penalty(logits_of: Callable[[Array], Array], images: Array) -> Array:
    """Returns half of the mean squared gradient norm at real images (Mescheder et al., 2018, (9)).

    The gradient is that of the sum over images of each image's mean logit. The penalty can be
    differentiated with respect to the parameters in `logits_of`.

    Args:
      logits_of: (n, height, width, channels) -> (n, ...).
      images: real, (n, height, width, channels).
    """
    gradient = jax.grad(lambda x: len(x) * jnp.mean(logits_of(x)))(images)
    return 0.5 * jnp.sum(jnp.square(gradient)) / len(images)


# Augmentation: DiffAugment (Zhao et al., NeurIPS 2020)


def draw_augmentation(
    key: Array, n: int, height: int, width: int, policy: tuple[str, ...]
) -> dict[str, Array]:
    """Draws the noise of `augment` for n images.

    Args:
      key: PRNG key.
      n, height, width: of the images.
      policy: some of `POLICIES`.

    Returns:
      By policy: the (n, 3) amounts of `colour`; the (n, 2) int shifts of `translate`, uniform up to
      an eighth of the side in each direction.
    """
    _check(policy)
    noise = {}
    for name, own_key in zip(policy, jax.random.split(key, len(policy)), strict=True):
        if name == "colour":
            low, high = jnp.array([_COLOUR_LOW]), jnp.array([_COLOUR_HIGH])
            noise[name] = jax.random.uniform(own_key, (n, 3), minval=low, maxval=high)
        else:
            most = jnp.array([[_largest_shift(height), _largest_shift(width)]])
            noise[name] = jax.random.randint(own_key, (n, 2), -most, most + 1)
    return noise


def augment(images: Array, noise: dict[str, Array], policy: tuple[str, ...]) -> Array:
    """Augments images for the discriminator; differentiable in `images`.

    Args:
      images: (n, height, width, channels), real or generated.
      noise: from `draw_augmentation`, for at least this policy.
      policy: some of `POLICIES`, applied in this order; () returns the images unchanged.
    """
    _check(policy)
    for name in policy:
        images = (colour if name == "colour" else translate)(images, noise[name])
    return images


def colour(images: Array, amounts: Array) -> Array:
    """Changes brightness, then saturation, then contrast.

    Args:
      images: (n, height, width, channels).
      amounts: (n, 3): a number added to all values; the factor of a pixel's differences from its
        mean over channels, 0 for greyscale; the factor of differences from the image's mean.
    """
    brightness, saturation, contrast = (amount.reshape(-1, 1, 1, 1) for amount in amounts.T)
    images = images + brightness
    grey = jnp.mean(images, axis=3, keepdims=True)
    images = grey + saturation * (images - grey)
    mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    return mean + contrast * (images - mean)


def translate(images: Array, shifts: Array) -> Array:
    """Shifts images; zeros fill the border.

    Args:
      images: (n, height, width, channels).
      shifts: (n, 2) int, pixels down and to the right, at most an eighth of the side (rounded).
    """
    down, right = (_largest_shift(side) for side in images.shape[1:3])
    padded = jnp.pad(images, ((0, 0), (down, down), (right, right), (0, 0)))

    def window(image, shift):
        return jax.lax.dynamic_slice(
            image, (down - shift[0], right - shift[1], 0), images.shape[1:]
        )

    return jax.vmap(window)(padded, shifts)


def _largest_shift(side: int) -> int:
    return int(side * 0.125 + 0.5)


def _check(policy: tuple[str, ...]) -> None:
    for name in policy:
        if name not in POLICIES:
            raise ValueError(f"a policy must be 'colour' or 'translation', got {name!r}")
