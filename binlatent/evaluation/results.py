"""Results: metrics and the protocol that they were measured by, for a terminal and as JSON."""

import json
import math
from pathlib import Path
from typing import Any

import jax

from binlatent.evaluation.metrics.table import Table, title
from binlatent.runtime.files import atomic


def table(metrics: dict[str, float], *tables: Table) -> str:
    """Returns metrics by their titles in tables, deviations beside means, for a terminal."""
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON, all of it or nothing; null for numbers that are not finite."""
    with atomic(path) as unfinished:
        unfinished.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
