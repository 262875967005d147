"""How fast the compiled programs run, beside what the device could do.

A program runs on all devices that JAX sees; a batch is that of one of them.
"""

import functools
import hashlib
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from binlatent.benchmark import workloads
from binlatent.runtime import machine

# Dense FLOP/s by JAX's `device_kind`: of bfloat16; of float32 as JAX multiplies it there unless
# told otherwise, in TF32 on GPUs and in bfloat16 on TPUs; of float32 proper, None where the device
# has none. From the makers' data sheets.
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
    """Returns the FLOP/s that a known device can reach at most, None for an unknown one.

    Args:
      device_kind: as JAX calls it.
      dtype: "bfloat16" or "float32", of which `jax_default_matmul_precision` says how exact.
    """
    bfloat16, default, exact = _PEAKS.get(device_kind, (None, None, None))
    if dtype == "bfloat16":
        return bfloat16
    wants_all = jax.config.jax_default_matmul_precision in ("highest", "float32")
    return exact if wants_all else default


def device_name(device: Any) -> str:
    """Returns what a device of JAX's is called; of a CPU also which, and its cores for us."""
    return cpu_name() if device.platform == "cpu" else device.device_kind


def cpu_name() -> str:
    """Returns what the processor is called, and its cores for us."""
    return f"cpu ({machine.processor()}, {machine.cores()} cores)"


@functools.cache
def driver() -> str | None:
    """Returns the version of the NVIDIA driver, None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return result.stdout.split("\n")[0].strip() or None


def seconds_a_call(call: Callable[[], Any], repeats: int) -> list[float]:
    """Returns how long a call takes, one number a repeat.

    Two calls come before, which do not count. A repeat is of as many calls as fit into a tenth of
    a second, 1 to 30, and waits for the last.
    """
    jax.block_until_ready(call())

    def mean(num):
        start = time.perf_counter()
        for _ in range(num):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / num

    # JAX's fake devices can wait for one another for ever where more than 32 calls are queued.
    num = min(max(round(0.1 / mean(1)), 1), 30)
    return [mean(num) for _ in range(repeats)]


def _peak_bytes() -> int | None:
    """Returns the most that the first device's memory has held so far, if JAX knows it."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def subject(name: str, config: ml_collections.ConfigDict, batch_size: int) -> dict[str, Any]:
    """Returns the part of a row that says what is measured, and on what; see `measure`."""
    content = json.dumps(config.to_dict(), sort_keys=True)
    return {
        "program": name,
        "size": workloads.size(name, config),
        "batch_size": batch_size,
        "steps": config.sample.steps if name == "sample" else None,
        "guidance": config.sample.guidance if name == "sample" else None,
        "dtype": config.dtype,
        "config": hashlib.sha256(content.encode()).hexdigest()[:8],
        "device": device_name(jax.devices()[0]),
        "devices": jax.local_device_count(),
        "jax": jax.__version__,
        "driver": driver(),
    }


def title(name: str, config: ml_collections.ConfigDict, batch_size: int) -> str:
    """Returns what `measure` measures, for people."""
    steps = f", {config.sample.steps} steps" if name == "sample" else ""
    return f"{name} of {workloads.size(name, config)} at batch size {batch_size}{steps}"


def measure(
    name: str,
    config: ml_collections.ConfigDict,
    batch_size: int,
    *,
    repeats: int = 10,
    peak: float | None = None,
) -> dict[str, Any]:
    """Returns how fast a program runs, and what it depends on.

    Args:
      name: of `workloads.PROGRAMS`.
      config: of the whole run, that `workloads.check` lets pass; for `sample` it also says steps,
        guidance and the like.
      batch_size: images on each device.
      repeats: of the measurement.
      peak: FLOP/s that the device can reach, in place of what is known of it.

    Returns:
      What `subject` does, and among others: `seconds`, the median of the repeats, `seconds_min` and
      `seconds_max`, of a step or a batch; `compile_seconds`, of tracing and compiling; `flops` of
      one device by `binlatent.flops`, `xla_flops` as XLA counts them in the compiled program, None
      where it cannot; `mfu`, of `flops`, None if there is no `peak_flops`; `memory_bytes`, of the
      device, or if its peak is of an earlier row or not known, as asked for by the program, None
      if neither tells (`memory_from`).

    Raises:
      UserError: for a number of sampling steps that cannot be.
    """
    device, devices = jax.devices()[0], jax.local_device_count()
    peak = peak or peak_flops(device.device_kind, config.dtype)
    peak_bytes = _peak_bytes()
    work = workloads.PROGRAMS[name](config, batch_size * devices, batch_size)
    times = seconds_a_call(work.call, repeats)
    seconds = statistics.median(times)
    asked = [program.memory for program in work.programs]
    memory, memory_from = None if None in asked else max(asked), "compiler"
    if peak_bytes is not None and _peak_bytes() > peak_bytes:
        memory, memory_from = _peak_bytes(), "device"
    return {
        **subject(name, config, batch_size),
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


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of `measure` in Markdown, and below them what they were measured on."""
    names = ("program", "size", "batch", "steps", "guidance", "compute", "ms (least to most)")
    names += ("images/s", "TFLOP", "XLA's", "TFLOP/s", "of peak", "memory", "compiled in")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        least, median, most = (1e3 * row[f"seconds{end}"] for end in ("_min", "", "_max"))
        cells = [
            row["program"],
            row["size"],
            row["batch_size"],
            "-" if row["steps"] is None else row["steps"],
            "-" if row["guidance"] is None else f"{row['guidance']:g}",
            row["dtype"],
            f"{_number(median)} ({_number(least)} to {_number(most)})",
            _number(row["images_per_second"]),
            _number(row["flops"] / 1e12),
            "-" if row["xla_flops"] is None else _number(row["xla_flops"] / 1e12),
            _number(row["flops_per_second"] / 1e12),
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "-" if row["memory_bytes"] is None else f"{_number(row['memory_bytes'] / 2**30)} GiB",
            f"{row['compile_seconds']:.1f} s",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, *measured_on(rows)]) + "\n"


def measured_on(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the lines below a table: the `devices`, `device`, `jax` and `driver` of its rows."""
    places = {(row["devices"], row["device"], row["jax"], row["driver"]) for row in rows}
    lines = []
    for devices, device, version, driver in sorted(places, key=str):
        driver = f", driver {driver}" if driver else ""
        lines.append(f"\n{devices} x {device}, JAX {version}{driver}")
    return lines


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"
