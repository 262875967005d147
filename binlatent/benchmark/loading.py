"""Measures the images per second of the training loader."""

import logging
import statistics
import time

import numpy as np

from binlatent.benchmark import rows
from binlatent.benchmark.rows import Row
from binlatent.data import loader, splits
from binlatent.data.splits import Data

log = logging.getLogger("binlatent.benchmark")


def measure_loading(data: Data, seed: int, batch_size: int, seconds: float = 20.0) -> Row:
    """Returns the images per second of the training loader, and what that depends on.

    `images_per_second` is the median over up to ten parts of the `seconds`. Time starts after the
    prefetched batches. JAX's devices are not used.
    """
    # Each image is decoded, as for large data.
    source = splits.open_split(data, "train", keep=False)
    augment = {"random_crop": data.crop == "random", "random_flip": data.flip}
    batches = loader.train_batches(source, batch_size, seed, **augment)
    log.info("Measuring %s at batch size %d", data.name, batch_size)
    for _ in range(10):
        next(batches)
    times = [time.perf_counter()]
    while times[-1] - times[0] < seconds:
        next(batches)
        times.append(time.perf_counter())
    # Several batches can arrive at once, so times are averaged over parts.
    tenths = np.array_split(np.diff(times), min(10, len(times) - 1))
    speeds = [batch_size / float(np.mean(part)) for part in tenths]
    return {
        "data": data.name,
        "image_size": data.image_size,
        "batch_size": batch_size,
        "images_per_second": statistics.median(speeds),
        "images_per_second_min": min(speeds),
        "images_per_second_max": max(speeds),
        **rows.place(),
    }


COLUMNS: rows.Columns = {
    "data": lambda row: row["data"],
    "image": lambda row: row["image_size"],
    "batch": lambda row: row["batch_size"],
    "images/s (least to most)": lambda row: rows.show_range(
        row, "images_per_second", "{:.0f}".format
    ),
}
