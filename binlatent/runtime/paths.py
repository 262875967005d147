"""Paths as users give them, on the command line and in configs."""

import os
import re

from binlatent.runtime.errors import UserError


def is_address(path: str) -> bool:
    """Tells whether a path is an address: gs://bucket/x, or gs:/bucket/x, as pathlib has it."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path) is not None


def expand(path: str, name: str = "") -> str:
    """Returns a path with the home folder for `~`; refuses addresses. `name` is for messages."""
    start = f"{name}: " if name else ""
    if not path:
        raise UserError(f"{start}the path is empty")
    if is_address(path):
        raise UserError(
            f"{start}{path} is no path on this machine: copy or mount what is there, and give the "
            "path of that"
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"{start}there is no home folder {path}: write ./{path} for a file or folder so named"
        )
    return expanded
