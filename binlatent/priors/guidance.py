"""Classifier-free guidance, and the noise of samplers (supplement C)."""

from collections.abc import Callable

import jax
import numpy as np

from binlatent.runtime.errors import UserError

Array = jax.Array

# i -> uniforms in [0, 1) of the codes' shape, for the i-th draw.
Noise = Callable[[Array], Array]


def noise_from_keys(keys: Array, shape: tuple[int, ...]) -> Noise:
    """Returns the noise of n samples; it depends on a sample's key, not on its batch.

    Args:
      keys: (n,) typed PRNG keys.
      shape: of one sample.
    """

    def uniforms(i: Array) -> Array:
        return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, i), shape))(keys)

    return uniforms


def check_guidance(guidance: float, interval: tuple[float, float]) -> None:
    """Refuses a guidance below 0, or an interval outside [0, 1]."""
    if not 0 <= guidance < np.inf:
        raise UserError(f"The guidance must not be negative or infinite; got {guidance}.")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(
            f"the guidance's interval must be 0 <= low <= high <= 1; got {tuple(interval)}."
        )


def guidance_weights(
    guidance: float | np.ndarray,
    times: np.ndarray,
    interval: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """Returns w at each step of a sampler: (S,), float32.

    Args:
      guidance: w >= 0 (supplement C), for all steps or (S,).
      times: t/T at each step's start and at the end, (S + 1,), from at most 1 to 0.
      interval: (low, high) in t/T, both included. Outside, w is 0, and a step costs one network
        call instead of two.

    References:
      Kynkaanniemi et al., Applying Guidance in a Limited Interval, 2024.
    """
    u = np.asarray(times[:-1])
    low, high = interval
    return (guidance * ((low <= u) & (u <= high))).astype(np.float32)


def guide(conditional: Callable, unconditional: Callable) -> Callable:
    """Returns the guided network (1 + w) T(z_t, t, c) - w T(z_t, t) (supplement C).

    The unconditional half is computed only if w is not 0. This is decided within the compiled
    program, so changing the guidance does not compile again.

    Args:
      conditional, unconditional: (z_t, t) -> logits. To guide away from a label c', the
        second is T(z_t, t, c').

    Returns:
      (z_t, t, w) -> logits.
    """

    def guided(z_t: Array, t: Array, w: Array) -> Array:
        def combine():
            return (1 + w) * conditional(z_t, t) - w * unconditional(z_t, t)

        return jax.lax.cond(w == 0, lambda: conditional(z_t, t), combine)

    return guided
