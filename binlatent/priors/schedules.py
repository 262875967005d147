"""Noise schedules: k_t, the share of z_0 that survives in z_t (paper, Section 4, (5)).

An absorbing diffusion keeps a bit with probability k_t and hides it otherwise.

Time is continuous: u = t / T runs from 0 to 1, k(0) = 1, and k falls with u. A process of T steps
uses k on the grid u = t / T. In a Bernoulli diffusion b_t is (1 - k_t) / 2.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from binlatent.runtime.errors import UserError

Array = jax.Array

# A name, or k_0, ..., k_T at equally spaced times, interpolated linearly.
Schedule = str | tuple[float, ...]

NAMES = ("linear", "cos", "sigmoid")
_SIGMOID_END = 3.75  # 3 / 0.8: from 0 to 3 at a temperature of 0.8, as in the authors' code


def check_schedule(schedule: Schedule) -> None:
    """Refuses an invalid schedule."""
    if isinstance(schedule, str):
        if schedule not in NAMES:
            raise UserError(f"schedule must be one of {', '.join(NAMES)}; got {schedule!r}.")
        return
    keep = np.asarray(schedule, np.float64)
    if keep.ndim != 1 or len(keep) < 2 or not np.all(np.isfinite(keep)):
        raise UserError("a given schedule must be two or more numbers, k_0 to k_T.")
    if keep[0] != 1:
        raise UserError(f"a schedule must start at k_0 = 1, not {keep[0]:g}.")
    if keep[-1] < 0:
        raise UserError(f"a schedule must not end below 0; its last k is {keep[-1]:g}.")
    rises = np.flatnonzero(np.diff(keep) >= 0)
    if len(rises):
        t = rises[0] + 1
        raise UserError(
            f"a schedule must fall strictly, but k_{t} = {keep[t]:g} is not below "
            f"k_{t - 1} = {keep[t - 1]:g}."
        )


def named_or_given(section: str, schedule: str, keep: Sequence[float]) -> Schedule:
    """Returns the schedule in a kind's section of the config: a name, or `keep` for "given".

    Args:
      section: name of the section, for messages.
      schedule: of `NAMES`, or "given".
      keep: k_0, ..., k_T of the schedule "given", else empty.
    """
    if (schedule == "given") != bool(keep):
        raise UserError(
            f"config.{section}.keep, k_0 to k_T, must be set if config.{section}.schedule is "
            '"given", and only then.'
        )
    return tuple(keep) or schedule


def keep_at(schedule: Schedule, u: Array | np.ndarray) -> Array | np.ndarray:
    """Returns k(u).

    Args:
      schedule: "linear", k = 1 - u; "cos", k = (1 + cos(pi u)) / 2; "sigmoid", a logistic curve
        from 0 to -3.75 scaled to fall from 1 to 0; or k_0, ..., k_T.
      u: t / T in [0, 1], any shape: a JAX array for float32, a NumPy array for float64.

    References:
      Wang et al., Binary Latent Diffusion, CVPR 2023, (5) and supplement A.
    """
    xp = jnp if isinstance(u, jax.Array) else np
    if schedule == "linear":
        return 1 - u
    if schedule == "cos":
        return xp.cos(np.pi / 2 * u) ** 2  # equal to the above, without cancellation near u = 1
    if schedule == "sigmoid":
        start, end = 0.5, 1 / (1 + np.exp(_SIGMOID_END))
        return xp.clip((1 / (1 + xp.exp(_SIGMOID_END * u)) - end) / (start - end), 0, 1)
    keep = np.asarray(schedule)
    return xp.interp(u, np.linspace(0, 1, len(keep)), keep).astype(u.dtype)


def keep_schedule(schedule: Schedule, num_timesteps: int) -> np.ndarray:
    """Returns k_0, ..., k_T.

    Args:
      schedule: a name, or k_0, ..., k_T themselves.
      num_timesteps: T >= 1.

    Returns:
      float64, (T + 1,), falling from 1.
    """
    if num_timesteps < 1:
        raise UserError(f"num_timesteps must be at least 1, got {num_timesteps}.")
    check_schedule(schedule)
    if not isinstance(schedule, str) and len(schedule) != num_timesteps + 1:
        raise UserError(
            f"{num_timesteps} timesteps need {num_timesteps + 1} values, k_0 to "
            f"k_{num_timesteps}; got {len(schedule)}."
        )
    return keep_at(schedule, np.arange(num_timesteps + 1) / num_timesteps)


def times_at(schedule: Schedule, keep: np.ndarray) -> np.ndarray:
    """Returns the times t / T at which a schedule has the given values of k, by bisection.

    Args:
      schedule: that ends at k_T = 0.
      keep: in [0, 1], any shape.

    Returns:
      float64 in [0, 1], the same shape.
    """
    low, high = np.zeros(np.shape(keep)), np.ones(np.shape(keep))
    for _ in range(60):
        middle = (low + high) / 2
        above = keep_at(schedule, middle) > keep
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return high


def betas(keep: Sequence[float]) -> np.ndarray:
    """Returns beta_t = 1 - k_t / k_{t-1}, t from 1 to T, of k_0, ..., k_T (paper, Section 4)."""
    check_schedule(tuple(keep))
    keep = np.asarray(keep)
    return 1 - keep[1:] / keep[:-1]


def visited_times(num_steps: int, num_timesteps: int, *, continuous: bool = False) -> np.ndarray:
    """Returns the times that a sampler of `num_steps` steps visits, evenly spaced from T to 0.

    Args:
      num_steps: reverse steps, at least 1.
      num_timesteps: T of the training schedule.
      continuous: whether the network was trained on all times in (0, T] instead of 1, ..., T.

    Returns:
      float32, (num_steps + 1,), strictly decreasing, first T and last 0; whole numbers unless
      continuous.
    """
    if num_steps < 1 or (num_steps > num_timesteps and not continuous):
        most = "at least 1" if continuous else f"between 1 and {num_timesteps}"
        reason = "" if continuous else ", the number of timesteps in the prior's training"
        raise UserError(f"the number of sampling steps must be {most}{reason}; got {num_steps}.")
    times = np.linspace(num_timesteps, 0, num_steps + 1)
    return (times if continuous else np.rint(times)).astype(np.float32)


def check_times(times: Sequence[float], num_timesteps: int) -> np.ndarray:
    """Returns given times for a sampler, checked, float32.

    Args:
      times: two or more numbers in [0, T], strictly decreasing to 0; integers or not.
      num_timesteps: T of the training schedule.
    """
    try:
        times = np.asarray(times, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"times must be a list of numbers; got {times!r}.") from error
    good = times.ndim == 1 and len(times) > 1 and times[0] <= num_timesteps and times[-1] == 0
    if not good or not np.all(np.diff(times) < 0):
        raise UserError(
            f"times must be a list that falls strictly from at most {num_timesteps} to 0; "
            f"got {np.array2string(times, threshold=8)}."
        )
    return times
