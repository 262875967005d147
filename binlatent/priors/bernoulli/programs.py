"""The compiled programs of a Bernoulli diffusion: sampling, and the likelihood bound."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from binlatent.priors.bernoulli import likelihood, process, sampling
from binlatent.priors.bernoulli.denoiser import Denoiser
from binlatent.priors.conditions import Condition, negative
from binlatent.priors.guidance import guide, noise_from_keys

Array = jax.Array

_STATICS = ("denoiser", "pair", "threshold_last", "corrector_steps", "return_trajectory")


@functools.partial(jax.jit, static_argnames=_STATICS)
def sample_codes(
    params: Any,
    keys: Array,
    condition: Condition | None,
    bits: Array | None,
    known: sampling.Known | None,
    times: Array,
    guidance: Array,
    temperature: Array,
    corrector_size: Array,
    renoise: Array | None = None,
    *,
    denoiser: Denoiser,
    pair: str,
    threshold_last: bool,
    corrector_steps: int,
    return_trajectory: bool,
) -> tuple[Array, sampling.Trajectory | None]:
    """Draws codes; each number of steps compiles a program.

    Args:
      params: of the network.
      keys: (n,) typed PRNG keys, one per sample.
      condition: of all samples; None for no condition and no guidance.
      bits: (n, h, w, c), codes to start from, with noise up to the first time; None to start from
        fair coin flips.
      known: of inpainting.
      times: (S + 1,), decreasing to 0.
      guidance: (S,), w at each step.
      temperature, corrector_size: scalars.
      renoise: a scalar, or None for a program without it.
      denoiser, pair, threshold_last, corrector_steps, return_trajectory: static.

    Arguments from `known` on are described in `sampling.reverse_process`, and so is the result.
    """
    params, shape = denoiser.network.round_weights(params), denoiser.code_shape

    def output(z_t, t, condition=None):
        return denoiser.output(params, z_t, jnp.full(len(z_t), t), condition)

    guided = guide(
        functools.partial(output, condition=condition),
        functools.partial(output, condition=negative(condition)),
    )

    def denoise(z_t, t, w):
        logit = output(z_t, t) if condition is None else guided(z_t, t, w)
        return denoiser.flip_logit(logit, z_t, jnp.full(len(z_t), t), pair, temperature)

    keep = denoiser.keep_at(times)
    if bits is None:
        start_probs = jnp.full((len(keys), *shape), 0.5)
    else:
        start_probs = process.forward_probs(bits, keep[0])
    return sampling.reverse_process(
        denoise,
        noise_from_keys(keys, shape),
        start_probs,
        times=times,
        keep=keep,
        guidance=guidance,
        pair=pair,
        known=known,
        threshold_last=threshold_last,
        corrector_steps=corrector_steps,
        corrector_size=corrector_size,
        renoise=renoise,
        return_trajectory=return_trajectory,
    )


@functools.partial(jax.jit, static_argnames=("denoiser", "num_draws"))
def bound_code_lengths(
    params: Any,
    keys: Array,
    condition: Condition | None,
    codes: Array,
    times: Array,
    *,
    denoiser: Denoiser,
    num_draws: int,
) -> Array:
    """Returns the bound on each code's length in bits, (n,); see `likelihood.likelihood_bound`."""
    params = denoiser.network.round_weights(params)

    def denoise(z_t, t):
        t = jnp.full(len(z_t), t)
        return denoiser.flip_logit(denoiser.output(params, z_t, t, condition), z_t, t)

    return likelihood.likelihood_bound(
        denoise,
        noise_from_keys(keys, codes.shape[1:]),
        codes,
        times=times,
        keep=denoiser.keep_at(times),
        num_draws=num_draws,
    )
