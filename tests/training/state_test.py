"""Both stages' pmapped steps: one update for any number of devices, donation, EMA, skipping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from updates import PARTS, N, check_same_params_and_metrics, on_devices, prior_parts, run, split

from binlatent.runtime import devices
from binlatent.training import state as state_lib


@pytest.mark.parametrize("stage", PARTS)
def test_one_and_four_devices_make_the_same_update(tiny_experiment, stage):
    # Plain gradient descent: Adam would turn rounding errors of zero gradients into full steps.
    parts = PARTS[stage](tiny_experiment, optax.sgd(0.5))
    one, four = run(parts, 1), run(parts, 4)
    check_same_params_and_metrics(one, four)
    before = jax.device_get(parts.state.params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one[0], before)
    assert max(jax.tree.leaves(moved)) > 1e-4  # and the update is not zero


def test_a_step_donates_its_state_and_keeps_the_ema_apart(tiny_experiment):
    state, inputs, update = prior_parts(tiny_experiment)
    step = on_devices(update, 4, len(inputs))
    first, _ = step(devices.replicate(state), *split(inputs, 4))
    second, _ = step(first, *split(inputs, 4))
    assert jax.tree.leaves(first.params)[0].is_deleted()
    assert int(second.step) == 2


def test_ema_follows_the_recurrence_in_its_docstring(tiny_experiment):
    state, inputs, update = prior_parts(tiny_experiment)
    step = on_devices(update, 1, len(inputs))
    ema = np.asarray(state.params["params"]["pos_emb"])
    for i in range(5):
        state, _ = step(state, *split(inputs, 1))
        decay = min(0.9, (1 + i) / (10 + i))
        ema = decay * ema + (1 - decay) * np.asarray(state.params["params"]["pos_emb"])
    np.testing.assert_allclose(state.ema_params["params"]["pos_emb"], ema, atol=1e-6)


WITH_DISCRIMINATOR = {
    "autoencoder.loss.adversarial": 1.0,
    "autoencoder.loss.adaptive": True,
    "autoencoder.discriminator.width": 8,
    "autoencoder.discriminator.num_layers": 1,
}


@pytest.mark.parametrize("stage", PARTS)
def test_a_nan_on_one_device_skips_the_step_on_all(tiny_experiment, stage):
    state, inputs, update = PARTS[stage](tiny_experiment.change(WITH_DISCRIMINATOR))
    plain = on_devices(update, 4, len(inputs))
    skipping = on_devices(state_lib.skip_nonfinite(update), 4, len(inputs))
    # After two steps no part of the state is zero, including the statistics.
    start = jax.tree.map(jnp.copy, state)
    for _ in range(2):
        start, _ = plain(start, *split(inputs, 4))
    raw = functools.partial(jax.tree.map, lambda x: np.asarray(jax.random.key_data(x)))
    before = jax.device_get(start.replace(key=None))
    key = raw(start.key)

    # A finite step is the same as without skipping.
    after, metrics = skipping(jax.tree.map(jnp.copy, start), *split(inputs, 4))
    assert int(metrics["skipped"]) == 0 and int(after.step) == 3
    expected, _ = plain(jax.tree.map(jnp.copy, start), *split(inputs, 4))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        *(jax.device_get(x.replace(key=None)) for x in (after, expected)),
    )

    # Only the last device has a NaN, in an image or in a time.
    *others, noise = inputs
    if stage == "autoencoder":
        others = [{"image": others[0]["image"].at[-1].set(jnp.nan)}]
    else:
        noise = noise._replace(t=noise.t.at[-1].set(jnp.nan))
    after, metrics = skipping(start, *split((*others, noise), 4))
    assert int(metrics["skipped"]) == 1 and int(after.step) == 3
    np.testing.assert_array_equal(raw(after.key), key)
    after = jax.device_get(after.replace(key=None, step=before.step))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    if stage == "autoencoder":
        assert not np.isfinite(metrics["loss"])
        assert np.abs(jax.tree.leaves(before.discriminator["batch_stats"])[0]).max() > 0


def test_updates_are_counted_by_the_optimiser(tiny_experiment):
    state, (*others, noise), update = prior_parts(tiny_experiment)
    skipping = on_devices(state_lib.skip_nonfinite(update), 1, 3)
    for i in range(3):
        t = jnp.full(N, jnp.nan) if i == 1 else noise.t
        state, _ = skipping(state, *split((*others, noise._replace(t=t)), 1))
    assert int(state.step) == 3 and state_lib.updates_made(state) == 2


def test_each_step_and_device_has_its_own_key(tiny_experiment):
    state = prior_parts(tiny_experiment).state
    keys = jax.pmap(
        lambda state, _: jax.random.key_data(state_lib.step_key(state)),
        axis_name=devices.AXIS,
        in_axes=(None, 0),
    )
    later = state.replace(step=state.step + 1)
    seen = np.concatenate([np.asarray(keys(s, np.zeros(4))) for s in (state, later)])
    assert len(np.unique(seen, axis=0)) == 8


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (2**14 - 1,), (2**14,), (7, 8191), (3, 5, 7, 11, 17)])
def test_the_global_norm_in_float64(shape, dtype):
    rng = np.random.default_rng(0)
    tree = {"a": jnp.asarray(rng.standard_normal(shape), dtype), "b": jnp.full((9,), 0.5, dtype)}
    exact = np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in tree.values()))
    norm = jax.jit(state_lib.global_norm)
    np.testing.assert_allclose(norm(tree), exact, rtol=1e-6)
    for place in range(0, tree["a"].size, 5003):
        broken = tree["a"].ravel().at[-1 - place].set(jnp.nan)
        assert np.isnan(norm(tree | {"a": broken.reshape(shape)}))
