"""Learning rate and clipping of a stage's optimiser."""

import jax
import jax.numpy as jnp
import numpy as np

from binlatent.training.optimizer import Training


def optimizer(warmup_steps=0, decay="constant", max_grad_norm=1.0):
    return Training(
        8, 10, 0.1, warmup_steps=warmup_steps, decay=decay, max_grad_norm=max_grad_norm
    ).optimizer()


def test_warmup_and_cosine_decay_follow_their_closed_form():
    # Adam's first update has the size of the learning rate, whatever the gradient.
    adam = optimizer(2, "cosine", 1e9)
    params, gradient = jnp.zeros(()), jnp.ones(())
    opt_state, rates = adam.init(params), []
    for _ in range(10):
        updates, opt_state = adam.update(gradient, opt_state, params)
        rates.append(-float(updates))
    expected = [0, 0.05] + [0.05 * (1 + np.cos(np.pi * i / 8)) for i in range(8)]
    np.testing.assert_allclose(rates, expected, atol=1e-5)


def test_the_optimiser_follows_the_schedule():
    cosine = Training(8, 10, 0.1, warmup_steps=2, decay="cosine").schedule()
    np.testing.assert_allclose([cosine(i) for i in (0, 1, 2, 6, 10)], [0, 0.05, 0.1, 0.05, 0])
    constant = Training(8, 10, 0.1).schedule()
    np.testing.assert_allclose([constant(i) for i in (0, 1, 100)], 0.1)


def test_gradients_are_clipped_by_their_global_norm():
    adam, params = optimizer(), {"a": jnp.zeros(2)}
    big, small = ({"a": jnp.array([3.0, 4.0]) * scale} for scale in (100.0, 0.2))
    states = [adam.update(g, adam.init(params), params)[1] for g in (big, small)]
    moments = [jax.tree.leaves(s)[1] for s in states]
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-5)  # both of norm 1, same direction


def test_clipping_keeps_the_type_of_each_gradient():
    adam = optimizer()
    gradients = {"a": jnp.full(3, 100, jnp.bfloat16), "b": jnp.full(2, 100.0)}
    updates, _ = adam.update(gradients, adam.init(gradients), gradients)
    assert {name: x.dtype for name, x in updates.items()} == {"a": jnp.bfloat16, "b": jnp.float32}
