"""The training set's encoder probabilities on disk, for stage 2 (config.prior.cache_codes)."""

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from binlatent.data import loader
from binlatent.data.sources import Source
from binlatent.pipeline import BinaryLatentDiffusion

log = logging.getLogger(__name__)


class CachedCodes:
    """Random access to {"probs": float16 (h, w, c), "label": ...} of each training image."""

    def __init__(self, folder: Path):
        """Maps the files of `folder` into memory."""
        self._probs = np.load(folder / "probs.npy", mmap_mode="r", allow_pickle=False)
        self._labels = np.load(folder / "labels.npy", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._probs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"probs": np.array(self._probs[index]), "label": np.array(self._labels[index])}


def cached_codes(pipeline: BinaryLatentDiffusion, source: Source, folder: Path) -> Source:
    """Returns the source of a training set's codes, encoding it first if need be.

    Probabilities are stored, in float16, and not bits: the prior draws its bits anew each time, so
    no noise is frozen in. They lie in a folder named after the encoder's weights and the dataset,
    so codes of another encoder are never read; it appears only when it is complete. Of several
    processes the first encodes, and the others wait for it.

    Args:
      pipeline: with the frozen encoder.
      source: of the training images.
      folder: of all caches, workdir/codes.
    """
    data = {**pipeline.config.data.to_dict(), "count": len(source.examples)}
    dataset = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
    target = folder / f"{pipeline.encoder_fingerprint}_{dataset}"
    while jax.process_index() and not target.exists():
        time.sleep(0.5)  # if process 0 fails, this one is ended
    if not target.exists():
        log.info("Encoding %d training images into %s", len(source.examples), target)
        unfinished = target.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        probs = np.lib.format.open_memmap(
            unfinished / "probs.npy",
            mode="w+",
            dtype=np.float16,
            shape=(len(source.examples), *pipeline.code_shape),
        )
        labels, start = [], 0
        for batch, mask in loader.test_batches(source, pipeline.config.sample.batch_size):
            real = int(mask.sum())
            stop = start + real
            probs[start:stop] = pipeline.encode_probs(batch["image"])[:real]
            labels.append(batch["label"][:real])
            start = stop
        probs.flush()
        np.save(unfinished / "labels.npy", np.concatenate(labels))
        os.replace(unfinished, target)
    return Source(CachedCodes(target), source.num_classes)
