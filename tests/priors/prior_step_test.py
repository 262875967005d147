"""The prior's training step: keys of its draws, parts of a batch, and codes."""

import dataclasses
import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from updates import N, check_same_params_and_metrics, on_devices, prior_parts, run

from binlatent.configs import default
from binlatent.priors import step as prior_step
from binlatent.priors.bernoulli import objective
from binlatent.priors.prior import Prior
from binlatent.runtime import devices, machine
from binlatent.training import state as state_lib

# Draws. Each must come from its key, so that runs of older checkpoints continue unchanged.


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("continuous", [False, True])
def test_a_key_is_split_in_four_one_for_each_draw(tiny_experiment, continuous, stratified):
    prior = dataclasses.replace(
        tiny_experiment.prior.prior, continuous=continuous, stratified=stratified
    )
    key, n, shape = jax.random.key(5), 32, (32, *prior.code_shape)
    probs, label = jax.random.uniform(jax.random.key(6), shape), jnp.arange(n)
    bits, condition, noise = prior_step.draw_batch(prior, key, probs, label, 0.3)

    of_bits, of_z_t, of_t, of_labels = jax.random.split(key, 4)
    np.testing.assert_array_equal(bits, jax.random.uniform(of_bits, shape) < probs)
    np.testing.assert_array_equal(noise.z_t, jax.random.uniform(of_z_t, shape))
    if stratified:
        u = (jax.random.uniform(of_t) + jnp.arange(n) / n) % 1.0
    else:
        u = jax.random.uniform(of_t, (n,))
    T = prior.num_timesteps
    np.testing.assert_array_equal(noise.t, T * (1 - u) if continuous else jnp.floor(u * T) + 1)
    dropped = jax.random.bernoulli(of_labels, 0.3, (n,))
    np.testing.assert_array_equal(condition.given, ~dropped)
    np.testing.assert_array_equal(condition.label, label)
    assert 0 < np.mean(dropped) < 1 and bits.dtype == noise.t.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_labels_or_their_dropout_the_other_draws_stay(tiny_experiment, dtype):
    prior, key = tiny_experiment.prior.prior, jax.random.key(5)
    probs = jax.random.uniform(jax.random.key(6), (N, *prior.code_shape)).astype(dtype)
    dropped = prior_step.draw_batch(prior, key, probs, jnp.arange(N), 0.3)
    kept = prior_step.draw_batch(prior, key, probs, jnp.arange(N))
    none = prior_step.draw_batch(prior, key, probs, None, 0.3)
    assert np.all(kept[1].given) and none[1] is None
    for bits, _, noise in (kept, none):
        jax.tree.map(np.testing.assert_array_equal, (bits, noise), (dropped[0], dropped[2]))
        assert bits.dtype == jnp.float32
    expected = jax.random.uniform(jax.random.split(key, 4)[0], probs.shape) < probs
    np.testing.assert_array_equal(kept[0], expected)


def test_a_seeds_base_key_and_parameters_are_halves_of_one(tiny_experiment):
    spec = tiny_experiment.prior
    state = spec.init_state(7)
    key = jax.random.fold_in(jax.random.key(7), zlib.crc32(b"prior"))
    of_params, base = jax.random.split(key)
    np.testing.assert_array_equal(*map(jax.random.key_data, (state.key, base)))
    jax.tree.map(np.testing.assert_array_equal, state.params, spec.init(of_params))


def test_label_dropout_is_per_sample_at_its_rate(tiny_experiment):
    prior = dataclasses.replace(tiny_experiment.prior.prior, code_shape=(1, 1, 1))
    n = 20_000
    drawn = prior_step.draw_batch(
        prior, jax.random.key(0), jnp.zeros((n, 1, 1, 1)), jnp.zeros(n, jnp.int32), 0.1
    )
    np.testing.assert_allclose(np.mean(~drawn[1].given), 0.1, atol=0.01)


@dataclasses.dataclass(frozen=True)
class Recorder(Prior):
    """A kind of prior that does not learn and reports the inputs of the step."""

    def draw_noise(self, keys, n):
        return jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys).T

    def loss(self, params, bits, condition, noise):
        given = jnp.zeros(()) if condition is None else jnp.mean(condition.label * condition.given)
        noise = jnp.mean(noise, axis=0)
        loss = jnp.mean(params["params"]["w"] * jnp.mean(bits))
        return loss, {"bits": jnp.mean(bits), "labels": given, "z_t": noise[0], "t": noise[1]}


@pytest.mark.parametrize("conditional", [False, True])
def test_any_kind_gets_its_draws_from_the_key_of_step_and_device(conditional):
    prior, num_devices = Recorder((2, 2, 3), None), 4
    adam = optax.sgd(0.0)
    state = state_lib.create_state(jax.random.key(1), {"params": {"w": jnp.ones(3)}}, adam)
    state = state.replace(step=jnp.asarray(11, jnp.int32))
    shape, label = (num_devices, 5, 2, 2, 3), np.arange(20, dtype=np.int32).reshape(4, 5)
    probs = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    step = functools.partial(
        prior_step.train_step,
        encode=None,
        prior=prior,
        conditional=conditional,
        label_dropout=0.4,
        optimizer=adam,
        ema_decay=0.9,
    )
    step = jax.pmap(step, axis_name=devices.AXIS, in_axes=(None, 0, None), out_axes=(None, None))
    _, metrics = step(state, {"probs": probs, "label": label}, None)
    expected = {"bits": [], "labels": [], "z_t": [], "t": []}
    for device in range(num_devices):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 11), device)
        keys = jax.random.split(key, 4)
        expected["bits"].append(jax.random.uniform(keys[0], shape[1:]) < probs[device])
        expected["z_t"].append(jax.random.uniform(keys[1], (5,)))
        expected["t"].append(jax.random.uniform(keys[2], (5,)))
        dropped = jax.random.bernoulli(keys[3], 0.4, (5,))
        expected["labels"].append(conditional * label[device] * ~dropped)
    for name, drawn in expected.items():
        np.testing.assert_allclose(metrics[name], np.mean(drawn), rtol=1e-5, err_msg=name)


