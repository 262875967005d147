"""Noise schedules: k_t, the share of a bit of z_0 that survives in z_t (paper, Section 4, (5))."""

import numpy as np


def keep_schedule(name: str, num_timesteps: int) -> np.ndarray:
    """Returns k_0, ..., k_T of a named schedule; b_t is (1 - k_t) / 2 throughout.

    Args:
      name: "linear", k_t = 1 - t/T, or "cos", k_t = (1 + cos(pi t/T)) / 2.
      num_timesteps: T >= 1.

    Returns:
      float64, (T + 1,), strictly decreasing from 1 to 0.

    Raises:
      ValueError: for another name, or T < 1.

    References:
      Wang et al., Binary Latent Diffusion, CVPR 2023, (5) and supplement A.
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    u = np.arange(num_timesteps + 1) / num_timesteps
    if name == "linear":
        return 1 - u
    if name == "cos":
        return (1 + np.cos(np.pi * u)) / 2
    raise ValueError(f"schedule must be 'linear' or 'cos', got {name!r}")


def visited_times(num_steps: int, num_timesteps: int) -> np.ndarray:
    """Returns the times that a sampler of `num_steps` steps visits, evenly spaced from T to 0.

    Args:
      num_steps: reverse steps, 1 <= num_steps <= T.
      num_timesteps: T of the training schedule.

    Returns:
      int32, (num_steps + 1,), strictly decreasing, first T and last 0.

    Raises:
      ValueError: if num_steps is outside 1..T.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"the number of sampling steps must be between 1 and {num_timesteps}, "
            f"the number of timesteps that the prior was trained with; got {num_steps}"
        )
    return np.rint(np.linspace(num_timesteps, 0, num_steps + 1)).astype(np.int32)
