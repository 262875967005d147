"""What this machine offers."""

import os
import platform
from pathlib import Path

# The flag by which XLA leaves work on CPUs to YNNPACK, in place of its own kernels and Eigen's, and
# what it is to leave: products of two matrices, of which YNNPACK takes a transposed second one as
# it is (docs/performance_tried.md has the numbers).
YNN_FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
YNN_PRODUCTS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS knows no affinity


def _cpuinfo(name: str) -> str:
    """Returns what Linux says of the first core, "" where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def processor() -> str:
    """Returns what the processor is called; its architecture where the system does not say."""
    return _cpuinfo("model name") or platform.machine()


def has_amx() -> bool:
    """Tells whether the processor has Intel's AMX; False where the system does not say."""
    return "amx_tile" in _cpuinfo("flags").split()


def multiplies_by_ynnpack() -> bool:
    """Tells whether XLA_FLAGS has what `command.prepare_jax` puts there."""
    return f"--{YNN_FUSIONS}={YNN_PRODUCTS}" in os.environ.get("XLA_FLAGS", "").split()
