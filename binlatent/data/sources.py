"""Opens a dataset by a name and a path, as random access to decoded examples."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from binlatent.data import folder, lmdb, tfds
from binlatent.data.broken import Tolerant
from binlatent.data.images import DecodedImages, read_image, read_whole  # noqa: F401
from binlatent.runtime.errors import UserError

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
    """Opens one split of a dataset.

    Args:
      name: "folder", "lmdb", "digits" or any other TFDS name, such as "celeb_a_hq/256".
      path: the folder of images or of LMDB; for TFDS its data directory, "" for the default one.
      split: "train" or "test"; `folder`, `lmdb` and `tfds` say how images are split.
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
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if image_size < 1 or channels not in (1, 3):
        raise UserError(
            "images must have a positive size and 1 or 3 channels, "
            f"not size {image_size} and {channels} channels"
        )
    if name == "folder":
        encoded = folder.open_images(path, split, table, texts)
    elif texts or table:
        raise UserError(f"data.table and data.texts are for data.name=folder, not {name!r}")
    elif name == "lmdb":
        encoded = lmdb.open_images(path, split)
    else:
        encoded = tfds.open_images(name, path, split)
    keep = keep and encoded.count * image_size**2 * channels <= _KEPT_BYTES and not texts
    images = DecodedImages(encoded, image_size, channels, keep)
    names = encoded.names.encode("utf-8", "surrogatepass")
    return Source(
        Tolerant(images, max_broken, bad_files),
        encoded.num_classes,
        fingerprint=hashlib.sha256(names).hexdigest()[:16],
        files=tuple(encoded.files),
    )
