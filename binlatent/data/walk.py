"""Finds the images below a folder; the result of a long walk is kept in that folder."""

import collections
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from binlatent.data.classes import warn_once
from binlatent.data.images import FORMATS
from binlatent.runtime.errors import UserError
from binlatent.runtime.strict_json import write_json

log = logging.getLogger(__name__)

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".apng", ".j2k", ".j2c", ".jpx", ".jpf"),
    *((".avif",) if "AVIF" in FORMATS else ()),  # depends on Pillow's version
)
# Images that are not read here.
_OTHER_EXTENSIONS = (
    *(() if "AVIF" in FORMATS else (".avif",)),
    *(".heic", ".heif", ".jxl", ".svg", ".psd", ".tga", ".ico", ".eps", ".exr", ".hdr"),
    *(".hif", ".heics", ".avifs", ".dds", ".qoi", ".pcx", ".jxr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"),
)

_NO_ENDING = ""  # counts files without an ending

# Folders made by archivers, file systems and network drives.
_JUNK = ("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information")

# A walk that finds at least this many files is kept in the folder.
_KEPT_FILES = 1_000
_KEPT_NAME = ".binlatent_index.json"


def find_images(root: str, keep: bool = False) -> list[str]:
    """Returns all images below a folder, sorted; with `keep`, a long walk is saved there."""
    kept = _kept(root) if keep else None
    if kept is None:
        files, changed, others = _walk(root)
        if keep:
            _keep(root, files, changed, others)
    else:
        files, others = kept
    without = others.pop(_NO_ENDING, 0)  # such files are often not images
    if without and not files:
        others["files without an ending"] = without
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    if not files:
        found = f"; found {counts}: convert them to PNG or JPEG" if others else ""
        looked = ", ".join(EXTENSIONS)
        raise UserError(f"there are no images in {root!r} (looked for {looked}{found})")
    if others:
        warn_once(f"In {root}, {counts} are left out: convert them to PNG or JPEG to use them")
    return sorted(os.path.join(root, file) for file in files)


def is_hidden(name: str) -> bool:
    """Returns whether a name is skipped: it starts with a dot, or is a system folder's."""
    return name.startswith(".") or name.casefold() in _JUNK


def has_images(root: str) -> bool:
    """Returns whether there is any image below a folder."""
    return bool(_walk(root)[0])


def _walk(root: str) -> tuple[list[str], dict[str, int], dict[str, int]]:
    """Walks a folder, following links.

    Returns:
      The images, relative to root; the time in ns of each folder's last change; the number of
      images of each kind that is not read.
    """
    found, changed, others, seen = [], {}, collections.Counter(), set()

    def left_out(error: OSError) -> None:
        changed["."] = time.time_ns()  # keeps `_keep` from saving this walk
        log.warning("The images in %s are left out: %s", error.filename, error.strerror)

    for directory, subfolders, names in os.walk(root, onerror=left_out, followlinks=True):
        # Sorted, so that of two links to one folder always the same one is used.
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        try:
            relative, status = os.path.relpath(directory, root), os.stat(directory)
        except OSError as error:  # it was deleted meanwhile
            left_out(error)
            subfolders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:  # a link to a parent, or a second link
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        changed.setdefault(relative, status.st_mtime_ns)
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                found.append(os.path.normpath(os.path.join(relative, name)))
            elif name.lower().endswith(_OTHER_EXTENSIONS) and not name.startswith("."):
                others[os.path.splitext(name)[1].lower()] += 1
            elif not os.path.splitext(name)[1] and not name.startswith("."):
                others[_NO_ENDING] += 1
    return found, changed, dict(others)


def _keep(root: str, found: list[str], changed: dict[str, int], others: dict[str, int]) -> None:
    """Saves a long walk in the folder, if the folder is writable."""
    # A folder changed within the clock's resolution may change again at the same time stamp.
    if len(found) < _KEPT_FILES or time.time_ns() - max(changed.values()) < 2_000_000_000:
        return
    with suppress(OSError):
        content = {"files": found, "changed": changed, "others": others}
        write_json(Path(root, _KEPT_NAME), content, indent=None)
        # Writing the file changed the folder's time.
        os.utime(root, ns=(changed["."], changed["."]))


def _kept(root: str) -> tuple[list[str], dict[str, int]] | None:
    """Returns images and counts of a saved walk, or None if there is none or it is outdated."""
    path = Path(root, _KEPT_NAME)
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
        now = {name: os.stat(os.path.join(root, name)).st_mtime_ns for name in kept["changed"]}
        files = kept["files"] if now == kept["changed"] and now else None
        others = {
            kind: int(kept["others"][kind])
            for kind in kept["others"].keys() & set(_OTHER_EXTENSIONS)
        }
    except Exception:  # the file is damaged; walk again
        return None

    # The file may come from another person: accept only paths that a walk could find.
    def could_be_found(file: Any) -> bool:
        inside = isinstance(file, str) and not os.path.isabs(file) and ".." not in Path(file).parts
        return inside and file.lower().endswith(EXTENSIONS)

    whole = isinstance(files, list) and all(map(could_be_found, files))
    return (files, others) if whole else None
