"""The autoencoder's step: its terms, both networks' gradients, their devices and their parts."""

import functools

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from binlatent import build
from binlatent.autoencoder import adversarial, bottleneck
from binlatent.autoencoder import step as stage
from binlatent.autoencoder.modules import last_kernel
from binlatent.convert import published
from binlatent.runtime import devices
from binlatent.training import state as state_lib

N = 8
ALL = {
    "autoencoder.loss.l1": 0.5,
    "autoencoder.loss.adversarial": 0.7,
    "autoencoder.loss.r1": 0.1,
    "autoencoder.loss.entropy": 0.3,
    "autoencoder.discriminator.width": 8,
    "autoencoder.discriminator.num_layers": 1,
    "autoencoder.discriminator.augment": ("colour", "translation"),
}


@pytest.fixture
def config(tiny_config):
    tiny_config.update_from_flattened_dict(ALL)
    return tiny_config


class Parts:
    """A state, a batch, its noise, and the step that takes them on any number of devices."""

    def __init__(self, config, lpips_params=None):
        self.optimizer = optax.sgd(0.1)  # Adam makes full steps of what is zero up to rounding
        self.networks = build.networks(config)
        self.objective = build.autoencoder_objective(config)
        discriminator = None
        if self.networks.discriminator:
            discriminator = stage.create_discriminator_state(
                self.networks.discriminator,
                jax.random.key(4),
                build.image_shape(config),
                self.optimizer,
            )
        params = build.init_autoencoder(config, jax.random.key(0))
        self.state = state_lib.create_state(
            jax.random.key(1), params, self.optimizer, discriminator
        )
        shape = (N, *build.image_shape(config))
        self.image = jax.random.uniform(jax.random.key(2), shape, minval=-1)
        self.noise = stage.draw_noise(
            jax.random.key(3), shape, (N, *build.code_shape(config)), self.objective.augment
        )
        self.lpips_params = lpips_params or {}

    def run(self, num_devices, accumulate=1, networks=None):
        step = jax.pmap(
            functools.partial(
                stage.update,
                networks=networks or self.networks,
                objective=self.objective,
                optimizer=self.optimizer,
                ema_decay=0.9,
                accumulate=accumulate,
            ),
            axis_name=devices.AXIS,
            in_axes=(None, 0, 0, None),
            out_axes=(None, None),
            devices=jax.devices()[:num_devices],
        )
        batch, noise = jax.tree.map(
            lambda x: np.asarray(x).reshape(num_devices, -1, *x.shape[1:]),
            ({"image": self.image}, self.noise),
        )
        return jax.device_get(step(self.state, batch, noise, self.lpips_params))

    def on_one_device(self, function):
        """Applies a function of nothing under the axis that the losses expect."""
        result = jax.pmap(lambda _: function(), axis_name=devices.AXIS, devices=jax.devices()[:1])(
            np.zeros(1)
        )
        return jax.tree.map(lambda x: x[0], result)


def assert_close(a, b, atol=2e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=atol), a, b)


@pytest.mark.slow
def test_one_and_four_devices_make_the_same_update_of_both_networks(config):
    # Batch statistics, the bits' frequencies and the adaptive weight are of all devices.
    config.autoencoder.loss.adaptive = True
    config.autoencoder.loss.adversarial = 50.0  # so that the adaptive weight is not clipped
    parts = Parts(config)
    one, one_metrics = parts.run(1)
    four, four_metrics = parts.run(4)
    assert_close((one.params, one.discriminator), (four.params, four.discriminator))
    assert_close(one_metrics, four_metrics)
    assert 0 < one_metrics["adversarial_weight"] < 50
    for before, after in (
        (parts.state.params, one.params),
        (parts.state.discriminator["params"], one.discriminator["params"]),
        (parts.state.discriminator["batch_stats"], one.discriminator["batch_stats"]),
    ):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(before), after)
        assert max(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("adaptive", [False, True])
def test_gradients_are_those_of_the_losses_as_written(config, adaptive):
    config.autoencoder.loss.adaptive = adaptive
    config.autoencoder.loss.adversarial = 50.0  # so that the adaptive weight is not clipped
    parts = Parts(config)
    model, critic, _ = parts.networks
    image, noise, objective = parts.image, parts.noise, parts.objective
    discriminator = parts.state.discriminator
    stats = discriminator["batch_stats"]

    def logits(params, images):
        variables = {"params": params, "batch_stats": stats}
        return critic.apply(variables, images, mutable="batch_stats")[0]

    def terms(params):
        reconstruction, aux = model.apply(params, image, noise.uniform)
        error = reconstruction - image
        compared = jnp.mean(error**2) + 0.5 * jnp.mean(jnp.abs(error))
        probs = aux["probs"]
        p = jnp.mean(probs, axis=(0, 1, 2))
        entropy = jnp.mean(bottleneck.bit_entropy(probs)) - jnp.mean(bottleneck.bit_entropy(p))
        fake = adversarial.augment(reconstruction, noise.fake, objective.augment)
        return compared, 0.3 * entropy, -jnp.mean(logits(discriminator["params"], fake))

    def by_hand():
        params = parts.state.params
        of_terms = jax.jacrev(lambda params: jnp.stack(terms(params)))(params)
        weight = jnp.asarray(50.0)
        if adaptive:
            compared, generator = (last_kernel(of_terms)[i] for i in (0, 2))
            weight = jnp.linalg.norm(compared.ravel()) / (jnp.linalg.norm(generator.ravel()) + 1e-4)
        weights = jnp.stack([jnp.ones(()), jnp.ones(()), weight])
        total = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), of_terms)
        reconstruction = model.apply(params, image, noise.uniform)[0]

        def critic_loss(params):
            real = adversarial.augment(image, noise.real, objective.augment)
            fake = adversarial.augment(reconstruction, noise.fake, objective.augment)
            hinge = jnp.mean(jax.nn.relu(1 - logits(params, real))) / 2
            hinge += jnp.mean(jax.nn.relu(1 + logits(params, fake))) / 2
            return hinge + 0.1 * adversarial.r1_penalty(lambda x: logits(params, x), real)

        return total, jax.grad(critic_loss)(discriminator["params"]), weight

    def by_stage():
        _, (of_params, of_critic, metrics) = stage.gradients(
            parts.state, stats, image, noise, {}, networks=parts.networks, objective=objective
        )
        return of_params, of_critic, metrics.get("adversarial_weight", jnp.asarray(50.0))

    expected, found = parts.on_one_device(by_hand), parts.on_one_device(by_stage)
    assert 0 < expected[2] <= 50
    assert_close(found, expected)


