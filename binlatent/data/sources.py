"""Opens a dataset by two config lines, a name and a path, as random access to decoded examples.

The name is `folder`, for a folder of images, `lmdb`, or the name of a TFDS dataset. TFDS is
imported only in the last case, and TensorFlow only while TFDS prepares a dataset that needs it.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import io
import logging
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from binlatent.data import folder, transforms
from binlatent.data.broken import Tolerant, UnreadableImage
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)

# Pillow's decoders of these run no other program, as that of EPS does.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()  # for Pillow to know all of them by name

# Decoded datasets up to this size stay in memory: decoding competes with training for the CPU.
_KEPT_BYTES = 2**28


def stamp(files: Sequence[str]) -> str:
    """Returns 16 hexadecimal digits that change with the files: with their sizes or times."""
    digest = hashlib.sha256()
    for file in files:
        status = os.stat(file)
        digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


class Examples(Protocol):
    """Random access to examples, from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a dataset."""

    examples: Examples  # of images: {'image': uint8 (h, w, c), 'label': int or float array}
    num_classes: int  # 0: unlabelled, and every label is 0
    fingerprint: str = ""  # tells which images with which labels these are, by their names
    files: tuple[str, ...] = ()  # that they lie in, where these can be changed


def open_source(
    name: str,
    path: str,
    split: str,
    image_size: int,
    channels: int,
    *,
    table: str = "",
    texts: bool = False,
    max_broken: float = 0.0,
    bad_files: Path | None = None,
    keep: bool = True,
) -> Source:
    """Opens one split of a dataset; one of TFDS is first prepared, as ArrayRecord, where needed.

    TFDS datasets without a test split test on `validation`, and without that on the last tenth of
    `train`. `binlatent.data.folder` says how a folder is split.

    Args:
      name: "folder", "lmdb", "digits" or any other TFDS name, such as "celeb_a_hq/256".
      path: the folder of images or of LMDB; for TFDS its data directory, "" for the default one.
      split: "train" or "test".
      image_size: side of the images in pixels.
      channels: 1 or 3.
      table: of a folder, a .csv or .jsonl file that says which images there are.
      texts: whether the labels are not classes but the features of texts: of a folder, in a file
        x.npy beside each image x.png, or as the table says, (e,) or (m, e), all of one shape.
      max_broken: share of images that may be unreadable; others then stand in for them.
      bad_files: the file that names them, or None.
      keep: whether to keep what was decoded, if it takes no more than 256 MiB.

    Returns:
      Examples {'image': uint8 (image_size, image_size, channels), 'label': int}, or with the
      features, float32, as the label; `examples.read(index, position)` crops elsewhere than in the
      centre.

    Raises:
      UserError: for an unknown name, a missing folder, a dataset without images or one that cannot
        be prepared; later, from the examples, for too many images that cannot be read.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if image_size < 1 or channels not in (1, 3):
        raise UserError(
            "images must have a positive size and 1 or 3 channels, "
            f"not size {image_size} and {channels} channels"
        )
    if name == "folder":
        count, num_classes, read, names, files = _open_folder(path, split, table, texts)
    elif texts or table:
        raise UserError(f"data.table and data.texts are for data.name=folder, not {name!r}")
    elif name == "lmdb":
        count, num_classes, read, names, files = _open_lmdb(os.path.expanduser(path), split)
    else:
        count, num_classes, read, names, files = _open_tfds(name, os.path.expanduser(path), split)

    def read_example(index: int, position: float) -> dict[str, Any]:
        file, what, label = read(index)
        return {"image": read_image(file, what, image_size, channels, position), "label": label}

    keep = keep and count * image_size**2 * channels <= _KEPT_BYTES and not texts
    images = Images(count, read_example, keep)
    fingerprint = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    examples = Tolerant(images, max_broken, bad_files)
    return Source(examples, num_classes, fingerprint, tuple(files))


# Gives an encoded image, its name for messages, and its label.
_Read = Callable[[int], tuple[str | BinaryIO, str, int | np.ndarray]]
# How many there are, their classes, how to read one, their names, and the files they lie in.
_Opened = tuple[int, int, _Read, str, Sequence[str]]


class Images:
    """Images that are read on first use, and then kept or not."""

    def __init__(self, count: int, read: Callable[[int, float], dict[str, Any]], keep: bool):
        """Takes how many there are, and how to read one."""
        self._count = count
        self._read = read
        self._kept: list[dict[str, Any] | None] | None = [None] * count if keep else None

    def __len__(self) -> int:
        return self._count

    def read(self, index: int, position: float) -> dict[str, Any]:
        """Returns an example, cropped at a position along its longer side, in [0, 1].

        Raises:
          UnreadableImage: if it cannot be read.
        """
        if self._kept is None or position != 0.5:
            return self._read(index, position)
        # Two threads may both read an example: the same values, so no lock is needed.
        example = self._kept[index]
        if example is None:
            example = self._kept[index] = self._read(index, position)
        return dict(example)


