"""The training loss of the Bernoulli diffusion (paper, (13); supplement, Algorithm 1)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from binlatent.priors.bernoulli import losses, process
from binlatent.priors.bernoulli.denoiser import Denoiser, by_image
from binlatent.priors.conditions import Condition

Array = jax.Array


class Noise(NamedTuple):
    """The random numbers of the loss of a batch: n images, codes (n, h, w, c)."""

    z_t: Array  # (n, h, w, c) uniform in [0, 1), for the forward process
    t: Array  # (n,) float32: 1..T, or in (0, T] if continuous


def draw_times(
    key: Array, n: int, num_timesteps: int, *, continuous: bool, stratified: bool
) -> Array:
    """Returns (n,) times, float32: uniform over 1..T, or over (0, T] if continuous.

    Args:
      key: a typed PRNG key.
      n: how many.
      num_timesteps: T.
      continuous: see above.
      stratified: one time in each nth of the range, from one random offset (Kingma et al.,
        Variational Diffusion Models, 2021): each is uniform, but their mean varies less.
    """
    if stratified:
        u = (jax.random.uniform(key) + jnp.arange(n) / n) % 1.0
    else:
        u = jax.random.uniform(key, (n,))
    if continuous:
        return num_timesteps * (1 - u)
    return jnp.minimum(jnp.floor(u * num_timesteps), num_timesteps - 1) + 1


def draw_noise(denoiser: Denoiser, keys: Array, n: int) -> Noise:
    """Draws a batch's noise from two keys."""
    return Noise(
        z_t=jax.random.uniform(keys[0], (n, *denoiser.code_shape)),
        t=draw_times(
            *(keys[1], n, denoiser.num_timesteps),
            continuous=denoiser.continuous,
            stratified=denoiser.stratified,
        ),
    )


class Prediction(NamedTuple):
    """A batch of codes, their noised versions, and the network's output for them."""

    z_0: Array  # (n, h, w, c)
    z_t: Array  # (n, h, w, c)
    output: Array  # (n, h, w, c), of the network
    flip_logit: Array  # (n, h, w, c), the log-odds of a flip
    k_t: Array  # (n, 1, 1, 1)
    k_s: Array  # (n, 1, 1, 1), at s = max(t - 1, 0)


def predict(
    denoiser: Denoiser, params: Any, z_0: Array, condition: Condition | None, noise: Noise
) -> Prediction:
    """Adds noise to codes and applies the network (supplement, Algorithm 1, 6 to 8)."""
    k_t = by_image(denoiser.keep_at(noise.t))
    k_s = by_image(denoiser.keep_at(jnp.maximum(noise.t - 1, 0)))
    z_t = process.draw(noise.z_t, process.forward_probs(z_0, k_t))
    output = denoiser.output(params, z_t, noise.t, condition)
    return Prediction(z_0, z_t, output, denoiser.flip_logit(output, z_t, noise.t), k_t, k_s)


def bit_losses(denoiser: Denoiser, prediction: Prediction) -> dict[str, Array]:
    """Returns the terms of (13) that are needed, in nats per bit: `residual` and `vlb`."""
    z_0, z_t, output, flip_logit, k_t, k_s = prediction
    terms = {}
    if denoiser.target != "z_s":
        # One formula for z_0 and the flip: bits and their log-odds change sign together.
        logit = flip_logit if denoiser.pair == "plain_mixture" else output
        loss = losses.bce if denoiser.pair == "plain_mixture" else losses.balanced_bce
        terms["residual"] = loss(logit, process.flip_target(z_t, z_0))
        if denoiser.vlb_weight:
            terms["vlb"] = losses.posterior_kl(flip_logit, z_t, z_0, k_t, k_s)
    else:
        posterior = process.posterior_probs(z_t, z_0, k_t, k_s)
        terms["vlb"] = losses.bce(output, posterior) - losses.entropy(posterior)
    return terms


def loss(
    denoiser: Denoiser, params: Any, z_0: Array, condition: Condition | None, noise: Noise
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of a batch (paper, (13)) and its metrics: scalars.

    The metrics are `loss`, its unweighted terms, and `flip_accuracy`, the share of flips that are
    predicted correctly.
    """
    prediction = predict(denoiser, params, z_0, condition, noise)
    terms = bit_losses(denoiser, prediction)
    scale = {"residual": 1.0, "vlb": denoiser.vlb_weight}
    if denoiser.target == "z_s":
        scale = {"vlb": 1.0}
    total = sum(scale[name] * term for name, term in terms.items())
    weight = losses.time_weight(noise.t, denoiser.num_timesteps, denoiser.time_weight)
    total = jnp.mean(by_image(weight) * total)
    flipped = process.flip_target(prediction.z_t, prediction.z_0)
    right = (prediction.flip_logit > 0) == (flipped > 0)
    metrics = {name: jnp.mean(term) for name, term in terms.items()}
    return total, {"loss": total, **metrics, "flip_accuracy": jnp.mean(right)}


def flip_bce(
    denoiser: Denoiser, params: Any, z_0: Array, condition: Condition | None, noise: Noise
) -> Array:
    """Returns each image's flip BCE in nats per bit, (n,), for any target of the network."""
    prediction = predict(denoiser, params, z_0, condition, noise)
    flipped = process.flip_target(prediction.z_t, prediction.z_0)
    return jnp.mean(losses.bce(prediction.flip_logit, flipped), axis=(1, 2, 3))
