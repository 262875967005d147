"""Converts Pillow images to square uint8 arrays, and uint8 to models' floats and back."""

import numpy as np
from PIL import Image, ImageOps


def to_square(
    image: Image.Image, image_size: int, channels: int, position: float = 0.5
) -> np.ndarray:
    """Returns an image upright, its shorter side scaled to `image_size`, cropped to a square.

    An image that already has the right size and mode keeps its values. `position`, in [0, 1],
    places the square along the longer side: 0.5 is the centre. `channels` as in `to_channels`.

    Returns:
      uint8 (image_size, image_size, channels).
    """
    image = to_channels(image, channels)
    width, height = image.size
    if (width, height) != (image_size, image_size):
        side = min(width, height)
        left, top = int(position * (width - side)), int(position * (height - side))
        # Crops and resizes in one call, with antialiasing.
        box = (left, top, left + side, top + side)
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box)
    return np.asarray(image).reshape(image_size, image_size, channels)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Returns an image upright, with 8 bits and one channel (luminance) or three (RGB).

    Transparency is composited on white. 16-bit values are scaled to 8 bits.

    Raises:
      ValueError: for floating-point images (mode "F"), whose range is unknown.
    """
    _mark_transparent(image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point images have no fixed range, convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit values at 255.
        values = np.clip(np.asarray(image, np.float64), 0, 65535)
        if "transparency" in image.info:  # in PNG, one value that is transparent
            values[values == image.info["transparency"]] = 65535
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _mark_transparent(image: Image.Image) -> None:
    """Makes Pillow find the transparent colour of a PNG that does not have 8 bits.

    The file gives the colour at its own depth; Pillow compares it with values scaled to 8 bits.
    """
    if image.format != "PNG" or "transparency" not in image.info or not image.tile:
        return
    colour, stored = image.info["transparency"], image.tile[0][3]
    if stored in _GREY_STEPS:
        step = _GREY_STEPS[stored]
        image.info["transparency"] = colour % (255 // step + 1) * step
    elif stored == "RGB;16B":
        low, high = _low_bytes(image), np.asarray(image)
        clear = (high * np.uint16(256) + low == colour).all(axis=-1)
        image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
        del image.info["transparency"]


# Pillow's factor for the values of a greyscale PNG with 2 or 4 bits, by raw mode.
_GREY_STEPS = {"L;2": 85, "L;4": 17}


def _low_bytes(image: Image.Image) -> np.ndarray:
    """Returns the lower bytes of the values of a 16-bit colour PNG, uint8 (h, w, 3).

    Pillow itself reads only the upper bytes. The image must not be loaded yet.
    """
    place = image.fp.tell()
    image.fp.seek(0)
    again = Image.open(image.fp, formats=["PNG"])
    again.tile = [(*again.tile[0][:3], "RGB;16L")]
    values = np.asarray(again)
    image.fp.seek(place)
    return values


def to_float(images: np.ndarray) -> np.ndarray:
    """Maps uint8 values 0..255, of any shape, to float32 in [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Inverts `to_float`: maps floats in [-1, 1], of any shape, to uint8, rounded and clipped."""
    return np.clip(np.rint((np.asarray(images, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
