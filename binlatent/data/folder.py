"""A folder of images, with their classes, texts and split: by a walk, or by a table."""

import contextlib
import csv
import dataclasses
import functools
import json
import logging
import os
import re
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from binlatent.data import captions, walk
from binlatent.data import classes as class_names
from binlatent.data.images import EncodedImages, UnreadableImage
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of one split."""

    files: list[str]
    labels: list[int]  # one a file; 0 where there are no classes
    texts: list[str]  # one a file: where the features of its text should be
    classes: tuple[str, ...]  # names by number; (): unlabelled
    # Reads those of each file.
    captions: Callable[[], list[tuple[str, ...]]] = dataclasses.field(compare=False)


class _Image(NamedTuple):
    label: str  # the name of the class, "" for none
    file: str
    text: str = ""  # file of features; "" for the image's own name with .npy
    # Reads the captions in its line of a table; None where the table has no column of captions.
    captions: Callable[[], tuple[str, ...]] | None = None


def open_images(
    path: str, split: str, table: str = "", texts: bool = False, labelled: bool = True
) -> EncodedImages:
    """Opens what `list_images` lists; with `texts`, the labels are the features of texts.

    Features of tokens, (m, e), are padded with zeros to those of the longest text.
    """
    listing = list_images(path, split, table, labelled)
    root = len(os.path.join(os.path.expanduser(path), ""))
    rows = zip(listing.files, listing.labels, listing.texts, strict=True)
    names = "\n".join(f"{file[root:]} {label} {text[root:]}" for file, label, text in rows)
    shape = _shape_of_all(listing.texts) if texts else ()

    def read(index: int) -> tuple[str, str, int | np.ndarray]:
        file, label, text = listing.files[index], listing.labels[index], listing.texts[index]
        if texts:
            found, label = _read_features(text), np.zeros(shape, np.float32)
            if found.ndim != label.ndim or found.shape[-1] != shape[-1]:
                raise UserError(
                    f"the features in {text!r} have the shape {found.shape}, those of the first "
                    f"image {'(tokens, e)' if len(shape) == 2 else '(e,)'} with e = {shape[-1]}: "
                    "bring all to one"
                )
            label[tuple(map(slice, found.shape))] = found
        return file, repr(file), label

    classes = () if texts else listing.classes
    return EncodedImages(len(listing.files), classes, read, names, listing.files, listing.captions)


def _shape_of_all(texts: list[str]) -> tuple[int, ...]:
    """Returns the shape of the first text's features, with the tokens of the longest text."""
    shape, longest = _first_shape(texts), 0
    if len(shape) == 1:
        return shape
    for text in texts:
        with contextlib.suppress(Exception):  # reading all of it reports the damage
            longest = max(longest, np.load(text, mmap_mode="r").shape[0])
    return longest, shape[1]


def _first_shape(texts: list[str]) -> tuple[int, ...]:
    """Returns the shape of the first features that can be read, of which a few may be broken."""
    for text in texts[:100]:
        with contextlib.suppress(UnreadableImage):
            return _read_features(text).shape
    return _read_features(texts[0]).shape


def _read_features(file: str) -> np.ndarray:
    """Returns the features of a text, float32, (e,) or (m, e).

    Raises:
      UnreadableImage: if they cannot be read; the image then counts as one that cannot.
    """
    try:
        features = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UnreadableImage(
            f"data.texts needs the features of each image's text: there is no {file!r}"
        ) from error
    except Exception as error:  # by where the damage is
        raise UnreadableImage(f"{file!r} is no .npy file of numbers: {error}") from error
    numbers = isinstance(features, np.ndarray) and features.dtype.kind in "fiu"
    if not numbers or features.ndim not in (1, 2) or not np.isfinite(features).all():
        raise UnreadableImage(f"{file!r} must hold finite numbers, (e,) or (m, e)")
    return features.astype(np.float32)


