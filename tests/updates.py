"""One update of a stage on any number of devices, all that it draws being given."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from binlatent.autoencoder import step as autoencoder_step
from binlatent.priors import step as prior_step
from binlatent.runtime import devices
from binlatent.training import state as state_lib

N = 8  # images


class Parts(NamedTuple):
    """A state, trees of N entries each, and the update that takes both."""

    state: state_lib.TrainState
    inputs: tuple[Any, ...]
    update: Callable


def autoencoder_parts(experiment, optimizer=None):
    spec = experiment.autoencoder
    optimizer, discriminator = optimizer or spec.train.optimizer(), None
    if spec.networks.discriminator:
        discriminator = autoencoder_step.create_discriminator_state(
            spec.networks.discriminator, jax.random.key(4), spec.image_shape, optimizer
        )
    params = spec.init(jax.random.key(0))
    shape = (N, *spec.image_shape)
    noise = autoencoder_step.draw_noise(
        jax.random.key(3), shape, (N, *spec.code_shape), spec.objective.augment
    )
    update = functools.partial(
        autoencoder_step.update,
        lpips_params={},
        networks=spec.networks,
        objective=spec.objective,
        optimizer=optimizer,
        ema_decay=0.9,
    )
    return Parts(
        state_lib.create_state(jax.random.key(1), params, optimizer, discriminator),
        ({"image": jax.random.uniform(jax.random.key(2), shape, minval=-1)}, noise),
        update,
    )


def prior_parts(experiment, optimizer=None):
    spec = experiment.prior
    optimizer = optimizer or spec.train.optimizer()
    params = spec.init(jax.random.key(0))
    probs = jax.random.uniform(jax.random.key(2), (N, *spec.prior.code_shape))
    update = functools.partial(
        prior_step.update, prior=spec.prior, optimizer=optimizer, ema_decay=0.9
    )
    return Parts(
        state_lib.create_state(jax.random.key(1), params, optimizer),
        prior_step.draw_batch(spec.prior, jax.random.key(3), probs, jnp.arange(N), 0.1),
        update,
    )


PARTS = {"autoencoder": autoencoder_parts, "prior": prior_parts}


def on_devices(step, num_devices, num_inputs, num_frozen=0):
    """Returns a pmapped step that donates its state."""
    return jax.pmap(
        step,
        axis_name=devices.AXIS,
        in_axes=(None,) + (0,) * num_inputs + (None,) * num_frozen,
        out_axes=(None, None),
        donate_argnums=0,
        devices=jax.devices()[:num_devices],
    )


def split(tree, num_devices):
    return jax.tree.map(lambda x: np.asarray(x).reshape(num_devices, -1, *x.shape[1:]), tree)


def run(parts, num_devices, steps=3):
    """Returns the parameters after some steps on the same inputs, and the last metrics."""
    step = on_devices(parts.update, num_devices, len(parts.inputs))
    state = jax.tree.map(jnp.copy, parts.state)
    for _ in range(steps):
        state, metrics = step(state, *split(parts.inputs, num_devices))
    return jax.device_get(state.params), jax.device_get(metrics)


def check_same_params_and_metrics(one, other):
    """Asserts that two results of `run` agree."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        np.testing.assert_allclose(one[1][name], other[1][name], rtol=1e-4)
