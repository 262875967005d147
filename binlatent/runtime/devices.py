"""Devices: the one pmap axis, and moving arrays to the devices and back."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from binlatent.runtime.progress import progress

Array = jax.Array

AXIS = "batch"  # the one pmap axis


def parallel(step: Callable, num_frozen: int = 0) -> Callable:
    """Returns a step pmapped over all devices, for a replicated state and a sharded batch.

    The step maps (state, batch, *frozen) to (state, metrics), and must return the same values on
    every device. `num_frozen` replicated arguments follow the batch. The state is donated.
    """
    in_axes = (None, 0) + (None,) * num_frozen
    return jax.pmap(step, AXIS, in_axes=in_axes, out_axes=(None, None), donate_argnums=0)


def parallel_on(device: jax.Device, step: Callable) -> Callable:
    """Returns `parallel` of a step with one frozen argument, compiled for one described device.

    The device need not exist on this machine. The batch is not split.
    """
    mesh, spec = jax.sharding.Mesh(np.array([device]), (AXIS,)), jax.sharding.PartitionSpec
    specs = {"in_specs": (spec(), spec(AXIS), spec()), "out_specs": (spec(), spec())}
    step = jax.shard_map(step, mesh=mesh, check_vma=False, **specs)
    return jax.jit(step, donate_argnums=0)


def parallel_for_debugging(step: Callable, num_frozen: int = 0) -> Callable:
    """Returns `parallel` without pmap: each device's share is an entry of one vmapped batch.

    With jax_debug_nans, JAX repeats a step that produced a NaN operation by operation, to find the
    operation. For a pmapped step, JAX 0.10 fails with a RecursionError instead.
    """
    in_axes = (None, 0) + (None,) * num_frozen
    step = jax.vmap(step, axis_name=AXIS, in_axes=in_axes)
    return jax.jit(lambda *arguments: jax.tree.map(lambda x: x[0], step(*arguments)))


def replicate(tree: Any) -> Any:
    """Replicates a tree on this process's devices, as `parallel` returns it: one compilation."""
    return jax.device_put(tree, _sharding())


def spread(tree: Any) -> Any:
    """Splits the first axis of a tree's arrays evenly over this process's devices."""
    return jax.device_put(tree, _sharding(AXIS))


def _sharding(*axes: str) -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Reshapes a host's batch for its devices: (b, …) -> (devices, b / devices, …)."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def largest(number: int) -> Array:
    """Returns the largest of the processes' numbers, int32.

    All processes must call this between the same steps. Reading the result waits for the steps that
    were started before.
    """
    return _largest(np.full(jax.local_device_count(), number, np.int32))


@functools.partial(jax.pmap, axis_name=AXIS, out_axes=None)
def _largest(number: Array) -> Array:
    return jax.lax.pmax(number, AXIS)


def device_key(key: Array) -> Array:
    """Returns this device's own key; call under pmap over `AXIS`."""
    return jax.random.fold_in(key, jax.lax.axis_index(AXIS))


def mean_over_devices(tree: Any, axis_name: str = AXIS) -> Any:
    """Averages a tree over the devices; call under pmap over the axis."""
    if jax.lax.axis_size(axis_name) == 1:  # on CPUs, XLA would copy every array
        return tree
    return jax.lax.pmean(tree, axis_name)


def map_batches(function: Callable, batch_size: int, *arrays: Any) -> Any:
    """Applies `function` to batches of equal size along the first axis and joins the results.

    Each batch is split over this process's devices. The last batch is padded with its last entry,
    so that one compiled program serves all batches.

    Args:
      function: maps a batch of each array to an array or a tree of arrays. Arrays that it closes
        over must be replicated, or not on a device.
      batch_size: the largest batch over all devices; rounded up to a multiple of their number.
      *arrays: arrays of one length; None is passed on.
    """
    n = len(arrays[0])
    devices = jax.local_device_count()
    batch_size = -(-min(batch_size, n) // devices) * devices
    results = []
    with progress(-(-n // batch_size), "batches", bar=False) as shown:
        for start in range(0, n, batch_size):
            take = np.minimum(np.arange(start, start + batch_size), n - 1)
            batch = [None if array is None else array[take] for array in arrays]
            results.append(jax.device_get(function(*spread(batch))))
            shown.update()
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:n], *results)
