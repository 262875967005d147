"""The absorbing process: units of bits, and how many of them are hidden at a time.

A unit is g bits of one token that are hidden and revealed together. A code has U units, in an array
(h, w, c / g). At time t / T = u, in (0, 1], a random share 1 - k_u of the units is hidden, rounded
up to m = 1, ..., U units. Fixing m, instead of an independent draw for each unit, does not change
the bound and reduces the variance of its estimates.

Dimensions: n batch, h w latent grid, c bits, g bits of a unit, U units of a code.
"""

import jax
import jax.numpy as jnp
import numpy as np

from binlatent.priors import schedules
from binlatent.runtime.errors import UserError

Array = jax.Array


def bits_of_unit(unit: str | int, c: int) -> int:
    """Returns g: c for "token", 1 for "bit", or a given number that divides c."""
    named = {"token": c, "bit": 1}
    if unit in named:
        return named[unit]
    if not str(unit).isdecimal() or int(unit) < 1 or c % int(unit):
        raise UserError(
            'config.prior.absorbing.unit must be "token", "bit", or a number of bits that divides '
            f"the {c} bits of a token; got {unit!r}."
        )
    return int(unit)


def by_bits(units: Array, g: int) -> Array:
    """Repeats values of units, (..., c / g), for each of their bits, (..., c)."""
    return jnp.repeat(units, g, axis=-1)


def by_units(bits: Array, g: int) -> Array:
    """Groups bits, (..., c), by units, (..., c / g, g)."""
    return bits.reshape(*bits.shape[:-1], -1, g)


def lowest(score: Array, count: Array) -> Array:
    """Returns a mask of the `count` lowest entries of each image; ties are broken by position.

    Args:
      score: (n, ...).
      count: int, (n,) or a scalar.
    """
    flat = score.reshape(len(score), -1)
    rank = jnp.argsort(jnp.argsort(flat, axis=-1), axis=-1)
    return (rank < jnp.reshape(count, (-1, 1))).reshape(score.shape)


def times_of_counts(schedule: schedules.Schedule, num_units: int) -> np.ndarray:
    """Returns the time t / T up to which at most m units are hidden, m = 0, ..., U.

    Args:
      schedule: that ends at k_T = 0.
      num_units: U.

    Returns:
      float64 (U + 1,), from 0 to 1. At a uniform time, P(m) = u_m - u_{m-1}.
    """
    share = np.arange(num_units + 1) / num_units
    return schedules.times_at(schedule, 1 - share)


def bound_weights(times: np.ndarray) -> np.ndarray:
    """Returns the bound's weight of the cross-entropy of m hidden units, m = 0, ..., U.

    In continuous time the bound on -log p(z_0) is (Austin et al., D3PM, 2021, A.3; Shi et al., MD4,
    2024)

        int_0^1 -k'_u / (1 - k_u) E[sum of the cross-entropy over hidden bits] du,

    that is, CE / t for the linear schedule. For any schedule, sets of m units have the total weight
    int_0^1 (1 / s) C(U, m) s^m (1 - s)^(U - m) ds = 1 / m. So the weight is 1 / (m P(m)), or U / m
    for the linear schedule. Unlike the weight of a time near 0, it is finite.

    Args:
      times: from `times_of_counts`.

    Returns:
      float64 (U + 1,); 0 for m = 0, which is never drawn.
    """
    m = np.arange(1, len(times))
    return np.append(0.0, 1 / (m * np.diff(times)))


def hidden_counts(schedule: schedules.Schedule, num_units: int, steps: int) -> np.ndarray:
    """Returns the number of hidden units before each of S calls, and after the last.

    It is U (1 - k_u) at evenly spaced times from 1 to 0, rounded so that every call reveals at
    least one unit.

    Args:
      schedule: that ends at k_T = 0.
      num_units: U.
      steps: S, from 1 to U.

    Returns:
      int32 (S + 1,), strictly falling from U to 0.
    """
    keep = schedules.keep_at(schedule, np.linspace(1, 0, steps + 1))
    counts = np.rint(num_units * (1 - keep)).astype(np.int32)
    counts[0] = num_units
    for j in range(1, steps + 1):
        counts[j] = max(min(counts[j], counts[j - 1] - 1), steps - j)
    return counts
