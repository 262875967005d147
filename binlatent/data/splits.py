"""The dataset of an experiment, and its two splits."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from binlatent.data import folder, lmdb, tfds
from binlatent.data.decoded import DecodedImages
from binlatent.data.sources import Source
from binlatent.runtime.errors import UserError
from binlatent.runtime.progress import progress

# Up to this size, decoded images stay in memory: decoding competes with training for the CPU.
_KEPT_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Data:
    """The dataset of an experiment, and how its images are read."""

    name: str  # "folder", "lmdb", "digits" or any other TFDS name, such as "celeb_a_hq/256"
    path: str  # of the folder of images or of LMDB; TFDS's data directory, "" for the default one
    image_size: int  # side in pixels
    channels: int  # 1 or 3
    table: str = ""  # for a folder: a .csv or .jsonl file that lists the images
    texts: bool = False  # for a folder: labels are features of texts, (e,) or (m, e)
    crop: str = "centre"  # in training: "centre", or "random" along the longer side
    flip: bool = False  # whether training mirrors images with probability 1/2
    max_broken: float = 0.0  # share of images that may be unreadable; others replace them
    num_classes: int = -1  # -1: as many as the dataset has; 0: labels are ignored

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.image_size, self.image_size, self.channels


def open_split(data: Data, split: str, workdir: Path | None = None, keep: bool = True) -> Source:
    """Opens one split of a dataset, "train" or "test".

    Args:
      data: the dataset; the modules `folder`, `lmdb` and `tfds` document how each is split.
      workdir: its file `bad_files.txt` lists unreadable images; without one, only the log does.
      keep: whether to keep decoded images in memory, if they take no more than 256 MiB.

    Returns:
      Examples {'image': uint8 (image_size, image_size, channels), 'label': int, or float32
      features of a text}. `examples.read(index, position)` crops elsewhere than at the centre.
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
    """Returns at most `limit` of `count` indices, evenly spread.

    Folders list one class after the other, so the first images would be of few classes.
    """
    return np.linspace(0, count - 1, min(limit, count)).astype(int)


def load_images(source: Source, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images, uint8 (n, h, w, c), and labels (n, ...), at `spread_indices`."""
    indices, examples = spread_indices(len(source.examples), limit), []
    with progress(len(indices), "images read", bar=False) as shown:
        for i in indices:
            examples.append(source.examples[i])
            shown.update()
    labels = np.array([example["label"] for example in examples])
    return np.stack([example["image"] for example in examples]), labels
