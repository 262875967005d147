"""The training loss of the Bernoulli diffusion (paper, (13); supplement, Algorithm 1)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from binlatent.priors.bernoulli import losses, process
from binlatent.priors.bernoulli.denoiser import Denoiser, by_image
from binlatent.priors.conditions import Condition

Array = jax.Array


class Noise(NamedTuple):
    """What the loss of a batch draws: n images, codes (n, h, w, c)."""

    z_t: Array  # (n, h, w, c) uniform in [0, 1), for the forward process
    t: Array  # (n,) float32: 1..T, or in (0, T] if continuous
    estimated: Array | None = None  # bool (n,), of self-conditioning: which get an estimate
    z_s: Array | None = None  # (n, h, w, c) uniform in [0, 1), for bits in groups
    s: Array | None = None  # (n,) uniform in [0, 1), for their times


def draw_times(
    key: Array, n: int, num_timesteps: int, *, continuous: bool, stratified: bool
) -> Array:
    """Returns (n,) times, float32: uniform over 1..T, or over (0, T] if continuous.

    Args:
      key: a typed PRNG key.
      n: how many.
      num_timesteps: T.
      continuous: see above.
      stratified: one in each nth of the range, from a single offset (Kingma et al., Variational
        Diffusion Models, 2021): each is still uniform, but their mean varies less.
    """
    if stratified:
        u = (jax.random.uniform(key) + jnp.arange(n) / n) % 1.0
    else:
        u = jax.random.uniform(key, (n,))
    if continuous:
        return num_timesteps * (1 - u)
    return jnp.minimum(jnp.floor(u * num_timesteps), num_timesteps - 1) + 1


def draw_noise(denoiser: Denoiser, keys: Array, n: int) -> Noise:
    """Draws a batch's noise from two keys; of self-conditioning the first half gets estimates."""
    t = draw_times(
        *(keys[1], n, denoiser.num_timesteps),
        continuous=denoiser.continuous,
        stratified=denoiser.stratified,
    )
    estimated = None
    if denoiser.self_conditioning:
        t = jnp.concatenate([t[::2], t[1::2]])  # stratified times are spread over either half
        estimated = jnp.arange(n) < (n + 1) // 2
    noise = Noise(jax.random.uniform(keys[0], (n, *denoiser.code_shape)), t, estimated)
    if denoiser.groups == 1:
        return noise
    more = [jax.random.fold_in(key, 1) for key in keys]
    return noise._replace(
        z_s=jax.random.uniform(more[0], noise.z_t.shape), s=jax.random.uniform(more[1], (n,))
    )


def earlier_times(denoiser: Denoiser, noise: Noise) -> Array:
    """Returns the times s that steps from t lead to, (n,): t - 1, or 0 if that is below.

    Of bits in groups any in [0, t], as what the groups before say depends on s, and a sampler may
    take steps of any length; t itself is for what z_t says alone.
    """
    if noise.s is None:
        return jnp.maximum(noise.t - 1, 0)
    if denoiser.continuous:
        return noise.s * noise.t
    return jnp.minimum(jnp.floor(noise.s * (noise.t + 1)), noise.t)


class Prediction(NamedTuple):
    """A batch of codes, their noised versions, and the network's output for them."""

    z_0: Array  # (n, h, w, c)
    z_t: Array  # (n, h, w, c)
    output: Array  # (n, h, w, c), the network's
    flip_logit: Array  # (n, h, w, c), the log-odds of a flip
    k_t: Array  # (n, 1, 1, 1)
    k_s: Array  # (n, 1, 1, 1), at the s of `earlier_times`


def _estimate_half(
    denoiser: Denoiser,
    params: Any,
    z_t: Array,
    t: Array,
    condition: Condition | None,
    estimated: Array,
) -> Array:
    """Returns `first_estimate` of the images that get one, and 1/2, (n, h, w, c).

    Args:
      denoiser, params, z_t, t, condition: as of `Denoiser.first_estimate`.
      estimated: bool (n,), at most half of them, rounded up; `train.state.accumulate` deals those
        of `draw_noise` out evenly.
    """
    # Not a call of all images, of which half would be for nothing.
    first = jnp.argsort(~estimated)[: (len(z_t) + 1) // 2]
    inputs = jax.tree.map(lambda x: x[first], (z_t, t, condition))
    estimate = denoiser.first_estimate(params, *inputs)
    estimate = jnp.full(z_t.shape, 0.5).at[first].set(estimate)
    return jnp.where(by_image(estimated), estimate, 0.5)


def predict(
    denoiser: Denoiser, params: Any, z_0: Array, condition: Condition | None, noise: Noise
) -> Prediction:
    """Noises codes and applies the network (supplement, Algorithm 1, 6 to 8).

    With self-conditioning it also gets an estimate of each image, where the noise does not say
    which images get one. Of bits in groups the output is given those of z_s in the groups before.
    """
    s = earlier_times(denoiser, noise)
    k_t, k_s = (by_image(denoiser.keep_at(x)) for x in (noise.t, s))
    z_t = process.draw(noise.z_t, process.forward_probs(z_0, k_t))
    inputs = (params, z_t, noise.t, condition)
    if noise.estimated is None:
        estimate = denoiser.first_estimate(*inputs)
    else:
        estimate = _estimate_half(denoiser, *inputs, noise.estimated)
    z_s = None
    if noise.z_s is not None:
        z_s = process.draw(noise.z_s, process.posterior_probs(z_t, z_0, k_t, k_s))
    output = denoiser.output(*inputs, estimate, z_s, s)
    return Prediction(z_0, z_t, output, denoiser.flip_logit(output, z_t, noise.t), k_t, k_s)


def bit_losses(denoiser: Denoiser, prediction: Prediction) -> dict[str, Array]:
    """Returns the terms of (13) per bit, in nats: `residual`, `vlb`, or the one that is needed."""
    z_0, z_t, output, flip_logit, k_t, k_s = prediction
    terms = {}
    if denoiser.target != "z_s":
        # z_0 or the flip, from one formula: bits and their log-odds change sign together.
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

    The metrics are `loss`, its terms, unweighted, and `flip_accuracy`, how often the predicted
    flip, rounded, is right.
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
    """Returns each image's flip BCE in nats per bit, (n,), whatever the network's target is.

    With self-conditioning each image has an estimate, as in sampling all steps but the first. Of
    bits in groups it is that of the prediction given z_t alone.
    """
    noise = noise._replace(estimated=None, z_s=None, s=None)
    prediction = predict(denoiser, params, z_0, condition, noise)
    flipped = process.flip_target(prediction.z_t, prediction.z_0)
    return jnp.mean(losses.bce(prediction.flip_logit, flipped), axis=(1, 2, 3))
