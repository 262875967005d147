"""Formats metrics, and the protocol of their measurement, for a terminal."""

from typing import Any

import jax

from binlatent.evaluation.metrics.table import Table, title


def table(metrics: dict[str, float], *tables: Table) -> str:
    """Returns metrics as lines for a terminal: titles from the tables, means ± deviations."""
    lines = []
    for name, value in metrics.items():
        if not name.endswith("_std"):
            std = metrics.get(f"{name}_std")
            shown = f"{value:.6g}" + ("" if std is None else f" ± {std:.3g}")
            lines.append((title(name, *tables), shown))
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def describe(protocol: dict[str, Any]) -> str:
    """Returns a protocol as lines for a terminal."""
    lines = []
    for name, value in protocol.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Returns the devices and the version of JAX, for a protocol."""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"device": device, "jax": jax.__version__}
