"""Schedules against closed forms and reference numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.priors import schedules

GOLDEN = np.load("tests/data/schedules.npz")
T = 8


@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("steps", [16, 64, 256])
def test_schedules_and_their_betas_agree_with_the_reference_numbers(name, steps):
    keep = schedules.keep_schedule(name, steps)
    np.testing.assert_allclose(keep, GOLDEN[f"{name}_{steps}_k"], atol=1e-6)
    np.testing.assert_allclose((1 - keep) / 2, GOLDEN[f"{name}_{steps}_b"], atol=1e-6)
    # Index 0 of the reference is 1 by convention.
    np.testing.assert_allclose(
        1 - schedules.betas(keep), GOLDEN[f"{name}_{steps}_keep"][1:], atol=1e-6
    )


@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("steps", [1, 7, 1000, 100_000])
def test_schedules_fall_from_one_to_zero_for_any_number_of_steps(name, steps):
    keep = schedules.keep_schedule(name, steps)
    assert keep.shape == (steps + 1,) and keep[0] == 1
    np.testing.assert_allclose(keep[-1], 0, atol=1e-15)
    assert np.all(np.diff(keep) < 0)


def test_linear_schedule_has_the_closed_form_beta():
    t = np.arange(1, T + 1)
    np.testing.assert_allclose(
        schedules.betas(schedules.keep_schedule("linear", T)), 1 / (T - t + 1), rtol=1e-12
    )


@pytest.mark.parametrize("name", schedules.NAMES)
def test_continuous_time_in_float32_is_the_schedule(name):
    u = np.linspace(0, 1, 1001)
    got = schedules.keep_at(name, jnp.asarray(u, jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, schedules.keep_at(name, u), atol=2e-7)


def test_own_schedule_is_met_at_its_times_and_straight_between_them():
    own = (1.0, 0.7, 0.6, 0.1)
    np.testing.assert_allclose(schedules.keep_schedule(own, 3), own)
    np.testing.assert_allclose(
        schedules.keep_at(own, jnp.array([0.0, 1 / 6, 5 / 6])), [1.0, 0.85, 0.35], atol=1e-6
    )
    np.testing.assert_allclose(schedules.betas(own), [0.3, 1 - 0.6 / 0.7, 1 - 0.1 / 0.6])


@pytest.mark.parametrize("schedule", [*schedules.NAMES, (1.0, 0.7, 0.6, 0.0)])
def test_times_at_is_the_schedules_inverse(schedule):
    u = np.linspace(0, 1, 101)
    times = schedules.times_at(schedule, schedules.keep_at(schedule, u))
    np.testing.assert_allclose(times, u, atol=1e-7)  # the cosine is flat at its ends


@pytest.mark.parametrize(
    "schedule, num_timesteps, message",
    [
        ("liner", T, "one of linear, cos, sigmoid; got 'liner'"),
        ("linear", 0, "at least 1"),
        ((0.9, 0.5, 0.0), 2, "start at k_0 = 1, not 0.9"),
        ((1.0, 0.5, 0.5, 0.0), 3, "k_2 = 0.5 is not below k_1 = 0.5"),
        ((1.0, 0.5, 0.6), 2, "k_2 = 0.6 is not below k_1 = 0.5"),
        ((1.0, 0.5, -0.1), 2, "must not end below 0; its last k is -0.1"),
        ((1.0, float("nan")), 1, "two or more numbers"),
        ((1.0,), 1, "two or more numbers"),
        ((1.0, 0.5, 0.0), 64, "64 timesteps need 65 values, k_0 to k_64; got 3"),
    ],
)
def test_what_no_process_has_is_refused(schedule, num_timesteps, message):
    with pytest.raises(ValueError, match=message):
        schedules.keep_schedule(schedule, num_timesteps)


@pytest.mark.parametrize("steps", [1, 3, 16, 64])
def test_visited_times_fall_from_T_to_0_without_repeats(steps):
    times = schedules.visited_times(steps, 64)
    assert len(times) == steps + 1 and times[0] == 64 and times[-1] == 0
    assert np.all(np.diff(times) < 0) and np.all(times == np.rint(times))
    assert np.ptp(np.diff(times)) <= 1  # evenly spaced, up to rounding


def test_continuous_times_need_not_be_whole():
    times = schedules.visited_times(100, 64, continuous=True)
    np.testing.assert_allclose(times, 64 * (1 - np.arange(101) / 100), atol=1e-5)


@pytest.mark.parametrize("steps", [0, -1, 65])
def test_visited_times_refuse_impossible_numbers_of_steps(steps):
    with pytest.raises(ValueError, match="between 1 and 64"):
        schedules.visited_times(steps, 64)


def test_times_of_ones_own_are_checked():
    np.testing.assert_array_equal(schedules.check_times([64, 33.5, 0], 64), [64, 33.5, 0])
    for wrong in ([0], [64, 32], [65, 0], [64, 32, 32, 0], [0, 64], [[64, 0]]):
        with pytest.raises(ValueError, match="falls strictly from at most 64 to 0"):
            schedules.check_times(wrong, 64)
