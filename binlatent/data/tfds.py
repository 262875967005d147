"""TFDS datasets, prepared as ArrayRecord.

TFDS is imported when a dataset is opened; TensorFlow only when TFDS needs it to prepare one.
"""

import contextlib
import difflib
import importlib
import io
import itertools
import logging
import os
import re
import textwrap
from typing import Any, BinaryIO

import numpy as np

from binlatent.data.images import EncodedImages
from binlatent.data.walk import EXTENSIONS
from binlatent.runtime.errors import UserError

log = logging.getLogger(__name__)


def open_images(name: str, data_dir: str, split: str) -> EncodedImages:
    """Opens a split of a dataset, such as "celeb_a_hq/256", and prepares it first if needed.

    The test split is `test`, else `validation`, else the last tenth of `train`. An empty `data_dir`
    means TFDS's default folder.
    """
    try:
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.name={name} needs the package tensorflow-datasets: install it, or use a folder "
            "of images with --config.data.name=folder --config.data.path=DIR"
        ) from error

    data_dir = os.path.expanduser(data_dir)
    builder = _find_prepared(name, data_dir)
    if not builder:
        _refuse_images(name, data_dir)
        builder = _prepare(name, data_dir)
    features = builder.info.features
    keys = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    if "image" not in keys or not isinstance(features["image"], tfds.features.Image):
        has = ", ".join(sorted(keys))
        raise UserError(f"the TFDS dataset {name!r} has no 'image' (it has: {has}): choose another")
    if features["image"].np_dtype not in (np.uint8, np.uint16):
        raise UserError(
            f"the images of the TFDS dataset {name!r} do not have 8 or 16 bits: choose another"
        )
    labelled = "label" in keys and isinstance(features["label"], tfds.features.ClassLabel)
    classes = tuple(features["label"].names or ()) if labelled else ()
    # Images stay encoded: `read_image` decodes more formats, and only 'image' is needed.
    images = [key for key in keys if isinstance(features[key], tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    splits = list(builder.info.splits)
    if "train" not in splits:
        has = ", ".join(splits)
        raise UserError(
            f"the TFDS dataset {name!r} has no split 'train' (it has: {has}): choose another"
        )
    held_out = next((other for other in ("test", "validation") if other in splits), None)
    if split == "train":
        tfds_split = "train" if held_out else "train[:90%]"
    else:
        tfds_split = held_out or "train[90%:]"
    try:
        records = builder.as_data_source(split=tfds_split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"the TFDS dataset at {str(builder.data_path)!r} is not stored as ArrayRecord: "
            "give another --config.data.path to prepare it there, or delete it"
        ) from error

    def read(index: int) -> tuple[BinaryIO, str, int]:
        record = records[index]
        label = int(record["label"]) if classes else 0
        return io.BytesIO(record["image"]), f"{index} of {name!r}, {tfds_split}", label

    names = f"{builder.info.full_name} {tfds_split} {len(records)}"
    # No files: a prepared dataset does not change.
    return EncodedImages(len(records), classes, read, names, ())


def _find_prepared(name: str, data_dir: str) -> Any | None:
    """Returns a TFDS builder for a prepared dataset in data_dir, or None if there is none.

    Reading a prepared dataset needs neither its code, which may import TensorFlow, nor TensorFlow.
    """
    from tensorflow_datasets.core import read_only_builder

    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except ValueError:  # not found, or an invalid name, which `_prepare` reports
        return None


def _refuse_images(name: str, data_dir: str) -> None:
    """Refuses to prepare a dataset in a folder of images; looks at its first subfolders only."""
    walked = os.walk(data_dir) if data_dir else ()
    for _, folders, files in itertools.islice(walked, 4):
        folders[:] = [folder for folder in folders if folder != "downloads"]  # TFDS's own
        if any(file.lower().endswith(EXTENSIONS) for file in files):
            raise UserError(
                f"{data_dir!r} holds images, not the TFDS dataset {name!r}: add "
                "--config.data.name=folder to use these images, or give another --config.data.path"
            )


def _prepare(name: str, data_dir: str) -> Any:
    """Prepares a TFDS dataset as ArrayRecord and returns its builder.

    TFDS writes into a temporary folder and renames it at the end, so an interrupted preparation
    leaves no dataset.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    if re.match(r"[^/:]*:[^\d*]", name):  # a namespace; name:version is fine
        # The name may come from another person's config.
        raise UserError(
            f"preparing the TFDS dataset {name!r} would run code from the network: prepare it "
            "yourself as ArrayRecord, and give its folder as --config.data.path"
        )
    if name.split("/")[0].split(":")[0] == "digits":
        importlib.import_module("binlatent.data.digits")  # registers the builder
        tfds.disable_progress_bar()  # it takes seconds
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        if builder.name != "digits":  # `digits` needs no TensorFlow
            _hide_gpus_from_tensorflow()
        log.info("Preparing %s in %s, once", name, builder.data_path)
        # TFDS always prints that it downloads; the line above is enough.
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
        # The renaming also fails if another process has prepared the dataset meanwhile.
        if not _find_prepared(name, data_dir):
            reason = textwrap.shorten(str(error), 600)
            raise UserError(f"TFDS cannot prepare {name!r}: {reason}") from error
    return _find_prepared(name, data_dir)


def _hide_gpus_from_tensorflow() -> None:
    """Keeps TensorFlow, if it is installed, from allocating memory on GPUs."""
    with contextlib.suppress(ModuleNotFoundError):
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
