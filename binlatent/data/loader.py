"""The Grain pipeline: endless shuffled training batches, and one pass in order."""

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
    """Yields shuffled batches without end, reshuffled each epoch; the seed alone fixes the order.

    `get_state()` of the iterator is a small dictionary that JSON can hold; `set_state()` with it
    resumes at the very next batch. `close()` ends its threads.

    Args:
      source: of images with labels, or of other dictionaries of equally shaped arrays.
      batch_size: examples a batch, on this host. It may exceed the number of examples.
      seed: of the shuffling, 0 to 2**32 - 1, and with the place in the stream of what is drawn.
      num_threads: threads that prepare batches ahead, a core each if None, and at least 4; 0
        prepares each batch when it is asked for. Batches held ready are 8, and one a thread.
      shard: (index, count) of this host, which gets its run of each batch of all hosts, so that
        these are the same however many hosts there are; the state is of any of them.
      random_crop: crop the squares anywhere along the longer side, not in the centre.
      random_flip: mirror every other image.
      random_caption: take any of an image's captions, not the first, where the examples are of
        `binlatent.texts.captioned`.

    Returns:
      An iterator of {'image': float32 (b, h, w, c) in [-1, 1], 'label': int32 (b,), or float32
      with the features of texts}; keys other than these two keep their values.
    """
    index, count = shard
    # Repeated before it is dealt out: hosts need no equal shares, and a batch may span epochs.
    examples = source.examples

    def augment(index: int, random: np.random.Generator) -> dict[str, Any]:
        # What is drawn last is the caption, so that the others do not depend on it.
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
    """Yields `read(0)` to `read(count - 1)` in order, in stacked batches, the last one smaller.

    `read` returns an array or a dictionary of arrays; threads call it ahead.
    """
    return _read_ahead(grain.MapDataset.range(count).map(read).batch(batch_size))


def _read_ahead(dataset: Any, num_threads: int | None = None, at_least: int = 0) -> Any:
    """Returns an iterator over a dataset, which holds entries ready, one a thread or more."""
    if num_threads is None:
        num_threads = max(4, machine.cores())
    ready = max(at_least, num_threads) if num_threads else 0
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads, ready)))


def _to_arrays(batch: dict[str, Any]) -> Batch:
    # Whole batches at once: a conversion an example costs more than the arithmetic.
    label = np.asarray(batch["label"])
    batch = dict(batch, label=label.astype(np.float32 if label.dtype.kind == "f" else np.int32))
    if "image" in batch:
        batch["image"] = transforms.to_float(batch["image"])
    return batch
