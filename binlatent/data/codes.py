"""Caches a dataset's encoder probabilities on disk for stage 2 (`--mode=encode`).

The cache holds probabilities rather than bits, so that the prior draws new bits in every epoch. A
probability is rounded to 255ths and takes one byte. A folder of codes holds ArrayRecord shards and
`info.json`, which is written last. A record is the bytes of the label, then those of the code. If
another image replaces one that could not be read, the record ends with the number of the image that
was read, in 8 bytes.
"""

import hashlib
import json
import logging
import math
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from array_record.python import array_record_data_source, array_record_module

from binlatent.data import loader
from binlatent.data.decoded import locate
from binlatent.data.sources import Source
from binlatent.data.splits import Data
from binlatent.data.transforms import to_float
from binlatent.runtime import files, locks
from binlatent.runtime.errors import UserError
from binlatent.runtime.progress import Progress, progress
from binlatent.runtime.strict_json import write_json

log = logging.getLogger(__name__)

_SHARD = 4_096  # records
_KEPT_BYTES = 2**28  # up to this size codes stay in memory: a GPU may be faster than the disk
_NUMBER = np.dtype("<i8")  # type of an image's number in a record


class Codes:
    """Random access to {"probs": uint8 (h, w, c), in 255ths, "label": ...} of each image."""

    def __init__(self, folder: Path, info: dict[str, Any]):
        """Opens a complete folder, described by its `info.json`; ValueError if it is invalid."""
        self._folder = folder
        self._shape = tuple(info["code_shape"])
        if info["label_type"] not in ("<i4", "<f4"):
            raise ValueError(f"labels have the type {info['label_type']!r}")
        self._label_type, self._label_shape = np.dtype(info["label_type"]), info["label_shape"]
        self._label_bytes = self._label_type.itemsize * math.prod(self._label_shape)
        self._bytes = self._label_bytes + math.prod(self._shape)
        paths = [str(folder / name) for name in _shard_names(info["count"])]
        self._records = array_record_data_source.ArrayRecordDataSource(paths)
        self._keep, self._kept = len(self._records) * self._bytes <= _KEPT_BYTES, {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.locate(index)[1]

    def locate(self, index: int, position: float = 0.5) -> tuple[int, dict[str, Any]]:
        """Returns the number of the encoded image, and an example; `position` is ignored."""
        try:
            # No lock: if two threads read the same record, they get the same bytes.
            record = self._kept.get(index) or self._records[index]
            if self._keep:
                self._kept[index] = record
            label, probs = record[: self._label_bytes], record[self._label_bytes : self._bytes]
            number = np.frombuffer(record[self._bytes :], _NUMBER)
            return int(number[0]) if number.size else range(len(self))[index], {
                "probs": np.frombuffer(probs, np.uint8).reshape(self._shape),
                "label": np.frombuffer(label, self._label_type).reshape(self._label_shape),
            }
        except Exception as error:  # of many types, depending on the damage
            raise UserError(
                f"The codes in {self._folder} are damaged ({textwrap.shorten(str(error), 200)}): "
                "delete that folder and create them again with --mode=encode."
            ) from error


def _shard_names(count: int) -> list[str]:
    if not 0 <= count < 10**10:
        raise ValueError(f"the number of codes is {count}")
    total = max(-(-count // _SHARD), 1)
    return [f"codes-{i:05}-of-{total:05}.array_record" for i in range(total)]


def open_codes(folder: Path, encoder: str) -> Source:
    """Opens a folder that `write_codes` wrote with the encoder of this fingerprint."""
    try:
        info = json.loads((folder / "info.json").read_text())
        codes, known = Codes(folder, info), info["encoder"]
        classes = tuple(map(str, info["data"]["classes"]))
        fingerprint = str(info["data"]["source"])
        if len(codes) != info["count"]:
            raise ValueError(f"{len(codes)} codes, not {info['count']}")
    except Exception as error:  # of many types, depending on the damage
        reason = textwrap.shorten(str(error), 200)
        raise UserError(
            f"There are no complete codes in {folder}: create them with --mode=encode ({reason})."
        ) from error
    if known != encoder:
        raise UserError(
            f"The codes in {folder} were made by another encoder than this workdir's: encode "
            "the images again with --mode=encode."
        )
    return Source(codes, classes, fingerprint)


def write_codes(
    source: Source,
    folder: Path,
    *,
    encoder: str,
    encode_probs: Callable[[np.ndarray], np.ndarray],
    code_shape: tuple[int, int, int],
    data: Data,
    batch_size: int,
) -> Path:
    """Encodes all images of a source into a folder, in shards; resumes after an interruption.

    The folder's name depends on the encoder's weights and on the names, labels and classes of the
    images, so that outdated codes are never used. Several processes share the shards.

    Args:
      source: the images.
      folder: the parent of the new folder: `codes` in a workdir.
      encoder: the encoder's fingerprint.
      encode_probs: maps images, float32 in [-1, 1], to probabilities (n, h, w, c).
      code_shape: (h, w, c).
      data: how the images are read.
      batch_size: images per call of `encode_probs`.

    Returns:
      The folder with the codes.
    """
    count = len(source.examples)
    about = {name: getattr(data, name) for name in ("image_size", "channels", "texts")}
    about |= {"source": source.fingerprint, "classes": source.classes}
    dataset = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    target = folder / f"{encoder}_{dataset}"
    if (target / "info.json").exists():
        return target
    names = _shard_names(count)
    this, turns = jax.process_index(), jax.process_count()
    doing = f"The codes in {target} are being written"
    # Process 0 locks the folder for all processes.
    with nullcontext() if this else locks.only_process(target / ".lock", doing):
        log.info("Encoding %d images into %s", count, target)
        with progress(count, "images", silent=bool(this)) as shown:
            for i, name in enumerate(names):
                part = range(i * _SHARD, min((i + 1) * _SHARD, count))
                if i % turns == this and not (target / name).exists():
                    _write_shard(source, part, encode_probs, batch_size, target / name, shown)
                else:
                    shown.update(len(part), skipped=True)
        # If another process fails, this one is ended too.
        last = ["info.json"] if this else names
        while not all((target / name).exists() for name in last):
            time.sleep(0.5)
    if this:
        return target
    label = _label(source.examples[0]["label"])
    info = {
        "encoder": encoder,
        "code_shape": code_shape,
        "label_type": label.dtype.str,
        "label_shape": label.shape,
        "count": count,
        "data": about,
    }
    write_json(target / "info.json", info)
    return target


def _label(label: Any) -> np.ndarray:
    label = np.asarray(label)
    return label.astype("<f4" if label.dtype.kind == "f" else "<i4")


def _write_shard(
    source: Source,
    part: range,
    encode_probs: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    path: Path,
    shown: Progress,
) -> None:
    def read(i: int) -> dict[str, Any]:
        found, example = locate(source.examples, part[i])
        return dict(example, wanted=part[i], found=found)

    with files.atomic(path, alone=True) as unfinished:
        writer = array_record_module.ArrayRecordWriter(str(unfinished), "group_size:1")
        for batch in loader.in_order(len(part), read, batch_size):
            num = len(batch["image"])
            # The last batch is padded, so that one compiled program serves all batches.
            images = batch["image"][np.minimum(np.arange(batch_size), num - 1)]
            codes = np.rint(255 * encode_probs(to_float(images))[:num]).astype(np.uint8)
            with _writing(path):
                columns = _label(batch["label"]), codes, batch["wanted"], batch["found"]
                for label, code, wanted, found in zip(*columns, strict=True):
                    number = b"" if found == wanted else found.astype(_NUMBER).tobytes()
                    writer.write(label.tobytes() + code.tobytes() + number)
            shown.update(num)
        with _writing(path):
            writer.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # from ArrayRecord, for a full disk too
        raise UserError(
            f"The codes could not be written to {path.parent}: {str(error).split(';')[0]}. "
            "Shards written before are complete: make room on the disk, or remove the cause, and "
            "run the same command again."
        ) from error
