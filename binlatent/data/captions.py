"""The captions of images: in text files beside them, or in a table."""

import json
import os
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from binlatent.data import classes
from binlatent.runtime.errors import UserError


def beside(images: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the captions of image files: of `x.png`, the lines of `x.txt` that are not blank.

    The files are UTF-8, with or without a byte order mark. One that cannot be read counts as
    missing; a warning names it.
    """
    captions, unreadable = [], []
    for image in images:
        file = os.path.splitext(image)[0] + ".txt"
        lines = ()
        if os.path.isfile(file):  # reading from a pipe would not end
            try:
                lines = _lines(file)
            except (OSError, ValueError):
                unreadable.append(file)
        captions.append(lines)
    if unreadable:
        shown = ", ".join(map(repr, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        classes.warn_once(
            f"{len(unreadable)} files of captions cannot be read, and count as missing: {shown}. "
            "They must be text in UTF-8"
        )
    return captions


def _lines(file: str) -> tuple[str, ...]:
    with open(file, "rb") as opened:
        text = opened.read().decode("utf-8-sig")
    if "\0" in text:  # UTF-16 without a byte order mark may be valid UTF-8
        raise ValueError("not text")
    return _given(re.split(r"[\r\n]", text))


def is_caption(column: Any) -> bool:
    """Tells whether a table's column, by its name in any case, holds captions."""
    return isinstance(column, str) and classes.clean(column).casefold().startswith("caption")


def of_cells(cells: Sequence[tuple[Any, Any]], where: str, json_lists: bool) -> tuple[str, ...]:
    """Returns the captions in a line of a table.

    Args:
      cells: (column, value) of columns that `is_caption` knows; the column None has what is left of
        a line with more cells than the header. A value is a text or a list of texts.
      where: the line, for messages.
      json_lists: whether a list is written as JSON, as in CSV.
    """
    captions = []
    for column, value in cells:
        if column is None:
            raise UserError(
                f"{where} has more cells than the header: put captions with a comma in double "
                "quotes"
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
                "no text and no list of texts: columns whose names start with 'caption' must hold "
                "captions"
            )
        captions += found
    return _given(captions)


def _is_text(value: Any) -> bool:
    """Tells whether a value is a string without halves of characters, which JSON can spell."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _given(captions: Sequence[str]) -> tuple[str, ...]:
    """Returns captions on one line each, without those that are blank."""
    joined = (" ".join(caption.split()) for caption in captions)
    return tuple(caption for caption in joined if caption)
