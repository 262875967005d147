"""Paths as users give them, on the command line and in configs."""

import os
import re

from binlatent.runtime.errors import UserError


def is_address(path: str) -> bool:
    """Returns whether a path is a URL: gs://bucket/x, or gs:/bucket/x, as pathlib writes it."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path) is not None


def expand(path: str, name: str = "") -> str:
    """Replaces `~` by the home folder; rejects URLs. `name` begins the error messages."""
    start = f"{name}: " if name else ""
    if not path:
        raise UserError(f"{start}the path is empty")
    if is_address(path):
        raise UserError(
            f"{start}{path} is not a local path: copy or mount the files on this machine, and give "
            "that path"
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"{start}there is no home folder {path}: write ./{path} for a file of that name"
        )
    return expanded
