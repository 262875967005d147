"""The Bernoulli bottleneck of (1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.models import bottleneck

PROBS = jnp.array([0.0, 0.1, 0.5, 0.6, 1.0])


def test_sample_thresholds_the_noise_and_is_exactly_binary():
    uniform = jnp.array([0.0, 0.05, 0.7, 0.59, 0.999])
    code = bottleneck.binarize(PROBS, "sample", uniform)
    np.testing.assert_array_equal(code, [0, 1, 0, 1, 1])


def test_sample_is_exactly_binary_for_any_probability():
    probs = jax.random.uniform(jax.random.key(0), (10_000,))
    code = bottleneck.binarize(probs, "sample", jax.random.uniform(jax.random.key(1), (10_000,)))
    assert set(np.unique(code).tolist()) == {0.0, 1.0}


def test_sample_has_the_asked_frequency():
    probs = jnp.full((100_000,), 0.3)
    uniform = jax.random.uniform(jax.random.key(0), probs.shape)
    np.testing.assert_allclose(
        bottleneck.binarize(probs, "sample", uniform).mean(), 0.3, atol=0.005
    )


def test_deterministic_rounds_and_soft_passes():
    np.testing.assert_array_equal(bottleneck.binarize(PROBS, "deterministic"), [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(bottleneck.binarize(PROBS, "soft"), PROBS)


@pytest.mark.parametrize("mode", ["sample", "deterministic", "soft"])
def test_gradient_passes_straight_through(mode):
    weights = jnp.array([1.0, -2.0, 3.0, 0.5, 7.0])
    uniform = jnp.full((5,), 0.5)
    gradient = jax.grad(lambda p: jnp.sum(weights * bottleneck.binarize(p, mode, uniform)))(PROBS)
    np.testing.assert_array_equal(gradient, weights)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'sample', 'deterministic' or 'soft', got 'hard'"):
        bottleneck.binarize(PROBS, "hard")
