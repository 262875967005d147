"""The devices: the one pmap axis, and how arrays get onto them and back."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Array = jax.Array

AXIS = "batch"  # the one pmap axis


def parallel(step: Callable, num_frozen: int = 0) -> Callable:
    """Returns a step pmapped over all devices, for a replicated state and a sharded batch.

    It is (state, batch, *frozen) -> (state, metrics), the same on every device, with `num_frozen`
    replicated arguments after the batch; it donates its state.
    """
    in_axes = (None, 0) + (None,) * num_frozen
    return jax.pmap(step, AXIS, in_axes=in_axes, out_axes=(None, None), donate_argnums=0)


def parallel_on(device: jax.Device, step: Callable) -> Callable:
    """Returns `parallel` of a step with one frozen argument, for one device that need not be there.

    It takes a batch that is not split.
    """
    mesh, spec = jax.sharding.Mesh(np.array([device]), (AXIS,)), jax.sharding.PartitionSpec
    specs = {"in_specs": (spec(), spec(AXIS), spec()), "out_specs": (spec(), spec())}
    step = jax.shard_map(step, mesh=mesh, check_vma=False, **specs)
    return jax.jit(step, donate_argnums=0)


def parallel_for_debugging(step: Callable, num_frozen: int = 0) -> Callable:
    """Returns `parallel` without pmap: each device's share is an entry of one vmapped batch.

    With jax_debug_nans, JAX repeats a step that has made a NaN operation by operation to name the
    one that did. Of a pmapped step it cannot: with JAX 0.10 that ends in a RecursionError.
    """
    in_axes = (None, 0) + (None,) * num_frozen
    step = jax.vmap(step, axis_name=AXIS, in_axes=in_axes)
    return jax.jit(lambda *arguments: jax.tree.map(lambda x: x[0], step(*arguments)))


def replicate(tree: Any) -> Any:
    """Places a tree on this process's devices as a parallel step returns it, to compile it once."""
    return jax.device_put(tree, _sharding())


def spread(tree: Any) -> Any:
    """Deals the first axis of a tree's arrays out to this process's devices, which divide it."""
    return jax.device_put(tree, _sharding(AXIS))


def _sharding(*axes: str) -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Splits a host's batch over its devices: (b, …) -> (devices, b / devices, …)."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def largest(number: int) -> Array:
    """Returns the largest of the processes' numbers, int32; all must call it, between their steps.

    It is there when the steps before it are: to read it earlier waits for them.
    """
    return _largest(np.full(jax.local_device_count(), number, np.int32))


@functools.partial(jax.pmap, axis_name=AXIS, out_axes=None)
def _largest(number: Array) -> Array:
    return jax.lax.pmax(number, AXIS)


def device_key(key: Array) -> Array:
    """Returns this device's own key; call under pmap over `AXIS`."""
    return jax.random.fold_in(key, jax.lax.axis_index(AXIS))


def mean_over_devices(tree: Any, axis_name: str = AXIS) -> Any:
    """Averages over the devices; call under pmap over the axis."""
    if jax.lax.axis_size(axis_name) == 1:  # XLA would copy every array, on CPUs
        return tree
    return jax.lax.pmean(tree, axis_name)


def map_batches(function: Callable, batch_size: int, *arrays: Any) -> Any:
    """Applies `function` to batches of equal size along the first axis and joins the results.

    A batch is spread over this process's devices. The last one is filled up with its last entry, so
    that one compiled program serves all.

    Args:
      function: returns an array or a tree of arrays; what else it takes lies on all devices, or on
        none.
      batch_size: on all devices, at most; rounded up to a multiple of their number.
      *arrays: of one length; None stays None.
    """
    n = len(arrays[0])
    devices = jax.local_device_count()
    batch_size = -(-min(batch_size, n) // devices) * devices
    results = []
    for start in range(0, n, batch_size):
        take = np.minimum(np.arange(start, start + batch_size), n - 1)
        batch = [None if array is None else array[take] for array in arrays]
        results.append(jax.device_get(function(*spread(batch))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *results)