# The batch in parts


@pytest.mark.parametrize("num_devices, accumulate", [(1, 4), (2, 2)])
def test_parts_of_a_batch_make_the_prior_the_same_update(tiny_experiment, num_devices, accumulate):
    parts = prior_parts(tiny_experiment, optax.sgd(0.5))
    update = functools.partial(parts.update, accumulate=accumulate)
    in_parts = run(parts._replace(update=update), num_devices)
    check_same_params_and_metrics(run(parts, num_devices), in_parts)


@pytest.mark.parametrize(
    "cores, images, tokens, parts",
    [
        (2, 8, 256, 4),  # of 2 x 256 tokens = 2 x 256
        (2, 128, 16, 4),  # 32 x 16 = 2 x 256
        (2, 24, 100, 4),  # 6 x 100 >= 512 > 4 x 100
        (2, 7, 128, 1),  # 7 is prime
        (2, 7, 1024, 7),
        (2, 1, 4096, 1),
        (2, 8, 16, 1),  # too few tokens for a second part
        (8, 128, 16, 1),  # 8 x 256 = all of them
        (1, 8, 256, 8),
    ],
)
def test_a_part_of_a_batch_leaves_each_core_256_tokens(monkeypatch, cores, images, tokens, parts):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    assert prior_step.parts_for_caches(images, tokens) == parts
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert prior_step.parts_for_caches(images, tokens) == 1


def test_the_priors_batch_is_in_parts_if_the_machine_likes_it(tiny_experiment, monkeypatch):
    accumulate = default.get_config().prior.train.accumulate
    spec = tiny_experiment.change({"prior.train.accumulate": accumulate}).prior
    monkeypatch.setattr(machine, "cores", lambda: 1)
    step, state = on_devices(spec.step(None), 1, 2), spec.init_state(0)

    def loops(images):
        shape = (1, images, *spec.prior.code_shape)
        batch = {"probs": jnp.zeros(shape), "label": jnp.zeros((1, images), jnp.int32)}
        traced = jax.make_jaxpr(step)(state, batch, None)
        return re.findall(r"scan\[.*?length=(\d+)", str(traced), re.DOTALL)

    assert spec.prior.code_shape[:2] == (4, 4)
    assert loops(16) == []  # 256 tokens
    assert loops(80) == ["5"]  # 16 images each


def test_to_find_a_nan_the_prior_takes_its_batch_whole(tiny_experiment):
    spec = tiny_experiment.change({"prior.train.accumulate": 4}).prior
    assert spec.step(None).keywords["accumulate"] == 4
    assert spec.step(None, debug_nans=True).keywords["accumulate"] == 1


# Labels and codes


def test_dropped_labels_reach_the_network_as_unlabelled(tiny_experiment):
    prior = tiny_experiment.prior.prior
    state, (bits, condition, noise), _ = prior_parts(tiny_experiment)
    params = jax.tree.map(lambda x: x + 0.1, state.params)

    def logits(condition):
        return objective.predict(prior, params, bits, condition, noise).flip_logit

    dropped = logits(condition._replace(given=jnp.zeros(N, bool)))
    kept = logits(condition._replace(given=jnp.ones(N, bool)))
    np.testing.assert_allclose(dropped, logits(None), atol=1e-5)
    np.testing.assert_allclose(kept, logits(condition._replace(given=None)), atol=1e-5)
    assert np.any(np.asarray(kept) != np.asarray(dropped))


def test_prior_trains_on_images_with_a_frozen_encoder(tiny_experiment):
    # The loss of the step on images is the loss on the encoder's probabilities.
    autoencoder, spec = tiny_experiment.autoencoder, tiny_experiment.prior
    params = autoencoder.init(jax.random.key(9))
    encode = functools.partial(autoencoder.networks.autoencoder.apply, method="probs")
    images = jax.random.uniform(jax.random.key(2), (N, 28, 28, 1), minval=-1)
    step = jax.pmap(
        spec.step(encode),
        axis_name=devices.AXIS,
        in_axes=(None, 0, None),
        out_axes=(None, None),
    )
    probs, label = np.asarray(encode(params, images)), np.arange(N)

    def loss(params, **batch):
        batch = devices.shard({"label": label, **batch})
        return step(spec.init_state(0), batch, params)[1]["loss"]

    on_the_fly = loss(params, image=np.asarray(images))
    np.testing.assert_allclose(on_the_fly, loss(None, probs=probs), rtol=1e-5)
    # Cached codes are bytes, in units of 1/255.
    cached = np.random.default_rng(0).integers(0, 256, probs.shape).astype(np.uint8)
    exact = loss(None, probs=cached.astype(np.float32) / np.float32(255))
    np.testing.assert_allclose(loss(None, probs=cached), exact, rtol=1e-5)
    assert exact != on_the_fly
