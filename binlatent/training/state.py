"""The training state of both stages, its update and its keys."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from binlatent.runtime.devices import device_key, mean_over_devices

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
    """What a stage's training carries from one step to the next.

    Fields:
      step: updates made so far, int32 scalar.
      key: the stage's base key, which never changes; a step's keys are folded from it.
      params: the network's parameters.
      ema_params: their exponential moving average.
      opt_state: of the optimiser.
      discriminator: `params`, `batch_stats` and `opt_state` of the discriminator, {} without one.
    """

    step: Array
    key: Array
    params: Any
    ema_params: Any
    opt_state: Any
    discriminator: dict[str, Any]


def create_state(
    key: Array,
    params: Any,
    optimizer: optax.GradientTransformation,
    discriminator: dict[str, Any] | None = None,
) -> TrainState:
    """Returns the state before the first step; `key` becomes the stage's base key."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        # A copy, not an alias, because the step donates its state.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        discriminator=discriminator or {},
    )


def updates_made(state: TrainState) -> int:
    """Returns the number of Adam's updates, which skipped steps do not count in."""
    return int(optax.tree.get_all_with_path(state.opt_state, "count")[0][1])


def global_norm(tree: Any) -> Array:
    """Returns the 2-norm of all numbers in a tree of float arrays, in float32.

    On CPUs, large arrays are split into eighths, because XLA does not vectorise their sums.
    """
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    return jax.lax.platform_dependent(tree, cpu=_global_norm_on_cpu, default=optax.tree.norm)


def _global_norm_on_cpu(tree: Any) -> Array:
    total = jnp.zeros((), jnp.float32)
    for x in jax.tree.leaves(tree):
        x = jnp.square(x.ravel())
        while x.size >= 2**14:
            rest = x.size % 8
            total += jnp.sum(x[x.size - rest :])
            x = sum(jnp.split(x[: x.size - rest], 8))
        total += jnp.sum(x)
    return jnp.sqrt(total)


def skip_nonfinite(step: Callable) -> Callable:
    """Returns a step that only increments the step's number if a metric is NaN or infinite.

    The metrics are averages over the devices, so that all devices decide alike. They include the
    norms of gradients and of new parameters, so that no NaN or infinity enters the state.

    Args:
      step: (state, batch, *frozen) -> (state, metrics), the same on every device.

    Returns:
      A function like `step`, with a further metric `skipped`, 0 or 1.
    """

    def step_or_skip(state, batch, *frozen):
        new, metrics = step(state, batch, *frozen)
        finite = jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))))
        kept = jax.tree.map(
            lambda after, before: jnp.where(finite, after, before),
            new,
            state.replace(step=new.step),
        )
        return kept, {**metrics, "skipped": 1 - finite.astype(jnp.int32)}

    return step_or_skip


def step_key(state: TrainState) -> Array:
    """Returns the key of this step on this device; call under pmap."""
    return device_key(jax.random.fold_in(state.key, state.step))


def accumulate(function: Callable, carry: Any, batch: Any, num: int) -> tuple[Any, Any]:
    """Applies a function to parts of a batch, one after the other, and averages its results.

    Args:
      function: (carry, part of the batch) -> (carry, tree of float arrays).
      carry: of the first part.
      batch: tree of arrays of one length, a multiple of `num`.
      num: the number of parts; memory is used for one part at a time.

    Returns:
      The last carry and the mean of the trees.
    """
    if num == 1:
        return function(carry, batch)
    # A part has every num-th image, so that it is spread evenly over the batch.
    parts = jax.tree.map(lambda x: x.reshape(-1, num, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry_and_total, part):
        carry, total = carry_and_total
        carry, result = function(carry, part)
        return (carry, jax.tree.map(jnp.add, total, result)), None

    first = jax.tree.map(lambda x: x[0], parts)
    _, shapes = jax.eval_shape(function, carry, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (carry, total), _ = jax.lax.scan(add, (carry, zeros), parts)
    return carry, jax.tree.map(lambda x: x / num, total)


def apply_gradients(
    state: TrainState,
    gradients: Any,
    metrics: dict[str, Array],
    *,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> tuple[TrainState, dict[str, Array]]:
    """Averages gradients and metrics over the devices and takes one optimiser step.

    The EMA's decay is min(ema_decay, (1 + step) / (10 + step)), so that the EMA forgets the
    initialisation.

    Returns:
      The new state and the averaged metrics, with `grad_norm` before clipping and `param_norm`.
    """
    gradients, metrics = mean_over_devices((gradients, metrics))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)
    # The norm of the new parameters shows a NaN or infinity before the state is saved.
    norms = {"grad_norm": global_norm(gradients), "param_norm": global_norm(params)}
    metrics = {**metrics, **norms}
    return state.replace(
        step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
    ), metrics
