"""The reverse process: from random bits to a code, one compiled loop (paper, Algorithm 2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from binlatent.diffusion import bernoulli

Array = jax.Array

# (z_t, t as a scalar of 1..T) -> flip logits, float32, the shape of z_t.
Denoise = Callable[[Array, Array], Array]


def with_guidance(conditional: Denoise, unconditional: Denoise, guidance: Array) -> Denoise:
    """Returns the guided denoiser (1 + w) T(z_t, t, c) - w T(z_t, t) (supplement C).

    The unconditional half is computed only where w is not 0, in the same compiled program, so
    that changing the guidance never compiles anew.
    """

    def guided(z_t: Array, t: Array) -> Array:
        def combine():
            w = guidance
            return (1 + w) * conditional(z_t, t) - w * unconditional(z_t, t)

        return jax.lax.cond(guidance == 0, lambda: conditional(z_t, t), combine)

    return guided


def reverse_process(
    key: Array,
    denoise: Denoise,
    shape: tuple[int, ...],
    *,
    times: Array,
    keep: Array,
    temperature: Array,
    known: Array,
    known_mask: Array,
    threshold_last: bool = False,
) -> tuple[Array, Array]:
    """Draws codes by ancestral sampling with the mixture posterior (paper, (8); Algorithm 2).

    Args:
      key: a typed PRNG key.
      denoise: `denoise(z_t, t)` -> flip logits, float32, of `shape`; t is a scalar of 1..T.
      shape: of the codes, (n, h, w, c).
      times: int32, (S + 1,), decreasing from T to 0; see `schedules.visited_times`.
      keep: float32, (T + 1,), k_0..k_T; see `schedules.keep_schedule`.
      temperature: tau > 0, a scalar that divides the flip logits (paper, 4.1).
      known: a code of `shape`; only its bits under `known_mask` are used.
      known_mask: 1 where the bit of z_0 is known (inpainting), 0 where it is to be drawn.
      threshold_last: whether the step to t = 0 takes the likelier value of each bit, as the
        authors' code does, instead of drawing it, which is exact.

    Returns:
      (z_0, trajectory): the codes, float32 in {0, 1}, and z_t at each of `times`, bool,
      (S + 1, n, h, w, c).
    """

    def keep_known(z_t):
        # As in the authors' code: never noised, so that a known bit is evidence from t = T on.
        return jnp.where(known_mask > 0, known, z_t)

    init_key, *step_keys = jax.random.split(key, len(times))

    def reverse_step(z_t, step):
        t, s, step_key = step
        flip_logit = denoise(z_t, t) / temperature
        p_0 = bernoulli.z_0_probs(flip_logit, z_t)
        probs = bernoulli.mixture_posterior_probs(z_t, p_0, keep[t], keep[s])
        uniform = jax.random.uniform(step_key, shape)
        if threshold_last:
            uniform = jnp.where(s == 0, 0.5, uniform)
        z_s = keep_known(bernoulli.draw(uniform, probs))
        return z_s, z_s.astype(bool)

    z_T = keep_known(bernoulli.draw(jax.random.uniform(init_key, shape), jnp.full(shape, 0.5)))
    steps = (times[:-1], times[1:], jnp.stack(step_keys))
    z_0, states = jax.lax.scan(reverse_step, z_T, steps)
    return z_0, jnp.concatenate([z_T.astype(bool)[None], states])
