"""The reverse process, from random bits to a code, in one compiled loop (paper, Algorithm 2)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from binlatent.priors.bernoulli import process, targets
from binlatent.priors.guidance import Noise

Array = jax.Array

# (z_t, t, w) -> the flip logits for the pair, with temperature, float32, the shape of z_t. t is a
# scalar in (0, T], w the guidance at t.
Denoise = Callable[[Array, Array, Array], Array]


class Known(NamedTuple):
    """Known bits of z_0 (inpainting).

    Fields:
      z_0: codes; only the bits under the mask are used.
      mask: 1 where a bit is known, 0 where it is drawn; same shape.
      noised: whether the known bits of z_t are drawn from q(z_t | z_0), as noisy as the others. If
        False, they are those of z_0, as in the authors' code.
    """

    z_0: Array
    mask: Array
    noised: Array | bool = False


class Trajectory(NamedTuple):
    """The states of the sampler over S steps for n codes."""

    z_t: Array  # bool, (S + 1, n, h, w, c), at all times
    p_0: Array  # float32, (S, n, h, w, c), P(z_0 = 1 | z_t) at all times except the last


def reverse_process(
    denoise: Denoise,
    noise: Noise,
    start_probs: Array,
    *,
    times: Array,
    keep: Array,
    guidance: Array,
    pair: str = "plain_mixture",
    known: Known | None = None,
    threshold_last: bool = False,
    corrector_steps: int = 0,
    corrector_size: float | Array = 0.0,
    renoise: float | Array | None = None,
    return_trajectory: bool = False,
) -> tuple[Array, Trajectory | None]:
    """Draws codes by ancestral sampling (paper, (8); Algorithm 2).

    Times are arbitrary: a step from t to s uses q(z_t | z_s) with k_{t|s} = k_t / k_s.

    Args:
      denoise: returns the flip logits for the posterior of the pair.
      noise: uniforms; draw 0 is for the first z_t. Each step uses one, and one for each of its
        corrector steps.
      start_probs: P(z_t = 1) at the first time, (n, h, w, c); 1/2 at T.
      times: (S + 1,), decreasing to 0.
      keep: (S + 1,), k at those times.
      guidance: (S,), w at the start of each step.
      pair: "plain_mixture" or "balanced_plugin", the posterior to use.
      known: known bits, or None.
      threshold_last: whether the step to t = 0 rounds the prediction of z_0, as in the authors'
        code, instead of drawing z_0, which is exact. Under "balanced_plugin" the rounded prediction
        lacks the evidence of the bit's own noisy value.
      corrector_steps: number of corrector steps after each step except the last. They preserve
        q(z_s) to first order in their size, and so correct errors. Each costs one network call.
      corrector_size: in [0, 1], share of bits that a corrector step draws anew.
      renoise: see `process.renoised_probs`, in [0, 1); None for 0.
      return_trajectory: whether to return the states.

    Returns:
      The codes z_0, float32 in {0, 1}, and the trajectory, or None.
    """

    def put_known(z_t, k_t, uniform):
        if known is None:
            return z_t
        # Draws from q(z_t | z_0); k = 1 leaves the bits unchanged.
        k_t = jnp.where(known.noised, k_t, 1.0)
        noised = process.draw(uniform, process.forward_probs(known.z_0, k_t))
        return jnp.where(known.mask > 0, noised, z_t)

    def evidence(k_t):
        # The difference of a flip logit and a balanced one.
        return process.flip_evidence(k_t) if pair == "plain_mixture" else 0.0

    posterior = {
        "plain_mixture": process.mixture_posterior_probs,
        "balanced_plugin": process.plugin_posterior_probs,
    }[pair]

    def correct(z_s, s, k_s, w, index):
        balanced_logit = denoise(z_s, s, w) - evidence(k_s)
        flip_probs = process.corrector_flip_probs(balanced_logit, k_s, corrector_size)
        uniform = noise(index)
        flips = process.draw(uniform, flip_probs)
        return put_known(process.flip_target(z_s, flips), k_s, uniform)

    def reverse_step(z_t, step):
        i, t, s, k_t, k_s, w, w_s = step
        prediction = targets.z_0_probs(denoise(z_t, t, w), z_t)
        p_0 = posterior(z_t, prediction, k_t, jnp.ones_like(k_t))
        probs = posterior(z_t, prediction, k_t, k_s)
        if renoise is not None:
            probs = process.renoised_probs(probs, p_0, k_s, renoise)
        uniform = noise(i)
        z_s = process.draw(uniform, probs)
        if threshold_last:
            z_s = jnp.where(s == 0, (prediction > 0.5).astype(z_s.dtype), z_s)
        z_s = put_known(z_s, k_s, uniform)
        if corrector_steps:

            def correct_all(z_s):
                return jax.lax.fori_loop(
                    0, corrector_steps, lambda j, z: correct(z, s, k_s, w_s, i + 1 + j), z_s
                )

            z_s = jax.lax.cond(s > 0, correct_all, lambda z: z, z_s)
        return z_s, (z_s.astype(bool), p_0) if return_trajectory else None

    uniform = noise(jnp.zeros((), jnp.int32))
    z_T = put_known(process.draw(uniform, start_probs), keep[0], uniform)
    indices = 1 + jnp.arange(len(times) - 1) * (1 + corrector_steps)
    guidance_after = jnp.append(guidance[1:], 0.0)  # not used at t = 0
    steps = (indices, times[:-1], times[1:], keep[:-1], keep[1:], guidance, guidance_after)
    z_0, passed = jax.lax.scan(reverse_step, z_T, steps)
    if passed is None:
        return z_0, None
    states, p_0 = passed
    return z_0, Trajectory(jnp.concatenate([z_T.astype(bool)[None], states]), p_0)
