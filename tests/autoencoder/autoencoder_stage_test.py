"""The autoencoder's step: losses, both networks' gradients, devices and accumulation."""

import functools

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import updates
from flax import traverse_util

from binlatent.autoencoder import adversarial, bottleneck
from binlatent.autoencoder import step as stage
from binlatent.autoencoder.modules import last_kernel
from binlatent.convert import published
from binlatent.runtime import devices

ALL = {
    "autoencoder.loss.l1": 0.5,
    "autoencoder.loss.adversarial": 0.7,
    "autoencoder.loss.r1": 0.1,
    "autoencoder.loss.entropy": 0.3,
    "autoencoder.discriminator.width": 8,
    "autoencoder.discriminator.num_layers": 1,
    "autoencoder.discriminator.augment": ("colour", "translation"),
}
UNCLIPPED = {"autoencoder.loss.adversarial": 50.0}  # above the adaptive weight


@pytest.fixture
def experiment(tiny_experiment):
    return tiny_experiment.change(ALL)


class Parts:
    """A state, a batch, its noise, and the step on any number of devices."""

    def __init__(self, experiment, lpips_params=None):
        self.optimizer = optax.sgd(0.1)  # Adam would turn rounding errors of zeros into full steps
        parts = updates.autoencoder_parts(experiment, self.optimizer)
        self.state, (self.batch, self.noise), _ = parts
        self.image = self.batch["image"]
        self.networks = experiment.autoencoder.networks
        self.objective = experiment.autoencoder.objective
        self.lpips_params = lpips_params or {}

    def run(self, num_devices, networks=None, **statics):
        step = functools.partial(
            stage.update,
            networks=networks or self.networks,
            objective=self.objective,
            optimizer=self.optimizer,
            ema_decay=0.9,
            **statics,
        )
        inputs = updates.split((self.batch, self.noise), num_devices)
        step = updates.on_devices(step, num_devices, len(inputs), num_frozen=1)
        state = jax.tree.map(jnp.copy, self.state)
        return jax.device_get(step(state, *inputs, self.lpips_params))

    def on_one_device(self, function):
        """Calls a function under the pmapped axis that the losses need."""
        result = jax.pmap(lambda _: function(), axis_name=devices.AXIS, devices=jax.devices()[:1])(
            np.zeros(1)
        )
        return jax.tree.map(lambda x: x[0], result)


def assert_close(a, b, atol=2e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=atol), a, b)


@pytest.mark.slow
def test_one_and_four_devices_make_the_same_update_of_both_networks(experiment):
    # Batch statistics, bit frequencies and the adaptive weight are synchronised.
    parts = Parts(experiment.change(UNCLIPPED | {"autoencoder.loss.adaptive": True}))
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
def test_gradients_are_those_of_the_losses_as_written(experiment, adaptive):
    parts = Parts(experiment.change(UNCLIPPED | {"autoencoder.loss.adaptive": adaptive}))
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
def test_perceptual_loss_is_a_term_of_the_gradient(experiment):
    changes = {"autoencoder.loss.adversarial": 0.0, "autoencoder.loss.perceptual": 2.0}
    names = published.vgg16(drawn.vgg16_state())
    variables = {"params": traverse_util.unflatten_dict(names, sep="/")}
    parts = Parts(experiment.change(changes), variables)
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
def test_accumulation_makes_the_same_update(experiment):
    # Up to rounding, with group norm and without losses of the whole batch.
    changes = {"autoencoder.discriminator.norm": "group", "autoencoder.loss.entropy": 0.0}
    parts = Parts(experiment.change(changes))
    whole, whole_metrics = parts.run(2)
    for accumulate in (2, 4):
        state, metrics = parts.run(2, accumulate=accumulate)
        assert_close((state.params, state.discriminator), (whole.params, whole.discriminator))
        assert_close(metrics, whole_metrics)


