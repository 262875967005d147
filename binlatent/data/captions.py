"""Reads the captions of images: from text files beside them, or from a table."""

import json
import os
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from binlatent.data import classes
from binlatent.runtime.errors import UserError


def beside(images: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the captions of each image file: for `x.png`, the non-blank lines of `x.txt`.

    The files are UTF-8, with or without a byte order mark. A file that cannot be read counts as
    missing, with a warning.
    """
    captions, unreadable = [], []
    for image in images:
        file = os.path.splitext(image)[0] + ".txt"
        lines = ()
        if os.path.isfile(file):  # reading from a pipe would block
            try:
                lines = _lines(file)
            except (OSError, ValueError):
                unreadable.append(file)
        captions.append(lines)
    if unreadable:
        shown = ", ".join(map(repr, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        classes.warn_once(
            f"{len(unreadable)} caption files cannot be read and count as missing: {shown}. "
            "They must be UTF-8 text"
        )
    return captions


def _lines(file: str) -> tuple[str, ...]:
    with open(file, "rb") as opened:
        text = opened.read().decode("utf-8-sig")
    if "\0" in text:  # UTF-16 without a byte order mark may be valid UTF-8
        raise ValueError("not text")
    return _given(re.split(r"[\r\n]", text))


def is_caption(column: Any) -> bool:
    """Returns whether a table's column holds captions, by its name in any case."""
    return isinstance(column, str) and classes.clean(column).casefold().startswith("caption")


def of_cells(cells: Sequence[tuple[Any, Any]], where: str, json_lists: bool) -> tuple[str, ...]:
    """Returns the captions in a line of a table.

    Args:
      cells: (column, value) of the columns for which `is_caption` is true. A value is a text or a
        list of texts. The column None holds the cells beyond the header's last column.
      where: names the line in error messages.
      json_lists: whether a value may be a list written as JSON, as in CSV.
    """
    captions = []
    for column, value in cells:
        if column is None:
            raise UserError(
                f"{where} has more cells than the header: put double quotes around captions that "
                "contain a comma"
            )
        found = value
        if json_lists and re.match(r"\s*\[\s*[\"\]]", value):
            try:
                found = json.loads(value)
            except (ValueError, RecursionError):
                found = None  # refused below
        elif value is None:
            found = []
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(map(_is_text, found)):
            raise UserError(
                f"{where} has in the column {column!r} the value {reprlib.repr(value)}, which is "
                "neither a text nor a list of texts: columns whose names start with 'caption' must "
                "hold captions"
            )
        captions += found
    return _given(captions)


def _is_text(value: Any) -> bool:
    """Returns whether a value is a string without lone surrogates, which JSON can contain."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _given(captions: Sequence[str]) -> tuple[str, ...]:
    """Returns the captions that are not blank, each joined to one line."""
    joined = (" ".join(caption.split()) for caption in captions)
    return tuple(caption for caption in joined if caption)
