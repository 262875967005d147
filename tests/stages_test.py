"""The pmapped steps: one update whatever the number of devices, donation, EMA, keys, learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from binlatent import build
from binlatent.stages import autoencoder as autoencoder_stage
from binlatent.stages import prior as prior_stage
from binlatent.stages import state as state_lib

N = 8


@pytest.fixture
def config(tiny_config):
    tiny_config.data.num_classes = 10
    return tiny_config


def autoencoder_parts(config, optimizer=None):
    """The state, the batch, the noise and the bound update of the autoencoder."""
    optimizer = optimizer or build.optimizer(config.autoencoder.train)
    params = build.init_autoencoder(config, jax.random.key(0))
    state = state_lib.create_state(jax.random.key(1), params, optimizer)
    images = jax.random.uniform(jax.random.key(2), (N, 28, 28, 1), minval=-1)
    noise = autoencoder_stage.draw_noise(jax.random.key(3), (N, *build.code_shape(config)))
    statics = dict(model=build.autoencoder(config), optimizer=optimizer, ema_decay=0.9)
    return state, {"image": images}, noise, functools.partial(autoencoder_stage.update, **statics)


def prior_parts(config, optimizer=None):
    """The same of the prior."""
    optimizer = optimizer or build.optimizer(config.prior.train)
    params = build.init_prior(config, jax.random.key(0))
    state = state_lib.create_state(jax.random.key(1), params, optimizer)
    denoiser = build.denoiser(config)
    shape = (N, *build.code_shape(config))
    batch = {"probs": jax.random.uniform(jax.random.key(2), shape), "label": jnp.arange(N)}
    noise = prior_stage.draw_noise(jax.random.key(3), shape, denoiser.num_timesteps, 0.1)
    statics = dict(denoiser=denoiser, optimizer=optimizer, ema_decay=0.9)
    return state, batch, noise, functools.partial(prior_stage.update, **statics)


PARTS = {"autoencoder": autoencoder_parts, "prior": prior_parts}


def on_devices(update, num_devices):
    return jax.pmap(
        update,
        axis_name=state_lib.AXIS,
        in_axes=(None, 0, 0),
        out_axes=(None, None),
        donate_argnums=0,
        devices=jax.devices()[:num_devices],
    )


def run_updates(parts, num_devices, steps=3):
    state, batch, noise, update = parts
    step = on_devices(update, num_devices)
    split = functools.partial(
        jax.tree.map, lambda x: np.asarray(x).reshape(num_devices, -1, *x.shape[1:])
    )
    state = jax.tree.map(jnp.copy, state)
    for _ in range(steps):
        state, metrics = step(state, split(batch), split(noise))
    return jax.device_get(state.params), jax.device_get(metrics)


@pytest.mark.parametrize("stage", PARTS)
def test_one_and_four_devices_make_the_same_update(config, stage):
    # Plain gradient descent: Adam makes full steps of gradients that are zero up to rounding.
    parts = PARTS[stage](config, optax.sgd(0.5))
    one, one_metrics = run_updates(parts, 1)
    four, four_metrics = run_updates(parts, 4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one, four)
    for name in one_metrics:
        np.testing.assert_allclose(one_metrics[name], four_metrics[name], rtol=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, jax.device_get(parts[0].params))
    assert max(jax.tree.leaves(moved)) > 1e-4  # and the update is not nothing


def test_autoencoder_gradient_is_that_of_the_whole_batch(config):
    # The mean over devices of the gradients equals jax.grad of the loss on the global batch.
    state, batch, noise, update = autoencoder_parts(config)
    model = build.autoencoder(config)
    gradients, _ = jax.grad(
        lambda p: autoencoder_stage.loss(model, p, batch["image"], noise), has_aux=True
    )(state.params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
    _, metrics = run_updates((state, batch, noise, update), 4, steps=1)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


def test_a_step_donates_its_state_and_keeps_the_ema_apart(config):
    state, batch, noise, update = prior_parts(config)
    step = on_devices(update, 4)
    split = functools.partial(jax.tree.map, lambda x: np.asarray(x).reshape(4, -1, *x.shape[1:]))
    first, _ = step(state_lib.replicate(state), split(batch), split(noise))
    second, _ = step(first, split(batch), split(noise))
    assert jax.tree.leaves(first.params)[0].is_deleted()
    assert int(second.step) == 2


def test_ema_is_the_recurrence_of_its_docstring(config):
    state, batch, noise, update = prior_parts(config)
    step = on_devices(update, 1)
    split = functools.partial(jax.tree.map, lambda x: np.asarray(x)[None])
    ema = np.asarray(state.params["params"]["positions"])
    for i in range(5):
        state, _ = step(state, split(batch), split(noise))
        decay = min(0.9, (1 + i) / (10 + i))
        ema = decay * ema + (1 - decay) * np.asarray(state.params["params"]["positions"])
    np.testing.assert_allclose(state.ema_params["params"]["positions"], ema, atol=1e-6)


def test_each_step_and_device_has_its_own_key(config):
    state, *_ = prior_parts(config)
    keys = jax.pmap(
        lambda state, _: jax.random.key_data(state_lib.step_key(state)),
        axis_name=state_lib.AXIS,
        in_axes=(None, 0),
    )
    later = state.replace(step=state.step + 1)
    seen = np.concatenate([np.asarray(keys(s, np.zeros(4))) for s in (state, later)])
    assert len(np.unique(seen, axis=0)) == 8


def test_warmup_and_cosine_decay_follow_their_closed_form():
    # Adam's first update has the size of the learning rate, whatever the gradient.
    optimizer = state_lib.create_optimizer(0.1, 2, 10, "cosine", 1e9)
    params, gradient = jnp.zeros(()), jnp.ones(())
    opt_state, rates = optimizer.init(params), []
    for _ in range(10):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        rates.append(-float(updates))
    expected = [0, 0.05] + [0.05 * (1 + np.cos(np.pi * i / 8)) for i in range(8)]
    np.testing.assert_allclose(rates, expected, atol=1e-5)
    with pytest.raises(ValueError, match="'constant' or 'cosine', got 'linear'"):
        state_lib.create_optimizer(0.1, 2, 10, "linear", 1.0)


def test_gradients_are_clipped_by_their_global_norm():
    optimizer = state_lib.create_optimizer(0.1, 0, 10, "constant", 1.0)
    params = {"a": jnp.zeros(2)}
    big, small = ({"a": jnp.array([3.0, 4.0]) * scale} for scale in (100.0, 0.2))
    states = [optimizer.update(g, optimizer.init(params), params)[1] for g in (big, small)]
    moments = [jax.tree.leaves(s)[1] for s in states]
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-5)  # both of norm 1, same direction


def test_label_dropout_is_per_sample_at_its_rate():
    noise = prior_stage.draw_noise(jax.random.key(0), (20_000, 1, 1, 1), 64, 0.1)
    np.testing.assert_allclose(np.mean(noise.unlabelled), 0.1, atol=0.01)
    assert np.min(noise.t) == 1 and np.max(noise.t) == 64
    counts = np.bincount(noise.t, minlength=65)[1:]
    assert counts.min() > 20_000 / 64 / 2  # every time is drawn


def test_dropped_labels_reach_the_network_as_unlabelled(config):
    state, batch, noise, _ = prior_parts(config)
    params = jax.tree.map(lambda x: x + 0.1, state.params)
    denoiser = build.denoiser(config)

    def losses(label, unlabelled):
        replaced = noise._replace(unlabelled=unlabelled)
        return prior_stage.bit_losses(denoiser, params, batch["probs"], label, replaced)[0]

    dropped = losses(batch["label"], jnp.ones(N, bool))
    explicit = losses(jnp.full(N, 10), jnp.zeros(N, bool))
    kept = losses(batch["label"], jnp.zeros(N, bool))
    np.testing.assert_array_equal(dropped, explicit)
    assert np.any(np.asarray(kept) != np.asarray(dropped))


def test_untrained_prior_with_evidence_has_the_entropy_of_the_noise(config):
    # The network starts at zero, so f = b_t: its BCE at t is the entropy of a B(b_t) flip.
    denoiser = build.denoiser(config)
    params = build.init_prior(config, jax.random.key(0))
    n, num_timesteps = 4_000, denoiser.num_timesteps
    t = jnp.arange(n) % num_timesteps + 1
    noise = prior_stage.draw_noise(jax.random.key(1), (n, 4, 4, 8), num_timesteps, 0.0)
    probs = jnp.full((n, 4, 4, 8), 0.5)
    losses, _ = prior_stage.bit_losses(
        denoiser, params, probs, jnp.zeros(n, jnp.int32), noise._replace(t=t)
    )
    b = (np.arange(1, num_timesteps + 1) / num_timesteps) / 2
    entropy = -(b * np.log(b) + (1 - b) * np.log(1 - b))
    np.testing.assert_allclose(np.mean(losses), entropy.mean(), atol=0.005)


def test_without_evidence_the_untrained_prior_knows_nothing(config):
    config.prior.evidence = False
    denoiser = build.denoiser(config)
    params = build.init_prior(config, jax.random.key(0))
    logit = denoiser.flip_logit(
        params, jnp.ones((2, 4, 4, 8)), jnp.array([1, 8]), jnp.zeros(2, jnp.int32)
    )
    np.testing.assert_array_equal(logit, np.zeros((2, 4, 4, 8)))


def test_prior_trains_on_images_with_a_frozen_encoder(config):
    # The loss of the step on images is the loss on the encoder's probabilities.
    autoencoder, params = (
        build.autoencoder(config),
        build.init_autoencoder(config, jax.random.key(9)),
    )
    state, batch, _, _ = prior_parts(config)
    images = jax.random.uniform(jax.random.key(2), (N, 28, 28, 1), minval=-1)
    step = jax.pmap(
        functools.partial(
            prior_stage.train_step,
            encode=functools.partial(autoencoder.apply, method="encode"),
            denoiser=build.denoiser(config),
            label_dropout=0.1,
            optimizer=build.optimizer(config.prior.train),
            ema_decay=0.9,
        ),
        axis_name=state_lib.AXIS,
        in_axes=(None, 0, None),
        out_axes=(None, None),
    )
    probs = np.asarray(autoencoder.apply(params, images, method="encode"))
    label = np.asarray(batch["label"])
    _, on_the_fly = step(
        state, state_lib.shard({"image": np.asarray(images), "label": label}), params
    )
    _, cached = step(state, state_lib.shard({"probs": probs, "label": label}), None)
    np.testing.assert_allclose(on_the_fly["loss"], cached["loss"], rtol=1e-5)


def test_the_autoencoder_learns_to_copy_a_batch(config):
    config.autoencoder.train.learning_rate = 3e-3
    config.autoencoder.train.num_steps = 200
    state, batch, _, _ = autoencoder_parts(config)
    step = jax.pmap(
        functools.partial(
            autoencoder_stage.train_step,
            code_shape=build.code_shape(config),
            model=build.autoencoder(config),
            optimizer=build.optimizer(config.autoencoder.train),
            ema_decay=0.9,
        ),
        axis_name=state_lib.AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        donate_argnums=0,
    )
    y, x = np.mgrid[:28, :28]
    patterns = [np.where((x // 7 + i * (y // 7)) % (2 + i % 3) == 0, 0.8, -0.8) for i in range(N)]
    images = state_lib.shard({"image": np.stack(patterns)[..., None].astype(np.float32)})
    state = state_lib.replicate(state)
    for _ in range(100):
        state, metrics = step(state, images)
    # The images vary by 0.64 about zero; the codes must carry most of it.
    assert float(metrics["loss"]) < 0.15
