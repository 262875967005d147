"""Reads image files, as squares of one size or whole, and reports damaged ones."""

import contextlib
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from binlatent.data import transforms
from binlatent.runtime.errors import UserError

# Pillow decodes these formats by itself; for EPS, for example, it runs another program.
_HAS_AVIF = "avif" in features.modules and features.check("avif")  # since Pillow 11.3
FORMATS = (
    *(("AVIF",) if _HAS_AVIF else ()),
    *("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"),
)
Image.init()  # registers all formats by name


class UnreadableImage(UserError):
    """An image that is missing, damaged or in none of `FORMATS`."""


class EncodedImages(NamedTuple):
    """The images of a split, not yet decoded."""

    count: int
    classes: tuple[str, ...]  # names in order of labels; () if unlabelled
    # Maps an index to the encoded image or its file, its name for messages, and its label.
    read: Callable[[int], tuple[str | BinaryIO, str, int | np.ndarray]]
    names: str  # names and labels of all images, for a fingerprint
    files: Sequence[str]  # the files of the images; () if they never change
    # Reads the captions of each image; None if the dataset has no captions.
    captions: Callable[[], list[tuple[str, ...]]] | None = None


def read_image(
    file: str | BinaryIO,
    image_size: int,
    channels: int,
    position: float = 0.5,
    what: str | None = None,
) -> np.ndarray:
    """Reads an image in one of `FORMATS` and applies `transforms.to_square`.

    Raises:
      UnreadableImage: if the image cannot be read; the message names it `what`, or by its path.
    """
    with _opened(file, what or repr(file)) as image:
        return transforms.to_square(image, image_size, channels, position)


def read_whole(file: str, what: str) -> np.ndarray:
    """Reads an image at its own size, upright, uint8 (h, w, 3); raises as `read_image`."""
    with _opened(file, what) as image:
        return np.asarray(transforms.to_channels(image, 3))


@contextlib.contextmanager
def _opened(file: str | BinaryIO, what: str) -> Iterator[Image.Image]:
    """Opens an image; any error in the block becomes UnreadableImage."""
    cannot = f"cannot read the image {what}, replace or remove it"
    if isinstance(file, str) and os.path.exists(file) and not os.path.isfile(file):
        # Reading from a pipe would block.
        raise UnreadableImage(f"{cannot}: it is not a file")
    try:
        with contextlib.ExitStack() as stack:
            # Given a name, Pillow maps an uncompressed TIFF into memory, and garbles a rotated one.
            stream = stack.enter_context(open(file, "rb")) if isinstance(file, str) else file
            yield stack.enter_context(Image.open(stream, formats=FORMATS))
    except FileNotFoundError as error:
        raise UnreadableImage(f"there is no image {what}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{cannot}: its format is not one of {', '.join(FORMATS)}") from error
    except Exception as error:  # of many types, depending on format and damage
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise UnreadableImage(f"{cannot}: {reason}") from error
