"""Caches the features of captions on disk; each distinct caption is encoded once.

A folder holds shards, and `info.json`, which is written last. A shard is two NumPy files:
`rows-...`, float16 (R, d), the concatenated rows of its captions, memory-mapped; and `ends-...`,
int64 (n,), where the rows of each caption end. A caption has one row, or one row per token.
"""

import hashlib
import json
import logging
import textwrap
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np

from binlatent.data import classes
from binlatent.runtime import files, locks
from binlatent.runtime.errors import UserError
from binlatent.runtime.progress import Progress, progress
from binlatent.runtime.strict_json import to_json, write_json
from binlatent.texts.encoder import TextEncoder

log = logging.getLogger(__name__)

_FORMAT = 1
_SHARD = 4_096  # captions per shard, at least
_MOST_SHARDS = 256  # each is an open file
_AT_ONCE = 256  # captions per call of the encoder


class CaptionFeatures:
    """A read-only mapping from captions to their features."""

    def __init__(self, folder: Path, captions: Sequence[str], per_token: bool):
        """Opens a complete folder of `write_features`; `captions` are its captions, in order."""
        self._folder, self._per_token = folder, per_token
        self._places = {caption: i for i, caption in enumerate(captions)}
        self._shards, self._parts = [], _parts(len(captions))
        try:
            info = json.loads((folder / "info.json").read_text())
            self.width = int(info["width"])
            for part, (rows, ends) in zip(self._parts, _names(len(captions)), strict=True):
                self._shards.append(self._open(len(part), folder / rows, folder / ends))
        except Exception as error:  # of many types, depending on the damage
            raise self._damaged(error) from error

    def _open(self, count: int, rows: Path, ends: Path) -> tuple[np.ndarray, np.ndarray]:
        mapped, ends = np.load(rows, mmap_mode="r"), np.load(ends)
        expected = np.dtype(np.float16), (int(ends[-1]), self.width), (count,)
        if (mapped.dtype, mapped.shape, ends.shape) != expected or np.any(
            np.diff(ends, prepend=0) < 1
        ):
            raise ValueError(f"{rows.name} has another type or shape")
        return mapped, ends

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"The features of captions in {self._folder} are damaged "
            f"({textwrap.shorten(str(error), 200)}): delete that folder and run the same "
            "command again."
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the longest caption's features: (e,), or (m, d) with m tokens."""
        longest = max((int(np.diff(ends, prepend=0).max()) for _, ends in self._shards), default=1)
        return (longest, self.width) if self._per_token else (self.width,)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, caption: str) -> np.ndarray:
        """Returns the features of a caption, float32 (e,), or (m, d) with its own m tokens."""
        number, i = divmod(self._places[caption], len(self._parts[0]))
        rows, ends = self._shards[number]
        features = rows[ends[i - 1] if i else 0 : ends[i]].astype(np.float32)
        return features if self._per_token else features[0]


def write_features(
    captions: Sequence[tuple[str, ...]], folder: Path, encoder: TextEncoder, per_token: bool
) -> CaptionFeatures:
    """Writes the features of captions in shards; resumes after an interruption.

    The folder's name depends on the encoder's weights and on the captions, so that outdated
    features are never used. Several processes share the shards.

    Args:
      captions: of each image, from `Source.captions`.
      folder: the parent of the new folder.
      encoder: its `TextEncoder.features` are rounded to float16.
      per_token: whether to write one vector per token, not one per text.
    """
    # Sorted, so that the order of the images does not matter.
    texts = sorted({caption for of_image in captions for caption in of_image})
    about = {"format": _FORMAT, "encoder": encoder.sha256, "per_token": per_token}
    content = to_json([about, texts]).encode()
    target = folder / hashlib.sha256(content).hexdigest()[:16]
    if (target / "info.json").exists():
        return CaptionFeatures(target, texts, per_token)
    parts, names, cut = _parts(len(texts)), _names(len(texts)), []
    this, turns = jax.process_index(), jax.process_count()
    doing = f"The features of captions in {target} are being written"
    # Process 0 locks the folder for all processes.
    with nullcontext() if this else locks.only_process(target / ".lock", doing):
        log.info("Computing the features of %d captions into %s", len(texts), target)
        with progress(len(texts), "captions", silent=bool(this)) as shown:
            for i, (part, (rows, ends)) in enumerate(zip(parts, names, strict=True)):
                if i % turns != this or (target / rows).exists():
                    shown.update(len(part), skipped=True)
                    continue
                shard = texts[part.start : part.stop]
                values, lengths = _compute(shard, encoder, per_token, cut, shown)
                # The rows are written last: the file shows that the shard is complete.
                _write(target / ends, np.cumsum(lengths))
                _write(target / rows, values)
        # If another process fails, this one is ended too.
        last = ["info.json"] if this else [rows for rows, _ in names]
        while not all((target / name).exists() for name in last):
            time.sleep(0.5)
        if not this:
            about |= {"count": len(texts), "width": encoder.width(per_token)}
            write_json(target / "info.json", about)
    if cut:
        classes.warn_once(
            f"{len(cut)} of {len(texts)} captions are cut at the {encoder.model.max_tokens} tokens "
            f"that the encoder reads, such as {textwrap.shorten(cut[0], 60)!r}"
        )
    return CaptionFeatures(target, texts, per_token)


def _compute(
    texts: Sequence[str], encoder: TextEncoder, per_token: bool, cut: list[str], shown: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of all texts, float16 (R, d), and the number of rows of each, (n,)."""
    rows, lengths = [], []
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        features = encoder.features(some, per_token, cut)
        features = features if per_token else features[:, None]
        if not np.abs(features).max(initial=0) <= np.finfo(np.float16).max:
            raise UserError(
                f"The text encoder {encoder.name!r} returned a NaN, an infinity or a number too "
                "large for float16: its weights are damaged, or those of another model."
            )
        # Rows of the padding are 0.
        used = np.any(features != 0, axis=-1)
        used[:, 0] = True
        rows.append(features[used].astype(np.float16))
        lengths.append(used.sum(axis=1))
        shown.update(len(some))
    return np.concatenate(rows), np.concatenate(lengths)


def _write(path: Path, array: np.ndarray) -> None:
    with files.atomic(path, alone=True) as unfinished, unfinished.open("wb") as file:
        np.save(file, array)


def _parts(count: int) -> list[range]:
    """Returns the range of captions in each shard."""
    size = max(_SHARD, -(-count // _MOST_SHARDS))
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _names(count: int) -> list[tuple[str, str]]:
    """Returns the names of each shard's two files."""
    total = len(_parts(count))
    numbers = [f"{i:05}-of-{total:05}.npy" for i in range(total)]
    return [(f"rows-{number}", f"ends-{number}") for number in numbers]
