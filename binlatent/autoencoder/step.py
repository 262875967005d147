"""The losses and the training step of stage 1 (paper, Section 3, (2); supplement B)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from binlatent.autoencoder import adversarial
from binlatent.autoencoder.discriminator import Discriminator
from binlatent.autoencoder.lpips import LPIPS
from binlatent.autoencoder.modules import Autoencoder, last_kernel
from binlatent.runtime import devices
from binlatent.training import state as state_lib

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]


class Objective(NamedTuple):
    """The weights of the losses; a loss of weight 0 is not computed.

    Fields:
      mse, l1: mean squared and absolute error per pixel and channel.
      perceptual: LPIPS.
      adversarial: the weight of -mean D(reconstruction).
      adaptive: whether that weight is |grad reconstruction| / |grad adversarial| at the decoder's
        last kernel, with `adversarial` as its maximum (Esser et al., 2021, (7)).
      r1: the discriminator's gradient penalty.
      entropy: of `bottleneck.entropy_penalty`, for bits.
      commitment, kl: of the bottlenecks "vq" and "real".
      augment: policies of `adversarial.augment` for the discriminator's images.
    """

    mse: float
    l1: float
    perceptual: float
    adversarial: float
    adaptive: bool
    r1: float
    entropy: float
    commitment: float
    kl: float
    augment: tuple[str, ...]


class Networks(NamedTuple):
    """The modules of the stage; None for those that no loss needs."""

    autoencoder: Autoencoder
    discriminator: Discriminator | None
    lpips: LPIPS | None


class Noise(NamedTuple):
    """The random numbers of a step, along the batch.

    Fields:
      uniform: for the bottleneck, of the code's shape.
      real, fake: for `adversarial.augment` of real and generated images.
    """

    uniform: Array
    real: Any
    fake: Any


def draw_noise(
    key: Array, image_shape: tuple[int, ...], code_shape: tuple[int, ...], policy: tuple[str, ...]
) -> Noise:
    """Draws the noise of a step; both shapes start with n."""
    uniform_key, real_key, fake_key = jax.random.split(key, 3)
    draw = functools.partial(adversarial.draw_augmentation, policy=policy)
    return Noise(
        jax.random.uniform(uniform_key, code_shape),
        draw(real_key, *image_shape[:3]),
        draw(fake_key, *image_shape[:3]),
    )


def reconstruction_loss(
    reconstruction: Array, image: Array, objective: Objective, perceptual: Callable | None
) -> tuple[Array, Metrics]:
    """Returns the weighted sum of the reconstruction losses (paper, (2)).

    Args:
      reconstruction, image: (n, height, width, channels), about [-1, 1].
      objective: with the weights `mse`, `l1` and `perceptual`.
      perceptual: (image, image) -> (n,), or None if its weight is 0.

    Returns:
      The sum, and each term without its weight.
    """
    terms = {}
    if objective.mse:
        terms["mse"] = jnp.mean(optax.losses.squared_error(reconstruction, image))
    if objective.l1:
        terms["l1"] = jnp.mean(jnp.abs(reconstruction - image))
    if objective.perceptual:
        terms["perceptual"] = jnp.mean(perceptual(reconstruction, image))
    weighted = [getattr(objective, name) * value for name, value in terms.items()]
    return sum(weighted, jnp.zeros(())), terms


def discriminator_loss(
    params: Any,
    batch_stats: Any,
    real: Array,
    fake: Array,
    discriminator: Discriminator,
    objective: Objective,
) -> tuple[Array, tuple[Any, Metrics]]:
    """Returns the hinge loss with the gradient penalty, the new statistics and metrics."""

    def logits_of(images, batch_stats):
        logits, new = discriminator.apply(
            {"params": params, "batch_stats": batch_stats}, images, mutable="batch_stats"
        )
        return logits, new.get("batch_stats", {})

    real_logits, batch_stats_real = logits_of(real, batch_stats)
    fake_logits, batch_stats_both = logits_of(fake, batch_stats_real)
    loss = adversarial.hinge_discriminator_loss(real_logits, fake_logits)
    metrics = {
        "discriminator_loss": loss,
        "real_logit": jnp.mean(real_logits),
        "fake_logit": jnp.mean(fake_logits),
    }
    if objective.r1:
        penalty = adversarial.r1_penalty(lambda x: logits_of(x, batch_stats)[0], real)
        loss = loss + objective.r1 * penalty
        metrics["r1"] = penalty
    return loss, (batch_stats_both, metrics)


class Gradients(NamedTuple):
    """Gradients of the autoencoder's and the discriminator's parameters, and metrics."""

    params: Any
    discriminator: Any  # {} while the discriminator is not trained
    metrics: Metrics


def gradients(
    state: state_lib.TrainState,
    batch_stats: Any,
    image: Array,
    noise: Noise,
    lpips_params: Any,
    *,
    networks: Networks,
    objective: Objective,
) -> tuple[Any, Gradients]:
    """Returns the discriminator's new statistics, and the gradients of both networks' losses.

    Both gradients are at the same parameters and the same reconstruction. Call this under pmap.
    Without `networks.discriminator` there is no adversarial loss.

    Args:
      state: before the step.
      batch_stats: of the discriminator.
      image: (n, h k, w k, channels) in [-1, 1].
      noise: of `draw_noise`.
      lpips_params: of `networks.lpips`, frozen.
      networks, objective: static.
    """
    model, discriminator, lpips = networks

    def autoencode(params):
        reconstruction, aux = model.apply(params, image, noise.uniform)
        loss, metrics = model.bottleneck.loss(aux, objective)
        return (reconstruction, loss), metrics

    # Gradients with respect to the image first; one pass back through the autoencoder for all.
    (reconstruction, of_code), pull_back, metrics = jax.vjp(autoencode, state.params, has_aux=True)
    perceptual = lpips and functools.partial(lpips.apply, lpips_params)
    (loss, terms), to_image = jax.value_and_grad(reconstruction_loss, has_aux=True)(
        reconstruction, image, objective, perceptual
    )
    metrics = {"loss": loss + of_code, **terms, **metrics}
    of_discriminator = {}
    if discriminator:
        variables = {"params": state.discriminator["params"], "batch_stats": batch_stats}

        def generator_loss(image):
            fake = adversarial.augment(image, noise.fake, objective.augment)
            logits, _ = discriminator.apply(variables, fake, mutable="batch_stats")
            return adversarial.generator_loss(logits)

        generator, to_image_adversarial = jax.value_and_grad(generator_loss)(reconstruction)
        weight = objective.adversarial
        if objective.adaptive:
            # The compiler removes all of this gradient except for the last kernel's.
            at_last_kernel = [
                devices.mean_over_devices(last_kernel(pull_back((x, jnp.zeros(())))[0]))
                for x in (to_image, to_image_adversarial)
            ]
            weight = adversarial.adaptive_weight(*at_last_kernel, objective.adversarial)
            metrics["adversarial_weight"] = weight
        to_image = to_image + weight * to_image_adversarial
        metrics["generator_loss"] = generator
        metrics["loss"] = metrics["loss"] + weight * generator
        of_discriminator, (batch_stats, logged) = jax.grad(discriminator_loss, has_aux=True)(
            state.discriminator["params"],
            batch_stats,
            adversarial.augment(image, noise.real, objective.augment),
            adversarial.augment(reconstruction, noise.fake, objective.augment),
            discriminator,
            objective,
        )
        metrics |= logged
    (of_params,) = pull_back((to_image, jnp.ones(())))
    return batch_stats, Gradients(of_params, of_discriminator, metrics)


def create_discriminator_state(
    discriminator: Discriminator,
    key: Array,
    image_shape: tuple[int, ...],
    optimizer: optax.GradientTransformation,
) -> dict[str, Any]:
    """Returns `TrainState.discriminator` before the first step."""
    variables = discriminator.lazy_init(key, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return {
        "params": variables["params"],
        "batch_stats": variables.get("batch_stats", {}),
        "opt_state": optimizer.init(variables["params"]),
    }


def update(
    state: state_lib.TrainState,
    batch: Batch,
    noise: Noise,
    lpips_params: Any,
    *,
    networks: Networks,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    discriminator_rate: float = 1.0,
    accumulate: int = 1,
) -> tuple[state_lib.TrainState, Metrics]:
    """Takes one step of both networks on a device's share of a batch; call under pmap.

    Args:
      state: replicated.
      batch: {"image": (n, h k, w k, channels) in [-1, 1]}.
      noise: of `draw_noise`.
      lpips_params: frozen; {} without LPIPS.
      networks: without a discriminator, that of `state` does not change.
      objective: weights of the losses.
      optimizer: for both networks, each with its own state.
      ema_decay: of the autoencoder's parameters.
      discriminator_rate: the discriminator's learning rate relative to the optimizer's.
      accumulate: number of parts, a divisor of n, to process one after the other.
    """
    part = functools.partial(gradients, state, networks=networks, objective=objective)
    batch_stats, (of_params, of_discriminator, metrics) = state_lib.accumulate(
        lambda stats, parts: part(stats, *parts, lpips_params),
        state.discriminator.get("batch_stats", {}),
        (batch["image"], noise),
        accumulate,
    )
    if networks.discriminator:
        # The statistics are synchronised over the devices already.
        state, logged = _update_discriminator(
            state, of_discriminator, batch_stats, optimizer, discriminator_rate
        )
        metrics |= logged
    return state_lib.apply_gradients(
        state, of_params, metrics, optimizer=optimizer, ema_decay=ema_decay
    )


def _update_discriminator(
    state: state_lib.TrainState,
    gradient: Any,
    batch_stats: Any,
    optimizer: optax.GradientTransformation,
    rate: float,
) -> tuple[state_lib.TrainState, Metrics]:
    gradient = devices.mean_over_devices(gradient)
    old = state.discriminator
    updates, opt_state = optimizer.update(gradient, old["opt_state"], old["params"])
    if rate != 1:
        updates = jax.tree.map(lambda x: rate * x, updates)
    params = optax.apply_updates(old["params"], updates)
    new = {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}
    return state.replace(discriminator=new), {
        "discriminator_grad_norm": state_lib.global_norm(gradient),
        "discriminator_param_norm": state_lib.global_norm(params),
    }


def train_step(
    state: state_lib.TrainState,
    batch: Batch,
    lpips_params: Any,
    *,
    code_shape: tuple[int, ...],
    objective: Objective,
    **statics: Any,
) -> tuple[state_lib.TrainState, Metrics]:
    """Draws the step's noise and takes the step; call under pmap.

    Args:
      state, batch, lpips_params: as in `update`.
      code_shape: (h, w, c).
      objective, **statics: as in `update`.
    """
    shape = batch["image"].shape
    noise = draw_noise(state_lib.step_key(state), shape, (shape[0], *code_shape), objective.augment)
    return update(state, batch, noise, lpips_params, objective=objective, **statics)