def read_image(
    file: str | BinaryIO, what: str, image_size: int, channels: int, position: float = 0.5
) -> np.ndarray:
    """Returns an image of any kind that Pillow reads, as of `transforms.to_square`.

    Raises:
      UnreadableImage: if it cannot be read, calling it `what`.
    """
    with _opened(file, what) as image:
        return transforms.to_square(image, image_size, channels, position)


def read_whole(file: str, what: str) -> np.ndarray:
    """Returns an image as it is, of three channels, uint8 (h, w, 3); raises as `read_image`."""
    with _opened(file, what) as image:
        return np.asarray(transforms.to_channels(image, 3))


@contextlib.contextmanager
def _opened(file: str | BinaryIO, what: str) -> Iterator[Image.Image]:
    """Opens an image; what is raised inside too says that it cannot be read."""
    if isinstance(file, str) and os.path.exists(file) and not os.path.isfile(file):
        # Of a pipe, reading would not end.
        raise UnreadableImage(f"cannot read the image {what}, replace or remove it: it is no file")
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except FileNotFoundError as error:
        raise UnreadableImage(f"there is no image {what}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"cannot read the image {what}, replace or remove it: "
            f"it is none of {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # what a damaged file raises depends on its format
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise UnreadableImage(
            f"cannot read the image {what}, replace or remove it: {reason}"
        ) from error


def _open_folder(path: str, split: str, table: str, texts: bool) -> _Opened:
    listing = folder.list_images(path, split, table)
    root = len(os.path.join(os.path.expanduser(path), ""))
    rows = zip(listing.files, listing.labels, listing.texts, strict=True)
    names = "\n".join(f"{file[root:]} {label} {text[root:]}" for file, label, text in rows)
    if not texts:

        def read(index: int) -> tuple[str, str, int]:
            file = listing.files[index]
            return file, repr(file), listing.labels[index]

        return len(listing.files), listing.num_classes, read, names, listing.files

    shape = _read_features(listing.texts[0]).shape

    def read_with_text(index: int) -> tuple[str, str, np.ndarray]:
        file, text = listing.files[index], listing.texts[index]
        features = _read_features(text)
        if features.shape != shape:
            raise UserError(
                f"the features in {text!r} have the shape {features.shape}, those of the first "
                f"image {shape}: bring all to one"
            )
        return file, repr(file), features

    return len(listing.files), 0, read_with_text, names, listing.files


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


def _open_lmdb(path: str, split: str) -> _Opened:
    """Opens images in LMDB, as LSUN has them: *train*lmdb/ and *val*lmdb/, or one for both."""
    try:
        import lmdb
    except ModuleNotFoundError as error:
        raise UserError("data.name=lmdb needs the package lmdb: pip install lmdb") from error
    if not os.path.isdir(path):
        raise UserError(f"there is no folder {path!r}: give --config.data.path=DIR, one of LMDB")
    names = [name for name in sorted(os.listdir(path)) if name.endswith("lmdb")]
    by_split = {
        split: [name for name in names if word in name]
        for split, word in (("train", "train"), ("test", "val"))
    }
    alone = os.path.isfile(os.path.join(path, "data.mdb"))
    if not alone and not all(len(found) == 1 for found in by_split.values()):
        raise UserError(
            f"{path!r} has neither data.mdb nor one subfolder *train*lmdb and one *val*lmdb: give "
            "the folder of one, or the one that holds both"
        )
    if not alone:
        path = os.path.join(path, by_split[split][0])
    try:
        environment = _lmdb_environment(path)
        size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if os.path.getsize(os.path.join(path, "data.mdb")) < size:
            # To read past the end of what is mapped would end the process.
            raise UserError(f"the LMDB {path!r} is cut short: bring all of data.mdb here")
        with environment.begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
    except lmdb.Error as error:
        raise UserError(f"cannot read the LMDB {path!r}: {error}") from error
    if alone:  # every tenth is for testing, as of a folder
        keys = [key for i, key in enumerate(keys) if (i % 10 == 0) == (split == "test")]
    if not keys:
        raise UserError(f"the LMDB {path!r} has no images for the split {split!r}")

    def read(index: int) -> tuple[BinaryIO, str, int]:
        with environment.begin() as transaction:
            image = transaction.get(keys[index])
        return io.BytesIO(image), f"{keys[index]!r} of {path!r}", 0

    return len(keys), 0, read, "\n".join(map(repr, keys)), [os.path.join(path, "data.mdb")]


@functools.cache  # one process may not open the same one twice
def _lmdb_environment(path: str) -> Any:
    import lmdb

    return lmdb.open(path, readonly=True, lock=False, readahead=False)


def _open_tfds(name: str, data_dir: str, split: str) -> _Opened:
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.name={name} needs the package tensorflow-datasets: install it, or name a folder "
            "of images with --config.data.name=folder --config.data.path=DIR"
        ) from error

    builder = _find_prepared(name, data_dir) or _prepare(name, data_dir)
    features = builder.info.features
    keys = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    if "image" not in keys or not isinstance(features["image"], tfds.features.Image):
        raise UserError(
            f"{name!r} of TFDS has no feature 'image' (it has: {', '.join(sorted(keys))}): "
            "choose another"
        )
    if features["image"].np_dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"the images of {name!r} of TFDS are not 8 or 16 bits deep: choose another dataset"
        )
    labelled = "label" in keys and isinstance(features["label"], tfds.features.ClassLabel)
    num_classes = (features["label"].num_classes or 0) if labelled else 0
    # TFDS passes encoded images on: `read_image` takes more kinds, and only 'image' is wanted.
    images = [key for key in keys if isinstance(features[key], tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    tfds_split = _tfds_split(name, list(builder.info.splits), split)
    try:
        records = builder.as_data_source(split=tfds_split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"the TFDS dataset at {str(builder.data_path)!r} is not stored as ArrayRecord: "
            "give another --config.data.path to have it prepared there, or remove it"
        ) from error

    def read(index: int) -> tuple[BinaryIO, str, int]:
        record = records[index]
        label = int(record["label"]) if num_classes else 0
        return io.BytesIO(record["image"]), f"{index} of {name!r}, {tfds_split}", label

    names = f"{builder.info.full_name} {tfds_split} {len(records)}"
    return len(records), num_classes, read, names, ()  # what is prepared does not change


def _tfds_split(name: str, splits: list[str], split: str) -> str:
    if "train" not in splits:
        raise UserError(
            f"{name!r} of TFDS has no split 'train' (it has: {', '.join(splits)}): choose another"
        )
    held_out = next((other for other in ("test", "validation") if other in splits), None)
    if split == "train":
        return "train" if held_out else "train[:90%]"
    return held_out or "train[90%:]"


def _find_prepared(name: str, data_dir: str) -> Any | None:
    """Returns a TFDS builder of the files in data_dir, or None where there are none.

    Files need neither the dataset's code, which for some imports TensorFlow, nor TensorFlow itself.
    """
    from tensorflow_datasets.core import read_only_builder

    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except ValueError:  # not found, or not even a name, which `_prepare` says
        return None


def _prepare(name: str, data_dir: str) -> Any:
    """Prepares a TFDS dataset as ArrayRecord and returns its builder.

    TFDS writes into a temporary folder and renames it at the end, so an interrupted preparation
    leaves no dataset.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    if re.match(r"[^/:]*:[^\d*]", name):  # a namespace; name:version is fine
        # The name may be that of someone else's config.
        raise UserError(
            f"preparing {name!r} of TFDS would run code from the network: prepare it yourself as "
            "ArrayRecord, and give its folder as --config.data.path"
        )
    if name.split("/")[0].split(":")[0] == "digits":
        importlib.import_module("binlatent.data.digits")  # registers the builder
        tfds.disable_progress_bar()  # it takes seconds
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        if builder.name != "digits":  # which needs no TensorFlow
            _hide_gpus_from_tensorflow()
        log.info("Preparing %s in %s, once", name, builder.data_path)
        # TFDS prints that it downloads, whatever it does; the line above says what happens.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except registered.DatasetNotFoundError as error:
        known = ["folder", "lmdb", "digits", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name.split("/")[0], known, n=1)
        meant = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"there is no TFDS dataset {name!r}{meant} (for a folder of images: "
            "--config.data.name=folder --config.data.path=DIR)"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"preparing the TFDS dataset {name!r} needs a package that is not installed "
            f"({str(error).splitlines()[-1]}): install it; reading it afterwards will not need it"
        ) from error
    except Exception as error:  # no network, no space, no such config, files to fetch by hand, ...
        # Another process may have prepared it meanwhile, and then the renaming fails.
        if not _find_prepared(name, data_dir):
            reason = textwrap.shorten(str(error), 600)
            raise UserError(f"TFDS cannot prepare {name!r}: {reason}") from error
    return _find_prepared(name, data_dir)


def _hide_gpus_from_tensorflow() -> None:
    """Keeps TensorFlow, where it is installed, from taking the memory of the GPUs."""
    try:
        import tensorflow as tf
    except ModuleNotFoundError:
        return
    tf.config.set_visible_devices([], "GPU")