def test_the_discriminator_is_not_trained_before_its_start(experiment):
    parts = Parts(experiment)
    state, metrics = parts.run(1, networks=parts.networks._replace(discriminator=None))
    jax.tree.map(
        np.testing.assert_array_equal,
        state.discriminator,
        jax.device_get(parts.state.discriminator),
    )
    assert not any("discriminator" in name or "generator" in name for name in metrics)


def test_a_discriminator_with_another_learning_rate(experiment):
    parts = Parts(experiment)
    (whole, _), (tenth, _) = (parts.run(1, discriminator_rate=rate) for rate in (1.0, 0.1))
    before = jax.device_get(parts.state)
    assert_close(tenth.params, whole.params, 0)
    moved = [
        jax.tree.map(np.subtract, after.discriminator["params"], before.discriminator["params"])
        for after in (tenth, whole)
    ]
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved[1])) > 1e-4
    assert_close(moved[0], jax.tree.map(lambda x: 0.1 * x, moved[1]), 1e-7)


def test_losses_of_weight_zero_cost_nothing(tiny_experiment):
    parts = Parts(tiny_experiment)
    assert parts.networks.discriminator is None and parts.networks.lpips is None
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
def test_every_bottleneck_trains(tiny_experiment, overrides, expected):
    changes = {f"autoencoder.{key}": value for key, value in overrides.items()}
    parts = Parts(tiny_experiment.change(changes))
    state, metrics = parts.run(2)
    assert set(metrics) == {"loss", "mse", "grad_norm", "param_norm"} | expected
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    assert int(state.step) == 1


def test_a_gradient_is_that_of_the_whole_batch(tiny_experiment):
    # The mean over devices of the gradients equals jax.grad of the loss on the global batch.
    parts = updates.autoencoder_parts(tiny_experiment)
    model, (batch, noise) = tiny_experiment.autoencoder.networks.autoencoder, parts.inputs

    def loss(params):
        reconstruction, _ = model.apply(params, batch["image"], noise.uniform)
        return jnp.mean(jnp.square(reconstruction - batch["image"]))

    gradients = jax.grad(loss)(parts.state.params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
    _, metrics = updates.run(parts, 4, steps=1)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


def test_the_autoencoder_learns_to_copy_a_batch(tiny_experiment):
    changes = {"learning_rate": 3e-3, "num_steps": 200, "ema_decay": 0.9}
    experiment = tiny_experiment.change(
        {f"autoencoder.train.{key}": value for key, value in changes.items()}
    )
    spec = experiment.autoencoder
    step = devices.parallel(spec.step(spec.networks), num_frozen=1)
    y, x = np.mgrid[:28, :28]
    patterns = [np.where((x // 7 + i * (y // 7)) % (2 + i % 3) == 0, 0.8, -0.8) for i in range(8)]
    images = devices.shard({"image": np.stack(patterns)[..., None].astype(np.float32)})
    state = devices.replicate(spec.init_state(0))
    for _ in range(100):
        state, metrics = step(state, images, {})
        # With more than 32 queued steps, JAX's fake CPU devices can deadlock.
        jax.block_until_ready(metrics)
    # The images' mean square is 0.64; the codes must explain most of it.
    assert float(metrics["loss"]) < 0.15


def test_noise_comes_from_a_key_in_three_parts():
    # A checkpoint resumes identically only if each draw uses the same key.
    key, policy = jax.random.key(5), ("colour",)
    noise = stage.draw_noise(key, (4, 8, 8, 3), (4, 2, 2, 6), policy)
    of_bits, of_real, of_fake = jax.random.split(key, 3)
    np.testing.assert_array_equal(noise.uniform, jax.random.uniform(of_bits, (4, 2, 2, 6)))
    for found, own_key in ((noise.real, of_real), (noise.fake, of_fake)):
        expected = adversarial.draw_augmentation(own_key, 4, 8, 8, policy)
        np.testing.assert_array_equal(found["colour"], expected["colour"])
