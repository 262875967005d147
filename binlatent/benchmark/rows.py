"""The common parts of rows of the benchmark: where they were measured, and Markdown tables."""

import functools
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import jax

from binlatent.runtime import machine

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], Any]]  # name of a column -> text of its cell


def place(device: Any = None, devices: int = 1) -> Row:
    """Returns where a row is measured; without a device, JAX's devices are not touched."""
    platform = "cpu" if device is None else device.platform
    cpu = f"cpu ({machine.processor()}, {machine.cores()} cores)"
    return {
        "device": cpu if platform == "cpu" else device.device_kind,
        "devices": devices,
        "jax": jax.__version__,
        "driver": _driver() if platform == "gpu" else None,
    }


@functools.cache
def _driver() -> str | None:
    """Returns the version of the NVIDIA driver, or None."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return result.stdout.split("\n")[0].strip() or None


def table_head(columns: Columns, row: Row) -> str:
    """Returns the lines before a table's first row: where it was measured, and column names."""
    driver = f", driver {row['driver']}" if row["driver"] else ""
    where = f"{row['devices']} x {row['device']}, JAX {row['jax']}{driver}"
    return f"{where}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_line(columns: Columns, row: Row) -> str:
    """Returns a row of the table."""
    return f"| {' | '.join(str(cell(row)) for cell in columns.values())} |"


def or_dash(value: Any, shown: Callable[[Any], str] = str) -> str:
    """Returns a formatted number, "-" for None."""
    return "-" if value is None else shown(value)


def show_range(row: Row, name: str, shown: Callable[[float], str]) -> str:
    """Returns a median with minimum and maximum, from the names that end in `_min` and `_max`."""
    return f"{shown(row[name])} ({shown(row[f'{name}_min'])} to {shown(row[f'{name}_max'])})"


def significant(x: float) -> str:
    """Returns a number with four significant digits, or all digits before the point."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"
