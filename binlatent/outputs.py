"""The pictures of a run, as uint8 arrays (height, width, channels)."""

from typing import Any

import jax
import numpy as np

from binlatent import figures
from binlatent.data.transforms import to_uint8
from binlatent.pipeline import BinaryLatentDiffusion


def class_rows(num_classes: int, columns: int = 10) -> tuple[int, np.ndarray | None]:
    """Returns how many samples a grid of a row a class takes, and their labels.

    At most ten classes, spread over all of them; ten rows without labels if there are none.
    """
    if not num_classes:
        return 10 * columns, None
    classes = np.unique(np.linspace(0, num_classes - 1, 10).round().astype(np.int32))
    return len(classes) * columns, np.repeat(classes, columns)


def as_rows(images: np.ndarray, columns: int = 10) -> list[np.ndarray]:
    """Cuts images, float in [-1, 1], into uint8 rows of `columns`, the last filled up black."""
    images = to_uint8(images)
    columns = min(columns, len(images))
    images = np.pad(images, ((0, -len(images) % columns), (0, 0), (0, 0), (0, 0)))
    return list(images.reshape(-1, columns, *images.shape[1:]))


def samples(
    pipeline: BinaryLatentDiffusion,
    key: jax.Array,
    num: int | None = None,
    label: int | None = None,
    **options: Any,
) -> np.ndarray:
    """Draws samples: ten of each class, a row a class, unless `num` or `label` say otherwise.

    Args:
      pipeline: with a prior.
      key: a typed PRNG key.
      num: how many; their classes take turns.
      label: the class of all of them.
      **options: of `BinaryLatentDiffusion.sample`.
    """
    all_classes, labels = class_rows(pipeline.num_classes)
    if label is not None:
        labels = label
    elif num is not None and pipeline.num_classes:
        labels = np.arange(num) % pipeline.num_classes
    num = all_classes if num is None else num
    return figures.grid(as_rows(pipeline.sample(num, key, labels, **options)))


def reconstructions(pipeline: BinaryLatentDiffusion, images: np.ndarray) -> np.ndarray:
    """Draws images above their reconstructions, ten a row."""
    pairs = zip(as_rows(images), as_rows(pipeline.reconstruct(images)), strict=True)
    return figures.grid([row for pair in pairs for row in pair])


def half_masks(height: int, width: int) -> list[np.ndarray]:
    """Returns four masks, bool (height, width), that keep one half of the image each."""
    y, x = np.mgrid[:height, :width]
    return [y < height // 2, y >= height // 2, x < width // 2, x >= width // 2]


def inpaintings(
    pipeline: BinaryLatentDiffusion,
    images: np.ndarray,
    labels: np.ndarray,
    key: jax.Array,
    **options: Any,
) -> np.ndarray:
    """Draws, a row an image: the image, the half of it that is given, and six completions.

    Args:
      pipeline: with a prior.
      images: float in [-1, 1]; each row in turn keeps its top, bottom, left or right half.
      labels: of the images, given to the prior if it has classes.
      key: a typed PRNG key.
      **options: of `BinaryLatentDiffusion.inpaint`.
    """
    n, height, width, _ = images.shape
    masks = np.stack([half_masks(height, width)[i % 4] for i in range(n)])
    label = labels if pipeline.num_classes else None
    completions = [
        pipeline.inpaint(images, masks, jax.random.fold_in(key, i), label, **options)
        for i in range(6)
    ]
    given = np.where(masks[..., None], images, 0.0)  # grey where hidden
    columns = [to_uint8(column) for column in (images, given, *completions)]
    return figures.grid(list(np.stack(columns, axis=1)))


def trajectory(pipeline: BinaryLatentDiffusion, key: jax.Array, columns: int = 9) -> np.ndarray:
    """Draws z_t decoded along the way, from noise to sample, a row a sample."""
    num, labels = class_rows(pipeline.num_classes, columns=1)
    states = pipeline.trajectory(num, key, labels)
    shown = np.unique(np.linspace(0, states.shape[1] - 1, columns).round().astype(int))
    return figures.grid([to_uint8(pipeline.decode(row[shown])) for row in states])
