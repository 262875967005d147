"""Reads images, of which some may be damaged: as squares of one size, or whole."""

import contextlib
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from binlatent.data import transforms
from binlatent.runtime.errors import UserError

# Pillow's decoders of these run no other program, as that of EPS does.
_HAS_AVIF = "avif" in features.modules and features.check("avif")  # since Pillow 11.3
FORMATS = (
    *(("AVIF",) if _HAS_AVIF else ()),
    *("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"),
)
Image.init()  # for Pillow to know all of them by name


class UnreadableImage(UserError):
    """An image that is missing, damaged or in none of `FORMATS`."""


class EncodedImages(NamedTuple):
    """The images of a split, as their files have them."""

    count: int
    classes: tuple[str, ...]  # names by number; (): unlabelled
    # Returns the encoded image of an index, or its file; its name for messages; its label.
    read: Callable[[int], tuple[str | BinaryIO, str, int | np.ndarray]]
    names: str  # of all images, with their labels
    files: Sequence[str]  # that they lie in, where these can be changed
    # Reads the captions of each image, () for none; None where the dataset has none.
    captions: Callable[[], list[tuple[str, ...]]] | None = None


def read_image(
    file: str | BinaryIO, what: str, image_size: int, channels: int, position: float = 0.5
) -> np.ndarray:
    """Returns an image of any of `FORMATS`, as `transforms.to_square` does.

    Raises:
      UnreadableImage: if it cannot be read, calling it `what`.
    """
    with _opened(file, what) as image:
        return transforms.to_square(image, image_size, channels, position)


def read_whole(file: str, what: str) -> np.ndarray:
    """Returns an image upright, at its own size, uint8 (h, w, 3); raises as `read_image`."""
    with _opened(file, what) as image:
        return np.asarray(transforms.to_channels(image, 3))


@contextlib.contextmanager
def _opened(file: str | BinaryIO, what: str) -> Iterator[Image.Image]:
    """Opens an image; what is raised inside becomes UnreadableImage too."""
    cannot = f"cannot read the image {what}, replace or remove it"
    if isinstance(file, str) and os.path.exists(file) and not os.path.isfile(file):
        # Reading from a pipe would not end.
        raise UnreadableImage(f"{cannot}: it is no file")
    try:
        with contextlib.ExitStack() as stack:
            # By its name, Pillow would map an uncompressed TIFF, and garble one that is turned.
            stream = stack.enter_context(open(file, "rb")) if isinstance(file, str) else file
            yield stack.enter_context(Image.open(stream, formats=FORMATS))
    except FileNotFoundError as error:
        raise UnreadableImage(f"there is no image {what}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{cannot}: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # what a damaged file raises depends on its format
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise UnreadableImage(f"{cannot}: {reason}") from error
