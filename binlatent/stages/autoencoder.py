"""Stage 1: the binary autoencoder (paper, Section 3)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from binlatent.models.autoencoder import Autoencoder
from binlatent.stages import state as state_lib

Array = jax.Array
Batch = dict[str, Array]


def draw_noise(key: Array, code_shape: tuple[int, ...]) -> Array:
    """Returns the uniform noise of the bottleneck's draw, of the code's shape."""
    return jax.random.uniform(key, code_shape)


def loss(model: Autoencoder, params: Any, image: Array, uniform: Array) -> tuple[Array, dict]:
    """Returns the reconstruction loss, MSE (paper, (2)), and the metrics to log.

    `bit_entropy` is the mean entropy of a bit given its image, in bits: 0 when the encoder is
    sure, 1 when its codes are coin flips.
    """
    reconstruction, probs = model.apply(params, image, uniform)
    mse = jnp.mean(jnp.square(reconstruction - image))
    entropy = jax.scipy.special.entr(probs) + jax.scipy.special.entr(1 - probs)
    return mse, {"loss": mse, "bit_entropy": jnp.mean(entropy) / jnp.log(2.0)}


def update(
    state: state_lib.TrainState,
    batch: Batch,
    uniform: Array,
    *,
    model: Autoencoder,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[state_lib.TrainState, dict[str, Array]]:
    """Takes one step on a device's share of a batch with the noise given; under pmap."""
    gradients, metrics = jax.grad(
        lambda params: loss(model, params, batch["image"], uniform), has_aux=True
    )(state.params)
    return state_lib.apply_gradients(
        state, gradients, metrics, optimizer=optimizer, ema_decay=ema_decay
    )


def train_step(
    state: state_lib.TrainState, batch: Batch, *, code_shape: tuple[int, ...], **statics: Any
) -> tuple[state_lib.TrainState, dict[str, Array]]:
    """Draws the step's noise and takes the step; under pmap.

    Args:
      state: replicated.
      batch: {"image": (n, h k, w k, channels) in [-1, 1]}.
      code_shape: (h, w, c).
      **statics: of `update`.
    """
    shape = (len(batch["image"]), *code_shape)
    uniform = draw_noise(state_lib.step_key(state), shape)
    return update(state, batch, uniform, **statics)
