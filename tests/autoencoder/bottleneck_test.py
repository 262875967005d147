"""The bottlenecks: bits (1), a codebook, real channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from binlatent.autoencoder import bottleneck

PROBS = jnp.array([0.0, 0.1, 0.5, 0.6, 1.0])


def test_sample_thresholds_the_noise_and_is_exactly_binary():
    uniform = jnp.array([0.0, 0.05, 0.7, 0.59, 0.999])
    code = bottleneck.binarize(PROBS, "sample", uniform)
    np.testing.assert_array_equal(code, [0, 1, 0, 1, 1])


def test_sample_is_exactly_binary_for_any_probability():
    probs = jax.random.uniform(jax.random.key(0), (10_000,))
    code = bottleneck.binarize(probs, "sample", jax.random.uniform(jax.random.key(1), (10_000,)))
    assert set(np.unique(code).tolist()) == {0.0, 1.0}


def test_sample_has_the_given_frequency():
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


# The modules

FEATURES = jax.random.normal(jax.random.key(0), (2, 3, 3, 8))
UNIFORM = jax.random.uniform(jax.random.key(1), (2, 3, 3, 5))


def made(module):
    """A bottleneck's variables; initialisation calls both of its methods."""

    def both(module, features):
        return module.features(module.encode(features, None)[0])

    return nn.init(both, module)(jax.random.key(2), FEATURES)


def dense(x, params):
    """A Dense layer in float64."""
    return np.float64(x) @ np.float64(params["kernel"]) + np.reshape(params["bias"], (1, 1, 1, -1))


def test_bits_are_drawn_from_the_sigmoid_and_embedded_by_a_matrix():
    module = bottleneck.Binary(5, 8)
    variables = made(module)
    code, aux = module.apply(variables, FEATURES, UNIFORM, method="encode")
    proj, embed = variables["params"]["proj"], variables["params"]["embed"]
    logits = np.asarray(FEATURES, np.float64) @ proj["kernel"] + np.reshape(
        proj["bias"], (1, 1, 1, 5)
    )
    np.testing.assert_allclose(aux["probs"], 1 / (1 + np.exp(-logits)), atol=1e-5)
    np.testing.assert_array_equal(code, aux["probs"] > UNIFORM)
    features = module.apply(variables, code, method="features")
    np.testing.assert_allclose(features, np.asarray(code, np.float64) @ embed, atol=1e-5)
    rounded, _ = module.apply(variables, FEATURES, None, method="encode")
    np.testing.assert_array_equal(rounded, aux["probs"] > 0.5)


def test_signed_bits_are_the_tanh_form():
    # With x the logits: y' = tanh(x), z' = 2 B((y' + 1) / 2) - 1, and z' + y' - stop(y') embedded.
    module = bottleneck.Binary(5, 8, signed=True)
    variables = made(module)
    weights = jax.random.normal(jax.random.key(3), (2, 3, 3, 8))

    def ours(features):
        code, _ = module.apply(variables, features, UNIFORM, method="encode")
        return jnp.sum(weights * module.apply(variables, code, method="features")), code

    def written_out(features):
        proj, embed = variables["params"]["proj"], variables["params"]["embed"]
        x = jnp.tanh(features @ proj["kernel"] + proj["bias"].reshape(1, 1, 1, 5))
        z = 2.0 * ((x + 1) / 2 > UNIFORM) - 1
        z = jax.lax.stop_gradient(z - x) + x
        return jnp.sum(weights * (z @ embed)), z

    (value, code), gradient = jax.value_and_grad(ours, has_aux=True)(FEATURES)
    (expected, z), expected_gradient = jax.value_and_grad(written_out, has_aux=True)(FEATURES)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(2 * code - 1, z, atol=1e-6)
    assert set(np.unique(code)) == {0.0, 1.0}  # the code keeps its bits


def test_entropy_penalty_is_least_for_certain_and_balanced_bits():
    def penalty(probs):
        probs = jnp.asarray(probs, jnp.float32).reshape(-1, 1, 1, 1)
        return bottleneck.entropy_penalty(probs, jnp.mean(probs, axis=(0, 1, 2)))

    np.testing.assert_allclose(penalty([0, 1]), -1, atol=1e-4)
    np.testing.assert_allclose(penalty([1, 1]), 0, atol=1e-4)  # certain, but constant
    np.testing.assert_allclose(penalty([0.5, 0.5]), 0, atol=1e-6)  # balanced, but never certain
    p = np.array([0.1, 0.6, 0.8])

    def h(x):
        return -x * np.log2(x) - (1 - x) * np.log2(1 - x)

    np.testing.assert_allclose(penalty(p), np.mean(h(p)) - h(np.mean(p)), rtol=1e-5)


