"""What this machine offers."""

import os
import platform
from pathlib import Path

# Of XLA's two sets of kernels for CPUs, YNNPACK's for products of matrices, which take transposed
# ones as they are, and Eigen's or XLA's own for all else (docs/performance.md has the numbers).
CPU_KERNELS = "xla_cpu_experimental_ynn_fusion_type"
YNN_PRODUCTS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS knows no affinity


def processor() -> str:
    """Returns what the processor is called; its architecture where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux'
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def multiplies_by_ynnpack() -> bool:
    """Tells whether XLA was told to multiply by YNNPACK on CPUs, as `command.prepare_jax` does."""
    return f"--{CPU_KERNELS}={YNN_PRODUCTS}" in os.environ.get("XLA_FLAGS", "")
