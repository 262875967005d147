"""Strictly valid JSON; the package writes all its JSON files with this module."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from binlatent.runtime.files import atomic


def finite(content: Any) -> Any:
    """Returns a copy with None for NaN and infinities, which JSON cannot write.

    NumPy scalars and arrays become plain numbers and lists.
    """
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, np.ndarray | np.generic):
        return finite(content.tolist())
    if isinstance(content, list | tuple):
        return list(map(finite, content))
    return None if isinstance(content, float) and not math.isfinite(content) else content


def not_finite(content: Any, name: str = "") -> Iterator[str]:
    """Yields the keys of NaN and infinities, as "section.key"; places in lists are left out."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from not_finite(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple):
        for value in content:
            yield from not_finite(value, name)
    elif isinstance(content, float) and not math.isfinite(content):
        yield name


def to_json(content: Any, indent: int | None = None) -> str:
    """Returns JSON text, with null for NaN and infinities."""
    return json.dumps(finite(content), indent=indent, allow_nan=False)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Writes a JSON file atomically, with null for NaN and infinities."""
    with atomic(path) as unfinished:
        unfinished.write_text(to_json(content, indent) + "\n")
