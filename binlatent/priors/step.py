"""Stage 2: the training step of a prior over the codes of a frozen encoder (paper, Section 4)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from binlatent.priors.conditions import Condition, has_text
from binlatent.priors.prior import Prior
from binlatent.runtime import machine
from binlatent.training import state as state_lib

Array = jax.Array
Batch = dict[str, Array]


def draw_batch(
    prior: Prior,
    key: Array,
    probs: Array,
    label: Array | None,
    label_dropout: float = 0.0,
) -> tuple[Array, Condition | None, Any]:
    """Draws the random numbers of a batch: codes, dropped labels, and the noise of the loss.

    Args:
      prior: the kind.
      key: a typed PRNG key.
      probs: the encoder's y, (n, h, w, c) in [0, 1].
      label: of n images; None without a condition.
      label_dropout: probability of dropping an image's label, for guidance (supplement C).

    Returns:
      Bits, float32 (n, h, w, c), drawn from B(y); the condition; the noise of `prior.loss`.
    """
    keys = jax.random.split(key, 4)
    probs = jnp.asarray(probs, jnp.promote_types(probs.dtype, jnp.float32))
    bits = (jax.random.uniform(keys[0], probs.shape) < probs).astype(probs.dtype)
    condition = None
    if label is not None:
        dropped = jax.random.bernoulli(keys[3], label_dropout, (len(probs),))
        condition = Condition(label, ~dropped & has_text(label))
    return bits, condition, prior.draw_noise(keys[1:3], len(probs))


def parts_for_caches(images: int, tokens: int) -> int:
    """Returns the number of parts of a batch on this machine; the update is equal up to rounding.

    On a CPU, parts have 256 tokens per core: the activations of smaller parts fit into the caches,
    but more parts take longer to add up their gradients. On other devices there is one part.

    Args:
      images: number of images in the batch.
      tokens: number of tokens per image.
    """
    if jax.default_backend() != "cpu":
        return 1
    least = 256 * machine.cores()
    divisors = (num for num in range(1, images + 1) if images % num == 0)
    return max(num for num in divisors if num == 1 or images // num * tokens >= least)


def update(
    state: state_lib.TrainState,
    bits: Array,
    condition: Condition | None,
    noise: Any,
    *,
    prior: Prior,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int = 1,
) -> tuple[state_lib.TrainState, dict[str, Array]]:
    """Takes one step on a device's share of a batch, with all noise given; runs under pmap.

    Args:
      state: replicated.
      bits, condition, noise: from `draw_batch`.
      prior: the kind.
      optimizer, ema_decay: of `state.apply_gradients`.
      accumulate: number of sequential parts of the share; it must divide n. 0 for
        `parts_for_caches`.
    """
    n, h, w, _ = bits.shape
    gradients_of = jax.grad(prior.loss, has_aux=True)
    _, (gradients, metrics) = state_lib.accumulate(
        lambda _, part: ((), gradients_of(state.params, *part)),
        (),
        (bits, condition, noise),
        accumulate or parts_for_caches(n, h * w),
    )
    return state_lib.apply_gradients(
        state, gradients, metrics, optimizer=optimizer, ema_decay=ema_decay
    )


def train_step(
    state: state_lib.TrainState,
    batch: Batch,
    encoder_params: Any,
    *,
    encode: Callable[[Any, Array], Array],
    prior: Prior,
    conditional: bool,
    label_dropout: float,
    **statics: Any,
) -> tuple[state_lib.TrainState, dict[str, Array]]:
    """Encodes the batch if needed, draws its random numbers and takes a step; runs under pmap.

    Args:
      state: replicated.
      batch: {"label": (n,)} and either "probs", (n, h, w, c), the encoder's y from the cache, as
        uint8 in units of 1/255, or "image".
      encoder_params: of the frozen encoder, replicated; None with cached codes.
      encode: the frozen encoder, (encoder_params, image) -> y.
      prior: the kind.
      conditional: whether the prior gets the labels.
      label_dropout: of `draw_batch`.
      **statics: of `update`.
    """
    probs = batch["probs"] if "probs" in batch else encode(encoder_params, batch["image"])
    if probs.dtype == jnp.uint8:
        probs = probs / 255
    label = batch["label"] if conditional else None
    drawn = draw_batch(prior, state_lib.step_key(state), probs, label, label_dropout)
    return update(state, *drawn, prior=prior, **statics)


@functools.partial(jax.jit, static_argnames="prior")
def image_metrics(
    params: Any, probs: Array, label: Array | None, key: Array, *, prior: Prior
) -> dict[str, Array]:
    """Returns `prior.image_metrics` of codes drawn from y, (n,) each."""
    bits, condition, noise = draw_batch(prior, key, probs, label)
    return prior.image_metrics(params, bits, condition, noise)
