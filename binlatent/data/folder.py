"""A folder of images, with their classes, texts and split: by a walk, or by a table."""

import csv
import dataclasses
import json
import logging
import os
import reprlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from binlatent.data.images import EncodedImages
from binlatent.runtime.errors import UserError
from binlatent.runtime.files import atomic

log = logging.getLogger(__name__)

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
_TEST_NAMES = ("test", "val", "validation")

# A walk of so many files or more is kept in the folder; shorter ones take no time.
_KEPT_FILES = 1_000
_KEPT_NAME = ".binlatent_index.json"


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of one split."""

    files: list[str]
    labels: list[int]  # one a file; 0 where there are no classes
    texts: list[str]  # one a file: where the features of its text should be
    num_classes: int  # 0: unlabelled


class _Image(NamedTuple):
    name: str  # of the class, "" for none
    file: str
    text: str = ""  # file of features; "" for the image's own name with .npy


def open_images(path: str, split: str, table: str = "", texts: bool = False) -> EncodedImages:
    """Opens what `list_images` lists; with `texts`, the labels are the features of texts."""
    listing = list_images(path, split, table)
    root = len(os.path.join(os.path.expanduser(path), ""))
    rows = zip(listing.files, listing.labels, listing.texts, strict=True)
    names = "\n".join(f"{file[root:]} {label} {text[root:]}" for file, label, text in rows)
    shape = _read_features(listing.texts[0]).shape if texts else ()

    def read(index: int) -> tuple[str, str, int | np.ndarray]:
        file, label, text = listing.files[index], listing.labels[index], listing.texts[index]
        if texts:
            label = _read_features(text)
            if label.shape != shape:
                raise UserError(
                    f"the features in {text!r} have the shape {label.shape}, those of the first "
                    f"image {shape}: bring all to one"
                )
        return file, repr(file), label

    num_classes = 0 if texts else listing.num_classes
    return EncodedImages(len(listing.files), num_classes, read, names, listing.files)


def _read_features(file: str) -> np.ndarray:
    """Returns the features of a text, float32, (e,) or (m, e)."""
    try:
        features = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(
            f"data.texts needs the features of each image's text: there is no {file!r}"
        ) from error
    except Exception as error:  # by where the damage is
        raise UserError(f"{file!r} is no .npy file of numbers: {error}") from error
    numbers = isinstance(features, np.ndarray) and features.dtype.kind in "fiu"
    if not numbers or features.ndim not in (1, 2) or not np.isfinite(features).all():
        raise UserError(f"{file!r} must hold finite numbers, (e,) or (m, e)")
    return features.astype(np.float32)


def list_images(path: str, split: str, table: str = "") -> Listing:
    """Lists the images below a folder in sorted order.

    Two or more subfolders, with no image beside them, are classes, numbered in sorted order;
    anything else is unlabelled. Subfolders `train/` and `test/` (or `val/`, `validation/`) are the
    splits if there; otherwise every tenth image of each class, from the first on, is a test image.
    Names that start with a dot are skipped. A walk of many files is kept in the folder, in
    `.binlatent_index.json`, until one of its subfolders changes.

    A table, CSV with a header or JSON lines, takes the place of the walk: its column `file` is
    relative to the folder; `label`, a name or a whole number from 0, `text`, a .npy file of
    features, and `split`, train or test, may be missing. The table, .csv or .jsonl, is relative to
    the folder too.
    """
    if not path:
        raise UserError("data.name=folder needs the folder of images: --config.data.path=DIR")
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise UserError(f"there is no folder {path!r}: give --config.data.path=DIR, one of images")
    if table:
        return _from_table(path, os.path.join(path, table), split)
    train = os.path.join(path, "train")
    tests = [os.path.join(path, name) for name in _TEST_NAMES]
    test = next((folder for folder in tests if os.path.isdir(folder)), None)
    if test and not os.path.isdir(train):
        raise UserError(f"there is {test!r} but no {train!r}: add it, or rename the former")
    root = train if os.path.isdir(train) else path
    images = _find(root)
    if not test:
        return _split_listing(root, images, split, _classes(images))
    return _listing(images if split == "train" else _find(test), _classes(images), "train/")


def find_images(path: str) -> list[str]:
    """Returns all images below a folder, sorted; writes nothing there."""
    files, _ = _walk(path)
    if not files:
        raise _no_images(path)
    return sorted(os.path.join(path, file) for file in files)


def _no_images(root: str) -> UserError:
    return UserError(f"there are no images in {root!r} (looked for {', '.join(EXTENSIONS)})")


def _find(root: str) -> list[_Image]:
    """Returns the images below root, sorted; the first subfolder's name is the class."""
    files = _kept(root)
    if files is None:
        files, changed = _walk(root)
        _keep(root, files, changed)
    if not files:
        raise _no_images(root)
    images = []
    for file in files:
        name, separator, _ = file.partition(os.sep)
        images.append(_Image(name if separator else "", os.path.join(root, file)))
    return sorted(images, key=lambda image: image.file)


def _walk(root: str) -> tuple[list[str], dict[str, int]]:
    """Returns the images below root, relative to it, and when each folder last changed, in ns."""
    found, changed, seen = [], {}, set()
    for directory, subfolders, names in os.walk(root, followlinks=True):
        # Sorted, so that of two links to one folder it is the same that counts.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative, status = os.path.relpath(directory, root), os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:  # a link back, or a second one
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        changed[relative] = status.st_mtime_ns
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                found.append(os.path.normpath(os.path.join(relative, name)))
    return found, changed