@pytest.mark.parametrize("probs", [[0.0, 1.0], [1.0, 1.0], [0.5, 0.0]])
def test_entropy_penalty_has_a_finite_gradient_at_certain_bits(probs):
    probs = jnp.asarray(probs).reshape(-1, 1, 1, 1)
    gradient = jax.grad(lambda p: bottleneck.entropy_penalty(p, jnp.mean(p, axis=(0, 1, 2))))(probs)
    assert np.all(np.isfinite(gradient))


def test_vq_takes_the_nearest_vector():
    module = bottleneck.VectorQuantized(7, 4, 8)
    variables = made(module)
    code, aux = module.apply(variables, FEATURES, None, method="encode")
    proj, codebook = variables["params"]["proj"], np.float64(variables["params"]["codebook"])
    soft = np.asarray(FEATURES, np.float64) @ proj["kernel"] + np.reshape(
        proj["bias"], (1, 1, 1, 4)
    )
    distances = np.sum((soft[..., None, :] - codebook.reshape(1, 1, 1, 7, 4)) ** 2, axis=-1)
    np.testing.assert_array_equal(aux["indices"], np.argmin(distances, axis=-1))
    np.testing.assert_allclose(code, codebook[aux["indices"]], atol=1e-6)
    expected = np.mean(np.min(distances, axis=-1)) / 4
    np.testing.assert_allclose([aux["codebook"], aux["commitment"]], expected, rtol=1e-4)
    assert len(np.unique(aux["indices"])) > 1


def test_vq_gradients():
    module = bottleneck.VectorQuantized(7, 4, 8)
    variables = made(module)

    def of(name):
        def function(variables, features):
            code, aux = module.apply(variables, features, None, method="encode")
            return jnp.sum(code) if name == "code" else aux[name]

        gradients = jax.grad(function, argnums=(0, 1))(variables, FEATURES)
        params, features = gradients[0]["params"], gradients[1]
        return np.abs(params["codebook"]).max() > 0, np.abs(features).max() > 0, features

    assert of("codebook")[:2] == (True, False)
    assert of("commitment")[:2] == (False, True)
    codebook, _, straight = of("code")
    assert not codebook
    kernel = variables["params"]["proj"]["kernel"]
    expected = np.broadcast_to(np.sum(kernel, axis=1), straight.shape)
    np.testing.assert_allclose(straight, expected, rtol=1e-5)


def test_real_channels_follow_their_gaussian():
    module = bottleneck.Real(3, 8)
    variables = made(module)
    mean, aux = module.apply(variables, FEATURES, None, method="encode")
    proj = variables["params"]["proj"]
    both = np.asarray(FEATURES, np.float64) @ proj["kernel"] + np.reshape(
        proj["bias"], (1, 1, 1, 6)
    )
    np.testing.assert_allclose(mean, both[..., :3], atol=1e-5)
    std = np.exp(both[..., 3:] / 2)
    kl = np.mean((both[..., :3] ** 2 + std**2 - 1) / 2 - np.log(std))
    np.testing.assert_allclose(aux["kl"], kl, rtol=1e-4)
    # A uniform number at a quantile's probability gives that quantile.
    for uniform, quantile in ((0.5, 0.0), (0.8413447, 1.0), (0.0227501, -2.0)):
        drawn, _ = module.apply(
            variables, FEATURES, jnp.full((2, 3, 3, 3), uniform), method="encode"
        )
        np.testing.assert_allclose(drawn, both[..., :3] + quantile * std, atol=1e-3)


def test_real_channels_that_are_not_variational_draw_nothing():
    module = bottleneck.Real(5, 8, variational=False)
    variables = made(module)
    code, aux = module.apply(variables, FEATURES, UNIFORM, method="encode")
    again, _ = module.apply(variables, FEATURES, None, method="encode")
    np.testing.assert_array_equal(code, again)
    assert aux == {} and code.shape == (2, 3, 3, 5)
