"""Measures the memory that the compiled programs of stage 1 need, without running them."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from binlatent.autoencoder.spec import AutoencoderSpec
from binlatent.benchmark import rows, workloads
from binlatent.benchmark.rows import Row, or_dash
from binlatent.experiment import Experiment
from binlatent.runtime.devices import parallel_on
from binlatent.runtime.errors import UserError

log = logging.getLogger("binlatent.benchmark")


def device_to_compile_for(topology: str | None) -> Any:
    """Returns JAX's first device, or a device of a TPU topology that need not be present."""
    if not topology:
        return jax.devices()[0]
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices[0]
    except Exception as error:  # the runtime raises several types
        raise UserError(
            f"Cannot compile for {topology!r} ({str(error).splitlines()[0]}): give a topology such "
            "as v5p:2x2x1, and `pip install libtpu` in the version that this JAX needs."
        ) from error


def train_step_memory(spec: AutoencoderSpec, batch_size: int, device: Any) -> Row:
    """Returns the memory of the autoencoder's training step on one device, in bytes.

    `arguments`: state, images and frozen weights. `temporary`: what the step needs in addition.
    `total`: the sum, because the new state replaces the old one. `flops`: as the compiler counts
    them, None if it does not.
    """
    step = parallel_on(device, spec.step(spec.networks))
    state = jax.eval_shape(functools.partial(spec.init_state, 0))
    image = jax.ShapeDtypeStruct((batch_size, *spec.image_shape), jnp.float32)
    frozen = workloads.lpips_shapes(spec.networks)
    return _memory(step, device, state, {"image": image}, frozen, times=spec.train.accumulate)


def decode_memory(spec: AutoencoderSpec, batch_size: int, device: Any) -> Row:
    """Returns the memory of decoding, in bytes; arguments and result as in `train_step_memory`."""
    params = jax.eval_shape(spec.init, jax.random.key(0))
    code = jax.ShapeDtypeStruct((batch_size, *spec.code_shape), jnp.float32)
    decode = jax.jit(functools.partial(spec.networks.autoencoder.apply, method="decode"))
    return _memory(decode, device, params, code)


def _memory(function: Any, device: Any, *arguments: Any, times: int = 1) -> Row:
    """Returns the row; `times` is the number of iterations of the program's main loop."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    on_device = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    arguments = jax.tree.map(lambda x: on_device(x.shape, x.dtype), arguments)
    program = workloads.compile_program(function, *arguments)
    given = program.compiled.memory_analysis().argument_size_in_bytes
    return {
        "arguments": given,
        "temporary": program.memory - given,
        "total": program.memory,
        "flops": workloads.counted_flops((times, program)),
    }


def measure_memory(experiment: Experiment, batch_sizes: list[int], device: Any) -> Iterator[Row]:
    """Yields a row for the training step, and one for the decoder, at each batch size."""
    spec = experiment.autoencoder
    levels = spec.networks.autoencoder.encoder.levels
    for batch_size in batch_sizes:
        for what, function in (("train", train_step_memory), ("decode", decode_memory)):
            log.info("Compiling %s at batch size %d", what, batch_size)
            yield {
                "what": what,
                "image_size": spec.image_shape[0],
                "batch_size": batch_size,
                "dtype": jnp.dtype(levels.dtype).name,
                "remat": levels.remat,
                **function(spec, batch_size, device),
                **rows.place(device),
            }


COLUMNS: rows.Columns = {
    "program": lambda row: row["what"],
    "image": lambda row: row["image_size"],
    "batch": lambda row: row["batch_size"],
    "compute": lambda row: row["dtype"],
    "remat": lambda row: "yes" if row["remat"] else "no",
    "arguments": lambda row: f"{row['arguments'] / 2**30:.3g} GiB",
    "temporary": lambda row: f"{row['temporary'] / 2**30:.3g} GiB",
    "total": lambda row: f"{row['total'] / 2**30:.3g} GiB",
    "TFLOP": lambda row: or_dash(row["flops"], lambda flops: f"{flops / 1e12:.3g}"),
}
