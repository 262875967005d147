"""The names of classes and splits in folders and tables."""

import functools
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence

from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

# Compared in any case. If a dataset has several of them, the first one is used.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "dev", "eval")


def clean(name: str) -> str:
    """Strips a name and normalises it to Unicode NFC."""
    return unicodedata.normalize("NFC", name).strip()


def split_of(name: str) -> str:
    """Returns the split that a name means: "train", "test", or "" for other names."""
    name = clean(name).casefold()
    return "train" if name in TRAIN_NAMES else "test" if name in TEST_NAMES else ""


_LIKE_SPLITS = re.compile(
    r"(?:(train(?:ing)?|trn)|test(?:ing)?|tst|val(?:id(?:ation)?)?|dev|eval(?:uation)?|holdout)"
    r"(?:[^a-z]|set|data|images?|$)"
)


def like_split(name: str) -> str:
    """Returns as `split_of` the split that a name such as "train2017" or "Test Set" may mean."""
    match = _LIKE_SPLITS.match(clean(name).casefold())
    return "" if match is None else "train" if match[1] else "test"


def are_numbers(names: Sequence[str]) -> bool:
    """Returns whether there are names and all of them are whole numbers."""
    return bool(names) and all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the class names in natural order (a2 before a10): their index is the label."""
    names, looks = sorted(set(names)), {}
    for name in names:
        looks.setdefault(_look(name), []).append(name)
    if alike := [some for some in looks.values() if len(some) > 1]:
        warn_once(f"These names look alike, but are different classes: {alike[0]}")
    ordered = tuple(sorted(names, key=int if are_numbers(names) else _natural))
    if missing := gaps(ordered):
        warn_once(f"No image has the label {', '.join(map(str, missing))}: there is no such class")
    return ordered


def _look(name: str) -> str:
    """Returns a name without case, spaces, leading zeros and invisible characters."""
    name = unicodedata.normalize("NFKC", name).casefold()
    visible = (x for x in name if not x.isspace() and unicodedata.category(x) != "Cf")
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", "".join(visible))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Returns a sort key: digits compare as numbers and come before other characters."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    digits = [part.lstrip("0") if part[0] in "0123456789" else None for part in parts]
    return [
        (True, 0, part) if number is None else (False, len(number), number)
        for part, number in zip(parts, digits, strict=True)
    ]


def gaps(names: Sequence[str]) -> list[int]:
    """Returns at most ten whole numbers that are missing between numeric class names."""
    if not are_numbers(names):
        return []
    numbers, missing = sorted(map(int, names)), []
    for before, after in zip(numbers, numbers[1:], strict=False):
        missing += range(before + 1, min(after, before + 11))
    return missing[:10]


def numbered(names: Sequence[str]) -> str:
    """Returns a text with the numbers and names of the first eight classes and the last one."""
    shown = [f"{number} {name!r}" for number, name in enumerate(names)]
    return ", ".join(shown if len(shown) < 11 else [*shown[:8], "...", shown[-1]])


def check_same_classes(here: Sequence[str], there: Sequence[str], what: str) -> None:
    """Raises UserError if two lists of classes differ; () means unknown and passes.

    Args:
      here: the class names of the images, in order of their labels.
      there: those that `what` was trained with.
      what: the name of a model, for the error message.
    """
    if not here or not there or tuple(here) == tuple(there):
        return
    pairs = enumerate(zip(here, there, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(here), len(there)))
    raise UserError(
        f"The {what} was trained with {len(there)} classes, {numbered(there)}, but the images have "
        f"{len(here)}, {numbered(here)}; they differ from number {first} on. Use the images and "
        "class names that it was trained with, or another --workdir."
    )


@functools.cache
def warn_once(text: str) -> None:
    """Logs a warning about the data, once per process."""
    log.warning("%s", text)
