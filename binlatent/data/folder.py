"""Lists the images of a folder with classes, texts and split, by walking it or from a table."""

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
    labels: list[int]  # one per file; 0 without classes
    texts: list[str]  # one per file: the path of its text's features, which may not exist
    classes: tuple[str, ...]  # names in order of labels; () if unlabelled
    # Reads the captions of each file.
    captions: Callable[[], list[tuple[str, ...]]] = dataclasses.field(compare=False)


class _Image(NamedTuple):
    label: str  # name of the class, "" without one
    file: str
    text: str = ""  # file of features; "" for the image's name with .npy
    # Reads the captions in its line of a table; None if the table has no column of captions.
    captions: Callable[[], tuple[str, ...]] | None = None


def open_images(
    path: str, split: str, table: str = "", texts: bool = False, labelled: bool = True
) -> EncodedImages:
    """Opens the images that `list_images` lists; with `texts`, labels are the features of texts.

    Features per token, (m, e), are padded with zeros to the length of the longest text.
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
                    "use one encoder for all texts"
                )
            label[tuple(map(slice, found.shape))] = found
        return file, repr(file), label

    classes = () if texts else listing.classes
    return EncodedImages(len(listing.files), classes, read, names, listing.files, listing.captions)


def _shape_of_all(texts: list[str]) -> tuple[int, ...]:
    """Returns the shape of the features, padded to the longest text."""
    shape, longest = _first_shape(texts), 0
    if len(shape) == 1:
        return shape
    for text in texts:
        with contextlib.suppress(Exception):  # reading the whole file later reports the damage
            longest = max(longest, np.load(text, mmap_mode="r").shape[0])
    return longest, shape[1]


def _first_shape(texts: list[str]) -> tuple[int, ...]:
    """Returns the shape of the first features that can be read."""
    for text in texts[:100]:
        with contextlib.suppress(UnreadableImage):
            return _read_features(text).shape
    return _read_features(texts[0]).shape


def _read_features(file: str) -> np.ndarray:
    """Returns the features of a text, float32, (e,) or (m, e).

    Raises:
      UnreadableImage: if the features cannot be read; their image then counts as unreadable.
    """
    try:
        features = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UnreadableImage(
            f"data.texts needs the features of each image's text: there is no {file!r}"
        ) from error
    except Exception as error:  # of many types, depending on the damage
        raise UnreadableImage(f"{file!r} is not a .npy file of numbers: {error}") from error
    numbers = isinstance(features, np.ndarray) and features.dtype.kind in "fiu"
    if not numbers or features.ndim not in (1, 2) or not np.isfinite(features).all():
        raise UnreadableImage(f"{file!r} must hold finite numbers of shape (e,) or (m, e)")
    return features.astype(np.float32)


def list_images(path: str, split: str, table: str = "", labelled: bool = True) -> Listing:
    """Lists the images of a split in sorted order, from a table or by walking the folder.

    Walk: two or more subfolders without images beside them are classes, numbered in natural order
    (2 before 10); otherwise the images are unlabelled. Subfolders `train/` and `test/` (or synonyms
    in `classes.TEST_NAMES`, in any case) are the splits. Without them, every tenth image of each
    class, from the first on, is a test image. Names that start with a dot are skipped. The result
    of a long walk is kept in the folder, in `.binlatent_index.json`, until a subfolder changes.

    Table: CSV with a header, or JSON lines. The column `file` is relative to the folder. Optional
    columns are `label` (a name or a number), `text` (an .npy file of features) and `split` (train
    or test). The classes are the labels that occur. Columns whose names start with `caption` hold
    captions.

    Without columns of captions, the captions of `x.png` are the lines of `x.txt` beside it.

    Args:
      path: of the folder.
      split: "train" or "test".
      table: a .csv or .jsonl file, relative to the folder; "" for a walk.
      labelled: whether labels are used. If not, classes without training images, or with one image
        each, make the images unlabelled and raise no error.
    """
    if not path:
        raise UserError("data.name=folder needs a folder of images: --config.data.path=DIR")
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
        raise UserError(
            f"there is no folder {path!r}: set --config.data.path=DIR to a folder of images"
        )
    if table:
        return _from_table(path, os.path.join(path, table), split, labelled)
    train, test = _split_folders(path)
    images = _find(train or path)
    if not test:
        return _split_listing(train or path, images, split, _classes(images), labelled)
    return _listing(images if split == "train" else _find(test), _classes(images), train, labelled)


def _split_folders(path: str) -> tuple[str, str]:
    """Returns the folders of the splits train and test, "" for one that does not exist.

    A folder named like a split, in any case, is never a class: unclear names raise UserError.
    """
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    names = [name for name in names if not walk.is_hidden(name)]
    trains, tests = ([x for x in names if class_names.split_of(x) == y] for y in ("train", "test"))
    others = [name for name in names if name not in trains + tests]
    shown = ", ".join(map(repr, trains + tests))
    if len(trains) > 1 or (tests and not trains):
        raise UserError(
            f"the subfolders {shown} of {path!r} are named like splits, but not one of them "
            "'train': rename them to train and test, or list the images in a table"
        )
    like = {class_names.like_split(name) for name in names}
    if not (trains and tests) and others and (like >= {"train", "test"} or "" not in like):
        raise UserError(
            f"the subfolders {', '.join(map(repr, names[:5]))} of {path!r} are named like splits: "
            "if they are, rename them to train and test; if they are classes, list them in a table"
        )
    if trains and not tests:
        others = [name for name in others if walk.has_images(os.path.join(path, name))]
        if others:
            raise UserError(
                f"{path!r} has images in {shown}, named like a split, and in "
                f"{', '.join(map(repr, others[:5]))}: rename {shown} if all are classes, "
                "otherwise move the others away"
            )
    tests.sort(key=lambda name: class_names.TEST_NAMES.index(class_names.clean(name).casefold()))
    if tests and (left := tests[1:] + others):
        log.info("In %s, %s and %s are used, not %s", path, *trains, tests[0], ", ".join(left))
    return tuple(os.path.join(path, found[0]) if found else "" for found in (trains, tests))


def _find(root: str) -> list[_Image]:
    """Returns the images below root, sorted; the class is the subfolder of root."""
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
            "like splits: set --config.data.path to the folder that has both, or rearrange the "
            "images as train/CLASS and test/CLASS"
        )
    for file in files:
        name, separator, _ = file[start:].partition(os.sep)
        images.append(_Image(class_names.clean(name) if separator else "", file))
    return images


def _from_table(root: str, path: str, split: str, labelled: bool) -> Listing:
    rows = _read_table(path)
    columns = set().union(*rows)
    captioned = any(map(captions.is_caption, columns))
    images = {}  # by the name of the split
    for line, row in enumerate(rows, start=1):
        where = f"line {line} of {path!r}"
        own_split, image = _read_row(root, row, where)
        if captioned:
            image = image._replace(captions=_captions(row, where, path.endswith(".csv")))
        images.setdefault(own_split, []).append(image)
    every = [image for of_split in images.values() for image in of_split]
    if 0 < sum(not image.label for image in every) < len(every):
        raise UserError(
            f"in {path!r} some lines have a label and some have none: give all lines one, or none"
        )
    known = {"file", "label", "split", "text", *filter(captions.is_caption, columns)}
    if ignored := sorted(map(str, columns - known)):
        log.warning("These columns of %s are not used: %s", path, reprlib.repr(ignored))
    if not any("split" in row for row in rows):
        return _split_listing(path, every, split, _classes(every), labelled)
    train = [x for name in class_names.TRAIN_NAMES for x in images.get(name, [])]
    test = next((images[name] for name in class_names.TEST_NAMES if name in images), [])
    if not (chosen := train if split == "train" else test):
        raise UserError(f"{path!r} has no image of the split {split!r}: add some")
    if left := len(every) - len(train) - len(test):
        log.info("%s: %d images of a second test split are not used", path, left)
    return _listing(chosen, _classes(train), path, labelled)


def _read_row(root: str, row: dict[str, Any], where: str) -> tuple[str, _Image]:
    """Returns the split's name in lower case, and the image, of a table's line."""
    file, label = row.get("file"), row.get("label", "")
    text, split = row.get("text") or "", row.get("split") or "train"
    shown = reprlib.repr
    if not isinstance(file, str) or not file:
        raise UserError(
            f"{where}, not counting the header, has no file: every line needs one in the column "
            f"'file'; its columns are {shown(list(row))}"
        )
    if not isinstance(label, str | int) or isinstance(label, bool):
        raise UserError(
            f"{where} has the label {shown(label)}, which is not a name or whole number"
        )
    if not isinstance(text, str) or (text and not text.endswith(".npy")):
        raise UserError(
            f"{where} has the text {shown(text)}, which is not an .npy file of features"
        )
    if not isinstance(split, str) or not class_names.split_of(split):
        raise UserError(f"{where} has the split {shown(split)}, which is not train or test")
    file, text = (_path(root, name, where) if name else "" for name in (file, text))
    return class_names.clean(split).casefold(), _Image(class_names.clean(str(label)), file, text)


def _captions(row: dict[str, Any], where: str, csv: bool) -> Callable[[], tuple[str, ...]]:
    """Returns a function that reads the captions in a line; it keeps only their cells."""
    cells = [(key, value) for key, value in row.items() if captions.is_caption(key)]
    # Spreadsheets may write empty cells after the last column.
    cells += [(None, left) for left in [row.get(None)] if left and any(map(str.strip, left))]
    return functools.partial(captions.of_cells, tuple(cells), where, json_lists=csv)


def _path(root: str, name: str, where: str) -> str:
    """Returns the path of a file in a table; Windows separators are replaced."""
    path = os.path.join(root, os.path.expanduser(name))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]|\\\\", name):
        raise UserError(
            f"{where} has the file {name!r}, a path of another machine: make it relative"
        )
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
        raise UserError(f"the table {path!r} has no lines, or lines without named columns")
    return [{_column(key): value for key, value in row.items()} for row in rows]


def _column(name: Any) -> Any:
    """Returns the name of a column; "File" and " LABEL " become "file" and "label"."""
    known = class_names.clean(name).casefold() if isinstance(name, str) else ""
    return known if known in ("file", "label", "split", "text") else name


def _classes(images: list[_Image]) -> tuple[str, ...]:
    """Returns the class names in order; () for one class, or if some images have none."""
    names = {image.label for image in images}
    if "" in names and len(names) > 1:
        log.warning(
            "Some images lie beside subfolders of images, so that subfolders are not classes"
        )
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
                f"every class of {where!r}, {class_names.numbered(classes)}, has only one image, "
                "so that there are no test images. If these are not classes, set "
                "--config.data.num_classes=0; otherwise add images"
            )
        by_class, classes = {"": images}, ()
    alone = sum(len(of_class) == 1 for of_class in by_class.values())
    if labelled and 2 * alone > len(by_class):
        class_names.warn_once(
            f"{alone} of {len(classes)} classes of {where!r} have only one image: if these are "
            "not classes, set --config.data.num_classes=0"
        )
    kept = []
    for of_class in by_class.values():
        for i, image in enumerate(of_class):
            is_test = i % 10 == 0 and len(of_class) > 1  # a class of one image has no test image
            kept += [image] if is_test == (split == "test") else []
    if not kept:
        raise UserError(f"{where!r} has too few images to hold out a test image: add images")
    return _listing(kept, classes, where, labelled)


def _listing(images: list[_Image], classes: tuple[str, ...], where: str, labelled: bool) -> Listing:
    numbers = {name: number for number, name in enumerate(classes)}
    strange = next((image for image in images if classes and image.label not in numbers), None)
    if strange and labelled:
        raise UserError(
            f"{strange.file!r} is of the class {strange.label!r}, which has no training images in "
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
