"""Guidance by its formula, where it applies, and refused values."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.priors.guidance import check_guidance, guidance_weights, guide
from binlatent.runtime.errors import UserError


def test_guidance_extrapolates_from_the_unconditional_logits():
    def conditional(z_t, t):
        return jnp.full_like(z_t, 2.0)

    def unconditional(z_t, t):
        return jnp.full_like(z_t, 0.5)

    guided = guide(conditional, unconditional)
    for w in (0.0, 1.0, 2.5):
        got = guided(jnp.zeros((1, 1, 1, 2)), 1, jnp.float32(w))
        np.testing.assert_allclose(got, (1 + w) * 2.0 - w * 0.5, rtol=1e-6)


def test_guidance_is_constant_within_its_interval_ends_included():
    weights = functools.partial(guidance_weights, 3.0, np.array([64, 48, 32, 16, 0]) / 64)
    np.testing.assert_array_equal(weights(), [3, 3, 3, 3])
    np.testing.assert_array_equal(weights((0.25, 0.5)), [0, 0, 3, 3])
    np.testing.assert_array_equal(weights((0, 0.6)), [0, 0, 3, 3])
    np.testing.assert_array_equal(weights((0.6, 1)), [3, 3, 0, 0])
    assert weights().dtype == np.float32


@pytest.mark.parametrize(
    "guidance, interval, message",
    [
        (-0.1, (0, 1), "must not be negative or infinite; got -0.1"),
        (np.inf, (0, 1), "must not be negative or infinite; got inf"),
        (np.nan, (0, 1), "must not be negative or infinite; got nan"),
        (1.0, (0.5, 0.2), "0 <= low <= high <= 1"),
        (1.0, (0.5, 1.2), "0 <= low <= high <= 1"),
        (1.0, (-0.1, 1), "0 <= low <= high <= 1"),
        (1.0, (0, 0.5, 1), "0 <= low <= high <= 1"),
    ],
)
def test_wrong_guidance_is_refused(guidance, interval, message):
    with pytest.raises(UserError, match=message):
        check_guidance(guidance, interval)


def test_the_least_and_the_widest_guidance_are_accepted():
    check_guidance(0.0, (0.0, 1.0))
    check_guidance(7.5, (0.3, 0.3))