def list_images(path: str, split: str, table: str = "", labelled: bool = True) -> Listing:
    """Lists the images below a folder in sorted order.

    Two or more subfolders, with no image beside them, are classes, numbered in natural order (2
    before 10); anything else is unlabelled. Subfolders `train/` and `test/` (or a synonym of
    `classes.TEST_NAMES`, in any case) are the splits if there; otherwise every tenth image of each
    class, from the first on, is a test image. Names that start with a dot are skipped. A walk of
    many files is kept in the folder, in `.binlatent_index.json`, until one of its subfolders
    changes.

    A table, CSV with a header or JSON lines, takes the place of the walk: its column `file` is
    relative to the folder; `label`, a name or a number, `text`, a .npy file of features, and
    `split`, train or test, may be missing. Its classes are the labels that occur. The table, .csv
    or .jsonl, is relative to the folder too.

    Columns of a table whose names start with `caption` hold captions. Without such a column, and
    without a table, the captions of `x.png` are the lines of `x.txt` beside it.

    Args:
      path: of the folder.
      split: "train" or "test".
      table: the name of the table, "" for none.
      labelled: whether labels matter; without, classes of one image each, or of test images alone,
        are no classes, and are not refused.
    """
    if not path:
        raise UserError("data.name=folder needs the folder of images: --config.data.path=DIR")
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise UserError(f"there is no folder {path!r}: give --config.data.path=DIR, one of images")
    if table:
        return _from_table(path, os.path.join(path, table), split, labelled)
    train, test = _split_folders(path)
    images = _find(train or path)
    if not test:
        return _split_listing(train or path, images, split, _classes(images), labelled)
    return _listing(images if split == "train" else _find(test), _classes(images), train, labelled)


def _split_folders(path: str) -> tuple[str, str]:
    """Returns the subfolders of the splits, "" for one that is not there; asks where it is unclear.

    A folder named like a split, in any case, is never taken for a class.
    """
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    names = [name for name in names if not walk.is_hidden(name)]
    trains, tests = ([x for x in names if class_names.split_of(x) == y] for y in ("train", "test"))
    others = [name for name in names if name not in trains + tests]
    shown = ", ".join(map(repr, trains + tests))
    if len(trains) > 1 or (tests and not trains):
        raise UserError(
            f"the subfolders {shown} of {path!r} are named like splits, of which one must be "
            "'train': rename them to train and test, or say with a table which image is what"
        )
    like = {class_names.like_split(name) for name in names}
    if not (trains and tests) and others and (like >= {"train", "test"} or "" not in like):
        raise UserError(
            f"the subfolders {', '.join(map(repr, names[:5]))} of {path!r} are named like splits: "
            "rename them to train and test if they are; if they are classes, say so with a table"
        )
    if trains and not tests:
        others = [name for name in others if walk.has_images(os.path.join(path, name))]
        if others:
            raise UserError(
                f"{path!r} has images in {shown}, named like a split, and in "
                f"{', '.join(map(repr, others[:5]))}: if all are classes, rename {shown}; if not, "
                "move the others away"
            )
    tests.sort(key=lambda name: class_names.TEST_NAMES.index(class_names.clean(name).casefold()))
    if tests and (left := tests[1:] + others):
        log.info("Of %s, %s and %s are used, not %s", path, *trains, tests[0], ", ".join(left))
    return tuple(os.path.join(path, found[0]) if found else "" for found in (trains, tests))


def _find(root: str) -> list[_Image]:
    """Returns the images below root, sorted; the first subfolder's name is the class."""
    files, images, start = walk.find_images(root, keep=True), [], len(os.path.join(root, ""))
    parts = {
        part
        for folder in {os.path.dirname(x)[start:] for x in files}
        for part in folder.split(os.sep)
    }
    deeper = {class_names.split_of(part): part for part in sorted(parts)}
    if deeper.keys() >= {"train", "test"}:
        raise UserError(
            f"below {root!r} there are folders {deeper['train']!r} and {deeper['test']!r}, named "
            "like splits: give the folder that has both as --config.data.path, or bring them to "
            "the top, as train/CLASS and test/CLASS"
        )
    for file in files:
        name, separator, _ = file[start:].partition(os.sep)
        images.append(_Image(class_names.clean(name) if separator else "", file))
    return images


def _from_table(root: str, path: str, split: str, labelled: bool) -> Listing:
    rows = _read_table(path)
    columns = set().union(*rows)
    captioned = any(map(captions.is_caption, columns))
    images = {}  # by split as it is named
    for line, row in enumerate(rows, start=1):
        where = f"line {line} of {path!r}"
        own_split, image = _read_row(root, row, where)
        if captioned:
            image = image._replace(captions=_captions(row, where, path.endswith(".csv")))
        images.setdefault(own_split, []).append(image)
    every = [image for of_split in images.values() for image in of_split]
    if 0 < sum(not image.label for image in every) < len(every):
        raise UserError(f"in {path!r} some lines have a label and some have none: all, or none")
    known = {"file", "label", "split", "text", *filter(captions.is_caption, columns)}
    if ignored := sorted(map(str, columns - known)):
        log.warning("Of %s, these columns are not used: %s", path, reprlib.repr(ignored))
    if not any("split" in row for row in rows):
        return _split_listing(path, every, split, _classes(every), labelled)
    train = [x for name in class_names.TRAIN_NAMES for x in images.get(name, [])]
    test = next((images[name] for name in class_names.TEST_NAMES if name in images), [])
    if not (chosen := train if split == "train" else test):
        raise UserError(f"{path!r} has no image of the split {split!r}: add some")
    if left := len(every) - len(train) - len(test):
        log.info("Of %s, %d images are of a further split for testing and not used", path, left)
    return _listing(chosen, _classes(train), path, labelled)