def _keep(root: str, found: list[str], changed: dict[str, int]) -> None:
    """Keeps a long walk in the folder, if that can be written."""
    # A folder that changed just now may change again without its time telling.
    if len(found) < _KEPT_FILES or time.time_ns() - max(changed.values()) < 2_000_000_000:
        return
    with suppress(OSError):
        with atomic(Path(root, _KEPT_NAME)) as unfinished:
            unfinished.write_text(json.dumps({"files": found, "changed": changed}))
        # The new file has changed the folder's own time.
        os.utime(root, ns=(changed["."], changed["."]))


def _kept(root: str) -> list[str] | None:
    """Returns the walk that is kept in a folder, None if there is none that still holds."""
    path = Path(root, _KEPT_NAME)
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
        now = {name: os.stat(os.path.join(root, name)).st_mtime_ns for name in kept["changed"]}
        files = kept["files"] if now == kept["changed"] and now else None
    except Exception:  # whatever is wrong with it, a walk does without
        return None

    # It may come from someone else: only what a walk could have found.
    def could_be_found(file: Any) -> bool:
        inside = isinstance(file, str) and not os.path.isabs(file) and ".." not in Path(file).parts
        return inside and file.lower().endswith(EXTENSIONS)

    return files if isinstance(files, list) and all(map(could_be_found, files)) else None


def _from_table(root: str, path: str, split: str) -> Listing:
    rows = _read_table(path)
    images = {"train": [], "test": []}
    for line, row in enumerate(rows, start=1):
        own_split, image = _read_row(root, row, f"line {line} of {path!r}")
        images[own_split].append(image)
    every = images["train"] + images["test"]
    if 0 < sum(not image.name for image in every) < len(every):
        raise UserError(f"in {path!r} some lines have a label and some have none: all, or none")
    if ignored := sorted(map(str, set().union(*rows) - {"file", "label", "split", "text"})):
        log.warning("Of %s, these columns are not used: %s", path, reprlib.repr(ignored))
    classes = _classes(every)
    # Numbers are classes themselves, some of which may have no image.
    if classes and all(map(_is_number, classes)):
        classes = [str(i) for i in range(max(map(int, classes)) + 1)]
    if not any("split" in row for row in rows):
        return _split_listing(path, every, split, classes)
    if not images[split]:
        raise UserError(f"{path!r} has no image of the split {split!r}: add some")
    return _listing(images[split], classes, path)


def _read_row(root: str, row: dict[str, Any], where: str) -> tuple[str, _Image]:
    """Returns the split and the image of a table's line."""
    file, label = row.get("file"), row.get("label", "")
    text, split = row.get("text") or "", row.get("split") or "train"
    shown = reprlib.repr
    if not isinstance(file, str) or not file:
        raise UserError(
            f"{where}, not counting a header, has no file: every line needs one, in a column of "
            f"that name; its columns are {shown(list(row))}"
        )
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise UserError(f"{where} has the label {shown(label)}, which is no name or whole number")
    if not isinstance(text, str) or (text and not text.endswith(".npy")):
        raise UserError(f"{where} has the text {shown(text)}, which is no .npy file of features")
    if split not in ("train", "test"):
        raise UserError(f"{where} is of the split {shown(split)}, not of train or test")
    name = str(int(label)) if _is_number(str(label)) else str(label)
    return split, _Image(name, os.path.join(root, file), os.path.join(root, text) if text else "")


def _is_number(name: str) -> bool:
    return name.isdecimal() and len(name) < 7


def _read_table(path: str) -> list[dict[str, Any]]:
    """Returns the lines of a CSV or JSON lines file as dictionaries."""
    if not path.endswith((".csv", ".jsonl")):
        raise UserError(f"data.table must be a .csv or .jsonl file, not {path!r}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.endswith(".csv"):
                rows = list(csv.DictReader(file, strict=True, skipinitialspace=True))
                rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"there is no table {path!r}: check data.table") from error
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"cannot read the table {path!r}: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"the table {path!r} has no lines, or some that are not of named columns")
    return rows


def _classes(images: list[_Image]) -> list[str]:
    """Returns the classes' names in order; none for one alone, or where some images have none."""
    names = sorted({image.name for image in images})
    if "" in names and len(names) > 1:
        log.warning("Some images lie beside the subfolders of others, so that these are no classes")
    return names if "" not in names and len(names) > 1 else []


def _split_listing(where: str, images: list[_Image], split: str, classes: list[str]) -> Listing:
    by_class = {name: [] for name in classes or [""]}
    for image in images:
        by_class[image.name if classes else ""].append(image)
    kept = []
    for of_class in by_class.values():
        for i, image in enumerate(of_class):
            is_test = i % 10 == 0 and len(of_class) > 1  # a class of one image goes to train
            kept += [image] if is_test == (split == "test") else []
    if not kept:
        raise UserError(f"{where!r} has too few images to hold out a test image: add images")
    return _listing(kept, classes, where)


def _listing(images: list[_Image], classes: list[str], where: str) -> Listing:
    numbers = {name: number for number, name in enumerate(classes)}
    for image in images:
        if classes and image.name not in numbers:
            raise UserError(
                f"{image.file!r} is in none of the class folders of {where} "
                f"({', '.join(classes)}): move or remove it"
            )
    return Listing(
        [image.file for image in images],
        [numbers[image.name] if classes else 0 for image in images],
        [image.text or os.path.splitext(image.file)[0] + ".npy" for image in images],
        len(classes),
    )
