"""The compiled programs behind the pipeline, and how arrays of any length go through them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from binlatent.autoencoder.modules import Autoencoder
from binlatent.priors.bernoulli import likelihood, sampling
from binlatent.priors.step import Denoiser
from binlatent.runtime import machine

Array = jax.Array


@functools.partial(jax.jit, static_argnames="model")
def encode_probs(params: Any, images: Array, *, model: Autoencoder) -> Array:
    """Returns the probability of each bit of the images' codes, (n, h, w, c) in [0, 1]."""
    return model.apply(params, images, method="probs")


@functools.partial(jax.jit, static_argnames="model")
def encode(params: Any, images: Array, *, model: Autoencoder) -> tuple[Array, dict[str, Array]]:
    """Returns the images' deterministic codes, and what the bottleneck tells of each image."""
    code, aux = model.apply(params, images, method="encode")
    return code, {name: value for name, value in aux.items() if value.ndim}


@functools.partial(jax.jit, static_argnames="model")
def decode_codes(params: Any, codes: Array, *, model: Autoencoder) -> Array:
    """Returns the images of codes, clipped to [-1, 1]."""
    return jnp.clip(model.apply(params, codes, method="decode"), -1, 1)


_SAMPLING_STATICS = ("denoiser", "pair", "threshold_last", "corrector_steps", "return_trajectory")


@functools.partial(jax.jit, static_argnames=_SAMPLING_STATICS)
def sample_codes(
    params: Any,
    keys: Array,
    labels: Array | None,
    start_probs: Array,
    known: sampling.Known | None,
    times: Array,
    guidance: Array,
    temperature: Array,
    corrector_size: Array,
    *,
    denoiser: Denoiser,
    pair: str,
    threshold_last: bool,
    corrector_steps: int,
    return_trajectory: bool,
) -> tuple[Array, sampling.Trajectory | None]:
    """Draws codes from the prior; one compiled program for each number of steps.

    Args:
      params: of the prior's network.
      keys: (n,) typed PRNG keys, one a sample.
      labels: of all samples, as of `Transformer`; None for none, and then no guidance.
      start_probs: (n, h, w, c), of the bits at the first time.
      known: of inpainting.
      times: (S + 1,), to 0.
      guidance: (S,), w at each step.
      temperature, corrector_size: scalars.
      denoiser, pair, threshold_last, corrector_steps, return_trajectory: static.
      The last ones as of `sampling.reverse_process`, which says what is returned.
    """
    params = denoiser.network.round_weights(params)

    def output(z_t, t, labels=None):
        return denoiser.output(params, z_t, jnp.full(len(z_t), t), labels)

    guided = sampling.guide(functools.partial(output, labels=labels), output)

    def denoise(z_t, t, w):
        logit = output(z_t, t) if labels is None else guided(z_t, t, w)
        return denoiser.flip_logit(logit, z_t, jnp.full(len(z_t), t), pair, temperature)

    return sampling.reverse_process(
        denoise,
        sampling.noise_from_keys(keys, start_probs.shape[1:]),
        start_probs,
        times=times,
        keep=denoiser.keep_at(times),
        guidance=guidance,
        pair=pair,
        known=known,
        threshold_last=threshold_last,
        corrector_steps=corrector_steps,
        corrector_size=corrector_size,
        return_trajectory=return_trajectory,
    )


_sample_codes_by_eigen = jax.jit(
    sample_codes.__wrapped__,
    static_argnames=_SAMPLING_STATICS,
    compiler_options={machine.YNN_FUSIONS: ""},  # nothing to YNNPACK
)


def sampler(start_probs: Array, denoiser: Denoiser) -> Callable:
    """Returns `sample_codes`, compiled with the faster of XLA's kernels for such a batch.

    On two cores of an Intel with AMX Eigen multiplied wide float32 matrices of many rows faster
    than YNNPACK, on an Ice Lake within 3% and on a Zen 3 slower; AMX, which has no float32, only
    tells the processor. What is returned is to be called, and not traced: JAX takes a compiler's
    options from no function inside another.

    Args:
      start_probs, denoiser: as of `sample_codes`.
    """
    n, h, w, _ = start_probs.shape
    rows, network = n // jax.local_device_count() * h * w, denoiser.network
    large = rows >= 1024 and network.width >= 512 and network.dtype == jnp.float32
    by_ynnpack = jax.default_backend() == "cpu" and machine.multiplies_by_ynnpack()
    by_eigen = large and by_ynnpack and machine.has_amx()
    return _sample_codes_by_eigen if by_eigen else sample_codes


@functools.partial(jax.jit, static_argnames=("denoiser", "num_draws"))
def code_lengths(
    params: Any,
    keys: Array,
    labels: Array | None,
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
        return denoiser.flip_logit(denoiser.output(params, z_t, t, labels), z_t, t)

    return likelihood.likelihood_bound(
        denoise,
        sampling.noise_from_keys(keys, codes.shape[1:]),
        codes,
        times=times,
        keep=denoiser.keep_at(times),
        num_draws=num_draws,
    )
