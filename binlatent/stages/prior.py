"""Stage 2: the Bernoulli diffusion prior over the codes of a frozen encoder (paper, Section 4)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from binlatent.diffusion import bernoulli
from binlatent.models.transformer import Transformer
from binlatent.stages import state as state_lib

Array = jax.Array
Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network and the process that it was trained for; its parameters come with each call.

    Fields:
      network: the transformer.
      keep: k_0..k_T as a tuple of floats.
      evidence: whether the network's output is added to the known log-odds of a flip.
    """

    network: Transformer
    keep: tuple[float, ...]
    evidence: bool

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.keep) - 1

    def keep_at(self, t: Array) -> Array:
        """Returns k_t in float32 for integer times of any shape."""
        return jnp.asarray(self.keep, jnp.float32)[t]

    def flip_logit(self, params: Any, z_t: Array, t: Array, label: Array) -> Array:
        """Returns the log-odds that each bit of z_t differs from z_0, float32.

        Args:
          params: of the network.
          z_t: (n, h, w, c) in {0, 1}.
          t: (n,) int in 1..T.
          label: (n,) int; `num_classes` means unlabelled.
        """
        output = self.network.apply(params, z_t, t / self.num_timesteps, label)
        if not self.evidence:
            return output
        return output + bernoulli.flip_evidence(self.keep_at(t))[:, None, None, None]


class Noise(NamedTuple):
    """What one batch draws: n images, codes (n, h, w, c)."""

    z_0: Array  # (n, h, w, c) uniform in [0, 1), for the code
    z_t: Array  # (n, h, w, c) uniform in [0, 1), for the forward process
    t: Array  # (n,) int in 1..T
    unlabelled: Array  # (n,) bool, whose label is dropped


def draw_noise(
    key: Array, code_shape: tuple[int, ...], num_timesteps: int, label_dropout: float
) -> Noise:
    """Draws a batch's noise; code_shape is (n, h, w, c), label_dropout a probability."""
    z_0_key, z_t_key, t_key, label_key = jax.random.split(key, 4)
    n = code_shape[0]
    return Noise(
        z_0=jax.random.uniform(z_0_key, code_shape),
        z_t=jax.random.uniform(z_t_key, code_shape),
        t=jax.random.randint(t_key, (n,), 1, num_timesteps + 1),
        unlabelled=jax.random.bernoulli(label_key, label_dropout, (n,)),
    )


def bit_losses(
    denoiser: Denoiser, params: Any, probs: Array, label: Array, noise: Noise
) -> tuple[Array, Array]:
    """Returns each bit's flip BCE in nats, and whether it was predicted (supplement, Algorithm 1).

    Args:
      denoiser, params: the prior.
      probs: the encoder's y, (n, h, w, c) in [0, 1].
      label: (n,) int.
      noise: of the batch.

    Returns:
      Two arrays (n, h, w, c), float32: the loss (paper, (12)), and 1 where rounding the predicted
      flip is right.
    """
    z_0 = bernoulli.draw(noise.z_0, probs.astype(jnp.float32))
    k_t = denoiser.keep_at(noise.t)[:, None, None, None]
    z_t = bernoulli.draw(noise.z_t, bernoulli.forward_probs(z_0, k_t))
    label = jnp.where(noise.unlabelled, denoiser.network.num_classes, label)
    flip_logit = denoiser.flip_logit(params, z_t, noise.t, label)
    right = (flip_logit > 0) == (bernoulli.flip_target(z_t, z_0) > 0)
    return bernoulli.flip_loss(flip_logit, z_t, z_0), right.astype(jnp.float32)


def update(
    state: state_lib.TrainState,
    batch: Batch,
    noise: Noise,
    *,
    denoiser: Denoiser,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[state_lib.TrainState, dict[str, Array]]:
    """Takes one step on a device's share of a batch with the noise given; under pmap."""

    def loss(params):
        losses, right = bit_losses(denoiser, params, batch["probs"], batch["label"], noise)
        return jnp.mean(losses), {"loss": jnp.mean(losses), "flip_accuracy": jnp.mean(right)}

    gradients, metrics = jax.grad(loss, has_aux=True)(state.params)
    return state_lib.apply_gradients(
        state, gradients, metrics, optimizer=optimizer, ema_decay=ema_decay
    )


def train_step(
    state: state_lib.TrainState,
    batch: Batch,
    encoder_params: Any,
    *,
    encode: Callable[[Any, Array], Array],
    denoiser: Denoiser,
    label_dropout: float,
    **statics: Any,
) -> tuple[state_lib.TrainState, dict[str, Array]]:
    """Encodes the batch if need be, draws the step's noise and takes the step; under pmap.

    Args:
      state: replicated.
      batch: {"label": (n,)} with "probs", (n, h, w, c), the encoder's y from the cache, or
        "image".
      encoder_params: of the frozen encoder, replicated; None with cached codes.
      encode: the frozen encoder, (encoder_params, image) -> y.
      denoiser: of the prior.
      label_dropout: share of labels dropped, a sample at a time, for guidance (supplement C).
      **statics: of `update`.
    """
    probs = batch["probs"] if "probs" in batch else encode(encoder_params, batch["image"])
    noise = draw_noise(
        state_lib.step_key(state), probs.shape, denoiser.num_timesteps, label_dropout
    )
    batch = {"probs": probs, "label": batch["label"]}
    return update(state, batch, noise, denoiser=denoiser, **statics)


@functools.partial(jax.jit, static_argnames="denoiser")
def eval_step(params: Any, probs: Array, label: Array, key: Array, *, denoiser: Denoiser) -> Array:
    """Returns each image's BCE in nats a bit, (n,), at times and with noise drawn from `key`."""
    noise = draw_noise(key, probs.shape, denoiser.num_timesteps, 0.0)
    losses, _ = bit_losses(denoiser, params, probs, label, noise)
    return jnp.mean(losses, axis=(1, 2, 3))
