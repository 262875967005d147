"""The data of an experiment, and the images of its two splits."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from binlatent.data import folder, lmdb, tfds
from binlatent.data.decoded import DecodedImages
from binlatent.data.sources import Source
from binlatent.runtime.errors import UserError

# Decoded datasets up to this size stay in memory: decoding competes with training for the CPU.
_KEPT_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Data:
    """Which images there are, and how they are read."""

    name: str  # "folder", "lmdb", "digits" or any other TFDS name, such as "celeb_a_hq/256"
    path: str  # of the folder of images or of LMDB; TFDS's data directory, "" for the default one
    image_size: int  # side in pixels
    channels: int  # 1 or 3
    table: str = ""  # of a folder, a .csv or .jsonl file that says which images there are
    texts: bool = False  # of a folder: labels are the features of texts, (e,) or (m, e)
    crop: str = "centre"  # or "random", along the longer side, in training
    flip: bool = False  # whether training mirrors every other image
    max_broken: float = 0.0  # share of images that may be unreadable; others stand in for them
    num_classes: int = -1  # -1: what the dataset has; 0: its labels are ignored

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.image_size, self.image_size, self.channels


def open_split(data: Data, split: str, workdir: Path | None = None, keep: bool = True) -> Source:
    """Opens one split of a dataset, "train" or "test".

    Args:
      data: which; `folder`, `lmdb` and `tfds` say how each is split.
      workdir: whose `bad_files.txt` names images that cannot be read; None for the log alone.
      keep: whether to keep what was decoded, if it takes no more than 256 MiB.

    Returns:
      Examples {'image': uint8 (image_size, image_size, channels), 'label': int}, or with the
      features, float32, as the label. `examples.read(index, position)` crops elsewhere than in the
      centre.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if data.image_size < 1 or data.channels not in (1, 3):
        given = f"size {data.image_size} and {data.channels} channels"
        raise UserError(f"images must have a positive size and 1 or 3 channels, not {given}")
    if data.name == "folder":
        encoded = folder.open_images(
            *(data.path, split, data.table, data.texts), labelled=data.num_classes != 0
        )
    elif data.texts or data.table:
        raise UserError(f"data.table and data.texts are for data.name=folder, not {data.name!r}")
    elif data.name == "lmdb":
        encoded = lmdb.open_images(data.path, split)
    else:
        encoded = tfds.open_images(data.name, data.path, split)
    small = encoded.count * data.image_size**2 * data.channels <= _KEPT_BYTES and not data.texts
    images = DecodedImages(
        encoded,
        data.image_size,
        data.channels,
        keep=keep and small,
        max_broken=data.max_broken,
        report=workdir and workdir / "bad_files.txt",
    )
    digest = hashlib.sha256(encoded.names.encode("utf-8", "surrogatepass"))
    return Source(
        *(images, encoded.classes, digest.hexdigest()[:16], tuple(encoded.files)), encoded.captions
    )


def spread_indices(count: int, limit: int) -> np.ndarray:
    """Returns the indices of `limit` of `count` examples at most.

    They are spread evenly, because a folder lists one class after the other.
    """
    return np.linspace(0, count - 1, min(limit, count)).astype(int)


def load_images(source: Source, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images, uint8 (n, h, w, c), and labels (n, ...), of `spread_indices`."""
    examples = [source.examples[i] for i in spread_indices(len(source.examples), limit)]
    labels = np.array([example["label"] for example in examples])
    return np.stack([example["image"] for example in examples]), labels
