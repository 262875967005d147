"""The Grain pipeline: endless shuffled training batches, and one ordered pass."""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from binlatent.data import transforms
from binlatent.data.sources import Source
from binlatent.runtime import machine

Batch = dict[str, np.ndarray]


def train_batches(
    source: Source,
    batch_size: int,
    seed: int,
    num_threads: int | None = None,
    shard: tuple[int, int] = (0, 1),
    *,
    random_crop: bool = False,
    random_flip: bool = False,
    random_caption: bool = False,
) -> grain.DatasetIterator:
    """Yields shuffled batches without end; each epoch has its own order, fixed by the seed.

    `get_state()` of the iterator returns a small dictionary for JSON, and `set_state()` resumes at
    the next batch. `close()` ends its threads.

    Args:
      source: of images with labels, or of other dictionaries of equally shaped arrays.
      batch_size: examples per batch on this host. It may exceed the number of examples.
      seed: of the shuffling and the augmentation, 0 to 2**32 - 1.
      num_threads: threads that prepare batches ahead; None for one per core, and at least 4. They
        hold 8 batches ready, or one per thread if that is more. 0 prepares batches on request.
      shard: (index, count) of this host. It gets a contiguous part of each global batch, so that
        global batches and the iterator's state do not depend on the number of hosts.
      random_crop: whether to crop at a random place along the longer side, not at the centre.
      random_flip: whether to mirror images with probability 1/2.
      random_caption: whether to draw one of an image's captions rather than take the first. The
        examples must be those of `binlatent.texts.captioned`.

    Returns:
      An iterator of {'image': float32 (b, h, w, c) in [-1, 1], 'label': int32 (b,), or float32
      features of texts}; other keys keep their values.
    """
    index, count = shard
    # Repeated before it is split: hosts need no equal shares, and a batch may span epochs.
    examples = source.examples

    def augment(index: int, random: np.random.Generator) -> dict[str, Any]:
        # The caption is drawn last, so that crops and flips do not depend on it.
        position = random.random() if random_crop else 0.5
        mirrored = random_flip and random.random() < 0.5
        if random_caption:
            example = examples.read(index, position, random.random())
        else:
            example = examples.read(index, position) if random_crop else examples[index]
        if mirrored:
            example = dict(example, image=example["image"][:, ::-1])
        return example

    dataset = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat()
    drawn = random_crop or random_flip or random_caption
    dataset = dataset.random_map(augment) if drawn else dataset.map(examples.__getitem__)
    dataset = dataset.batch(batch_size, drop_remainder=True)
    if count > 1:
        dataset = dataset[index::count]
    dataset = dataset.map(_to_arrays)
    return _read_ahead(dataset, num_threads, at_least=8)


def in_order(count: int, read: Callable[[int], Any], batch_size: int) -> Iterator[Any]:
    """Yields `read(0)` to `read(count - 1)` in stacked batches; the last one may be smaller.

    `read` returns an array or a dictionary of arrays. Threads call it ahead of time.
    """
    return _read_ahead(grain.MapDataset.range(count).map(read).batch(batch_size))


def _read_ahead(dataset: Any, num_threads: int | None = None, at_least: int = 0) -> Any:
    """Returns an iterator that holds entries ready, at least one per thread."""
    if num_threads is None:
        num_threads = max(4, machine.cores())
    ready = max(at_least, num_threads) if num_threads else 0
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads, ready)))


def _to_arrays(batch: dict[str, Any]) -> Batch:
    # For the whole batch: one conversion per example would cost more than the arithmetic.
    label = np.asarray(batch["label"])
    batch = dict(batch, label=label.astype(np.float32 if label.dtype.kind == "f" else np.int32))
    if "image" in batch:
        batch["image"] = transforms.to_float(batch["image"])
    return batch
