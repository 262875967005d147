"""What both stages' steps share: the state, its update and its keys."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from binlatent.runtime.devices import device_key, mean_over_devices

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
    """All that a stage's training carries from one step to the next.

    Fields:
      step: updates made so far, int32 scalar.
      key: the stage's base key; a step's keys are folded from it and it never changes.
      params: the network's parameters.
      ema_params: their exponential moving average.
      opt_state: of the optimiser.
      discriminator: the second network of an adversarial loss: its `params`, `batch_stats` and
        `opt_state`; {} without one.
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
        # A copy, never an alias: the step donates its state.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        discriminator=discriminator or {},
    )


def updates_made(state: TrainState) -> int:
    """Returns how many updates Adam has made: fewer than steps, if some were skipped."""
    return int(optax.tree.get_all_with_path(state.opt_state, "count")[0][1])


def global_norm(tree: Any) -> Array:
    """Returns the 2-norm of all numbers of a tree of float arrays, in float32.

    On CPUs by the eighths of large arrays, which is vectorised: XLA's own sums with Eigen's kernels
    are not.
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
    """Returns a step that changes nothing but the step's number if a metric is not finite.

    The metrics are averages over the devices, with the norms of all gradients and of all new
    parameters, so that the devices decide alike and nothing that is broken passes.

    Args:
      step: (state, batch, *frozen) -> (state, metrics), the same on every device.

    Returns:
      Such a step, with the metric `skipped`, 0 or 1.
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
    """Applies a function to the parts of a batch one after the other and averages what it returns.

    Args:
      function: (carry, part of the batch) -> (carry, tree of float arrays).
      carry: for the first part.
      batch: tree of arrays of one length, which `num` divides.
      num: of parts; memory is that of one.

    Returns:
      The last carry and the mean of the trees.
    """
    if num == 1:
        return function(carry, batch)
    # Every num-th image, so that a part is spread over the batch as the whole is.
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

    The EMA starts short, min(ema_decay, (1 + step) / (10 + step)), so that it forgets the
    initialisation.

    Returns:
      The new state and the averaged metrics, with `grad_norm` before clipping and `param_norm`.
    """
    gradients, metrics = mean_over_devices((gradients, metrics))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)
    # The norm of the new parameters tells a broken state before it is saved.
    norms = {"grad_norm": global_norm(gradients), "param_norm": global_norm(params)}
    metrics = {**metrics, **norms}
    return state.replace(
        step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
    ), metrics