@pytest.mark.slow
def test_perceptual_loss_is_a_term_of_the_gradient(config):
    config.autoencoder.loss.adversarial = 0.0
    config.autoencoder.loss.perceptual = 2.0
    names = published.vgg16(drawn.vgg16_state())
    variables = {"params": traverse_util.unflatten_dict(names, sep="/")}
    parts = Parts(config, variables)
    model, _, lpips = parts.networks

    def total(params):
        reconstruction, aux = model.apply(params, parts.image, parts.noise.uniform)
        error = reconstruction - parts.image
        return (
            jnp.mean(error**2)
            + 0.5 * jnp.mean(jnp.abs(error))
            + 2 * jnp.mean(lpips.apply(variables, reconstruction, parts.image))
            + 0.3 * bottleneck.entropy_penalty(aux["probs"], jnp.mean(aux["probs"], (0, 1, 2)))
        )

    gradient = jax.jit(jax.grad(total))(parts.state.params)
    state, metrics = parts.run(1)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, parts.state.params, gradient)
    assert_close(state.params, moved)
    assert metrics["perceptual"] > 0 and "generator_loss" not in metrics


@pytest.mark.slow
def test_parts_of_a_batch_one_after_the_other_make_the_same_update(config):
    # With group norm and without what looks at a whole batch, up to rounding.
    config.autoencoder.discriminator.norm = "group"
    config.autoencoder.loss.entropy = 0.0
    parts = Parts(config)
    whole, whole_metrics = parts.run(2)
    for accumulate in (2, 4):
        state, metrics = parts.run(2, accumulate)
        assert_close((state.params, state.discriminator), (whole.params, whole.discriminator))
        assert_close(metrics, whole_metrics)


def test_the_discriminator_rests_until_it_starts(config):
    parts = Parts(config)
    state, metrics = parts.run(1, networks=parts.networks._replace(discriminator=None))
    jax.tree.map(
        np.testing.assert_array_equal,
        state.discriminator,
        jax.device_get(parts.state.discriminator),
    )
    assert not any("discriminator" in name or "generator" in name for name in metrics)


def test_losses_of_weight_zero_cost_nothing(tiny_config):
    networks = build.networks(tiny_config)
    assert networks.discriminator is None and networks.lpips is None
    parts = Parts(tiny_config)
    assert parts.state.discriminator == {}
    _, metrics = parts.run(1)
    assert set(metrics) == {"loss", "mse", "bit_entropy", "grad_norm", "param_norm"}


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({"bottleneck": "vq", "codebook_size": 8}, {"commitment"}),
        ({"bottleneck": "real"}, {"kl"}),
        ({"bottleneck": "real", "variational": False}, set()),
        ({"bottleneck": "binary", "deterministic": True}, {"bit_entropy"}),
        ({"bottleneck": "binary", "signed": True}, {"bit_entropy"}),
    ],
)
def test_every_bottleneck_trains(tiny_config, overrides, expected):
    tiny_config.autoencoder.update(overrides)
    parts = Parts(tiny_config)
    state, metrics = parts.run(2)
    assert set(metrics) == {"loss", "mse", "grad_norm", "param_norm"} | expected
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert int(state.step) == 1
