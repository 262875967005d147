"""The data of an experiment, and the images of its two splits."""

import dataclasses
from pathlib import Path

import numpy as np

from binlatent.data import sources
from binlatent.data.sources import Source


@dataclasses.dataclass(frozen=True)
class Data:
    """Which images there are, and how they are read."""

    name: str  # "folder", "lmdb", or the name of a TFDS dataset
    path: str  # of the folder, or of TFDS's data directory, "" for the default one
    image_size: int  # side in pixels
    channels: int  # 1 or 3
    table: str = ""  # of a folder, a file that lists the images
    texts: bool = False  # whether the labels are the features of texts
    crop: str = "centre"  # or "random", along the longer side, in training
    flip: bool = False  # whether training mirrors every other image
    max_broken: float = 0.0  # share of images that may be unreadable
    num_classes: int = -1  # -1: what the dataset has; 0: its labels are ignored

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.image_size, self.image_size, self.channels


def open_split(data: Data, split: str, workdir: Path | None = None, keep: bool = True) -> Source:
    """Opens the split "train" or "test"; `keep` as of `sources.open_source`.

    Images that cannot be read are named in `bad_files.txt` of the workdir, if there is one.
    """
    return sources.open_source(
        *(data.name, data.path, split, data.image_size, data.channels),
        table=data.table,
        texts=data.texts,
        max_broken=data.max_broken,
        bad_files=workdir and workdir / "bad_files.txt",
        keep=keep,
    )


def load_images(source: Source, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images, uint8 (n, h, w, c), and labels (n, ...), `limit` of a source at most.

    They are spread evenly over it, because a folder lists one class after the other.
    """
    count = len(source.examples)
    indices = np.linspace(0, count - 1, min(limit, count)).astype(int)
    examples = [source.examples[i] for i in indices]
    labels = np.array([example["label"] for example in examples])
    return np.stack([example["image"] for example in examples]), labels
