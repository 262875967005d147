"""Measures how fast the compiled programs run, relative to the peak of the device.

A program runs on all devices that JAX sees; batch sizes are per device.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from binlatent.benchmark import rows, workloads
from binlatent.benchmark.rows import Row, or_dash, show_range, significant
from binlatent.experiment import Experiment

# Dense FLOP/s by JAX's `device_kind`, from data sheets: bfloat16; float32 at JAX's default
# precision (TF32 on GPUs, bfloat16 on TPUs); exact float32, None if the device has none.
_PEAKS = {
    "NVIDIA H100 80GB HBM3": (989e12, 494.7e12, 66.9e12),  # SXM
    "NVIDIA H200": (989e12, 494.7e12, 66.9e12),
    "NVIDIA H100 PCIe": (756e12, 378e12, 51e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 156e12, 19.5e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 156e12, 19.5e12),
    "NVIDIA A100-PCIE-40GB": (312e12, 156e12, 19.5e12),
    "NVIDIA A100 80GB PCIe": (312e12, 156e12, 19.5e12),
    "NVIDIA GeForce RTX 3090": (71e12, 35.6e12, 35.6e12),  # the paper's
    "TPU v4": (275e12, 275e12, None),
    "TPU v5 lite": (197e12, 197e12, None),  # v5e
    "TPU v5": (459e12, 459e12, None),  # v5p
    "TPU v5p": (459e12, 459e12, None),
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of a device, None for an unknown one.

    For "float32", `jax_default_matmul_precision` selects the precision.
    """
    bfloat16, default, exact = _PEAKS.get(device_kind, (None, None, None))
    if dtype == "bfloat16":
        return bfloat16
    wants_all = jax.config.jax_default_matmul_precision in ("highest", "float32")
    return exact if wants_all else default


def seconds_a_call(call: Callable[[], Any], repeats: int) -> list[float]:
    """Returns the seconds of a call, one number per repeat.

    Two calls for warm-up are not counted. A repeat has as many calls as fit into a tenth of a
    second, 1 to 30, and waits for the last.
    """
    jax.block_until_ready(call())

    def mean(num):
        start = time.perf_counter()
        for _ in range(num):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / num

    # With more than 32 queued calls, JAX's fake devices can deadlock.
    num = min(max(round(0.1 / mean(1)), 1), 30)
    return [mean(num) for _ in range(repeats)]


def _peak_bytes() -> int | None:
    """Returns the peak memory of the first device so far, if JAX knows it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def subject(name: str, experiment: Experiment, batch_size: int) -> Row:
    """Returns the part of a row that describes what is measured, and where; see `measure_speed`."""
    content = json.dumps(experiment.without_paths, sort_keys=True)
    settings = experiment.sample.settings if name == "sample" else None
    return {
        "program": name,
        "size": workloads.describe_size(name, experiment),
        "batch_size": batch_size,
        "steps": getattr(settings, "steps", None),
        "guidance": getattr(settings, "guidance", None),
        "dtype": jnp.dtype(experiment.dtype).name,
        "config": hashlib.sha256(content.encode()).hexdigest()[:8],
        **rows.place(jax.devices()[0], jax.local_device_count()),
    }


def caption(name: str, experiment: Experiment, batch_size: int) -> str:
    """Returns a description of what `measure_speed` measures."""
    about = subject(name, experiment, batch_size)
    steps = f", {about['steps']} steps" if about["steps"] else ""
    return f"{name} of {about['size']} at batch size {batch_size}{steps}"


def measure_speed(
    name: str,
    experiment: Experiment,
    batch_size: int,  # on each device
    *,
    repeats: int = 10,
    peak: float | None = None,  # FLOP/s of the device, in place of the data sheet's
) -> Row:
    """Returns the speed of one of `workloads.PROGRAMS`, and what it depends on.

    The experiment must pass `workloads.check_measurable`.

    Returns:
      The entries of `subject`, and among others:
      `seconds`, `seconds_min`, `seconds_max`: of a step or a batch; median and range over repeats.
      `compile_seconds`: of tracing and compiling.
      `flops`: of one device, by `benchmark.flops`. `xla_flops`: as XLA counts them in the compiled
        program, None if it cannot.
      `mfu`: `flops` per second relative to `peak_flops`; None without a peak.
      `memory_bytes`: peak of the device or, if that is unknown or of an earlier row, the memory
        that the program requests; None if both are unknown. `memory_from` names the source.
    """
    device, devices = jax.devices()[0], jax.local_device_count()
    about = subject(name, experiment, batch_size)
    peak = peak or peak_flops(device.device_kind, about["dtype"])
    peak_bytes = _peak_bytes()
    work = workloads.PROGRAMS[name](experiment, batch_size * devices, batch_size)
    times = seconds_a_call(work.call, repeats)
    seconds = statistics.median(times)
    asked = [program.memory for program in work.programs]
    memory, memory_from = None if None in asked else max(asked), "compiler"
    if peak_bytes is not None and _peak_bytes() > peak_bytes:
        memory, memory_from = _peak_bytes(), "device"
    return about | {
        "seconds": seconds,
        "seconds_min": min(times),
        "seconds_max": max(times),
        "repeats": repeats,
        "images_per_second": batch_size * devices / seconds,
        "flops": work.flops,
        "xla_flops": work.xla_flops,
        "flops_per_second": work.flops / seconds,
        "peak_flops": peak,
        "mfu": work.flops / seconds / peak if peak else None,
        "memory_bytes": memory,
        "memory_from": memory_from,
        "compile_seconds": sum(program.seconds for program in work.programs),
    }


COLUMNS: rows.Columns = {
    "program": lambda row: row["program"],
    "size": lambda row: row["size"],
    "batch": lambda row: row["batch_size"],
    "steps": lambda row: or_dash(row["steps"]),
    "guidance": lambda row: or_dash(row["guidance"], lambda w: f"{w:g}"),
    "compute": lambda row: row["dtype"],
    "ms (least to most)": lambda row: show_range(row, "seconds", lambda s: significant(1e3 * s)),
    "images/s": lambda row: significant(row["images_per_second"]),
    "TFLOP": lambda row: significant(row["flops"] / 1e12),
    "XLA's": lambda row: or_dash(row["xla_flops"], lambda flops: significant(flops / 1e12)),
    "TFLOP/s": lambda row: significant(row["flops_per_second"] / 1e12),
    "of peak": lambda row: or_dash(row["mfu"], lambda share: f"{share:.1%}"),
    "memory": lambda row: or_dash(row["memory_bytes"], lambda x: f"{significant(x / 2**30)} GiB"),
    "compiled in": lambda row: f"{row['compile_seconds']:.1f} s",
}