def _read_row(root: str, row: dict[str, Any], where: str) -> tuple[str, _Image]:
    """Returns the split, as it is named in small letters, and the image of a table's line."""
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
    if not isinstance(split, str) or not class_names.split_of(split):
        raise UserError(f"{where} is of the split {shown(split)}, not of train or test")
    file, text = (_path(root, name, where) if name else "" for name in (file, text))
    return class_names.clean(split).casefold(), _Image(class_names.clean(str(label)), file, text)


def _captions(row: dict[str, Any], where: str, csv: bool) -> Callable[[], tuple[str, ...]]:
    """Returns what reads the captions in a table's line, which keeps no more of it than these."""
    cells = [(key, value) for key, value in row.items() if captions.is_caption(key)]
    # Spreadsheets write empty cells behind the last column.
    cells += [(None, left) for left in [row.get(None)] if left and any(map(str.strip, left))]
    return functools.partial(captions.of_cells, tuple(cells), where, json_lists=csv)


def _path(root: str, name: str, where: str) -> str:
    """Returns the path of a table's file, whose separators may be those of Windows."""
    path = os.path.join(root, os.path.expanduser(name))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]|\\\\", name):
        raise UserError(f"{where} has the file {name!r} of another machine: make it relative")
    if "\\" not in name or os.path.exists(path):
        return path
    return os.path.join(root, name.replace("\\", "/"))


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
    return [{_column(key): value for key, value in row.items()} for row in rows]


def _column(name: Any) -> Any:
    """Returns the name of a column as it is used here: "File" and " LABEL " are known too."""
    known = class_names.clean(name).casefold() if isinstance(name, str) else ""
    return known if known in ("file", "label", "split", "text") else name


def _classes(images: list[_Image]) -> tuple[str, ...]:
    """Returns the classes' names in order; none for one alone, or where some images have none."""
    names = {image.label for image in images}
    if "" in names and len(names) > 1:
        log.warning("Some images lie beside the subfolders of others, so that these are no classes")
    return class_names.in_order(names) if "" not in names and len(names) > 1 else ()


def _split_listing(
    where: str, images: list[_Image], split: str, classes: tuple[str, ...], labelled: bool
) -> Listing:
    by_class = {name: [] for name in classes or [""]}
    for image in images:
        by_class[image.label if classes else ""].append(image)
    if len(classes) == len(images) > 0:
        if labelled:
            raise UserError(
                f"every class of {where!r}, {class_names.numbered(classes)}, has one image, so "
                "that none can be held out as a test image. If these are no classes, set "
                "--config.data.num_classes=0; otherwise add images"
            )
        by_class, classes = {"": images}, ()
    alone = sum(len(of_class) == 1 for of_class in by_class.values())
    if labelled and 2 * alone > len(by_class):
        class_names.warn_once(
            f"{alone} of {len(classes)} classes of {where!r} have one image: if these are no "
            "classes, set --config.data.num_classes=0"
        )
    kept = []
    for of_class in by_class.values():
        for i, image in enumerate(of_class):
            is_test = i % 10 == 0 and len(of_class) > 1  # a class of one image goes to train
            kept += [image] if is_test == (split == "test") else []
    if not kept:
        raise UserError(f"{where!r} has too few images to hold out a test image: add images")
    return _listing(kept, classes, where, labelled)


def _listing(images: list[_Image], classes: tuple[str, ...], where: str, labelled: bool) -> Listing:
    numbers = {name: number for number, name in enumerate(classes)}
    strange = next((image for image in images if classes and image.label not in numbers), None)
    if strange and labelled:
        raise UserError(
            f"{strange.file!r} is of the class {strange.label!r}, which has no training image in "
            f"{where!r} ({class_names.numbered(classes)}): move or remove it"
        )
    classes = () if strange else classes
    files = [image.file for image in images]

    def read_captions() -> list[tuple[str, ...]]:
        if any(image.captions for image in images):
            return [image.captions() for image in images]
        return captions.beside(files)

    return Listing(
        files,
        [numbers[image.label] if classes else 0 for image in images],
        [image.text or os.path.splitext(image.file)[0] + ".npy" for image in images],
        classes,
        functools.cache(read_captions),
    )
