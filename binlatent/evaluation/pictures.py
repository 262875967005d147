"""The pictures of a run, as uint8 arrays (height, width, channels)."""

from typing import Any

import jax
import numpy as np

from binlatent.data.transforms import to_uint8
from binlatent.pipeline import BinaryLatentDiffusion
from binlatent.runtime import png


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
    label: Any = None,
    **options: Any,
) -> np.ndarray:
    """Draws samples: ten of each class, a row a class, unless `num` or `label` say otherwise.

    Args:
      pipeline: with a prior.
      key: a typed PRNG key.
      num: how many; their classes take turns.
      label: of all of them, as of `BinaryLatentDiffusion.sample`.
      **options: of `BinaryLatentDiffusion.sample`.
    """
    all_classes, labels = class_rows(pipeline.num_classes)
    if label is not None:
        labels = label
    elif num is not None and pipeline.num_classes:
        labels = np.arange(num) % pipeline.num_classes
    num = all_classes if num is None else num
    return png.grid(as_rows(pipeline.sample(num, key, labels, **options)))


def reconstructions(pipeline: BinaryLatentDiffusion, images: np.ndarray) -> np.ndarray:
    """Draws images above their reconstructions, ten a row."""
    pairs = zip(as_rows(images), as_rows(pipeline.reconstruct(images)), strict=True)
    return png.grid([row for pair in pairs for row in pair])


def inpaintings(
    pipeline: BinaryLatentDiffusion,
    images: np.ndarray,
    keep: np.ndarray,
    label: Any,
    key: jax.Array,
    num: int = 6,
    **options: Any,
) -> np.ndarray:
    """Draws, a row an image: the image, the part of it that is given, and `num` completions.

    Args:
      pipeline: with a prior.
      images: float in [-1, 1].
      keep: bool (n, height, width), True where a pixel is given.
      label: as of `BinaryLatentDiffusion.inpaint`.
      key: a typed PRNG key.
      num: completions an image.
      **options: of `BinaryLatentDiffusion.inpaint`.
    """
    completions = [
        pipeline.inpaint(images, keep, jax.random.fold_in(key, i), label, **options)
        for i in range(num)
    ]
    given = np.where(keep[..., None], images, 0.0)  # grey where hidden
    columns = [to_uint8(column) for column in (images, given, *completions)]
    return png.grid(list(np.stack(columns, axis=1)))


def variations(
    pipeline: BinaryLatentDiffusion,
    images: np.ndarray,
    label: Any,
    key: jax.Array,
    num: int = 6,
    **options: Any,
) -> np.ndarray:
    """Draws, a row an image: the image and `num` variations of it.

    Args:
      pipeline, images, label, key: as of `inpaintings`.
      num: variations an image.
      **options: of `BinaryLatentDiffusion.vary`.
    """
    varied = [
        pipeline.vary(images, jax.random.fold_in(key, i), label, **options) for i in range(num)
    ]
    return png.grid(list(np.stack([to_uint8(x) for x in (images, *varied)], axis=1)))


def trajectory(pipeline: BinaryLatentDiffusion, key: jax.Array, columns: int = 9) -> np.ndarray:
    """Draws z_t decoded along the way, from noise to sample, a row a sample."""
    num, labels = class_rows(pipeline.num_classes, columns=1)
    states = pipeline.trajectory(num, key, labels).z_t
    shown = np.unique(np.linspace(0, states.shape[1] - 1, columns).round().astype(int))
    return png.grid([to_uint8(pipeline.decode(row[shown])) for row in states])
