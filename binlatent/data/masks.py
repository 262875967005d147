"""Masks for inpainting: presets (supplement, Figure N), and masks from files."""

import numpy as np
from PIL import Image, ImageDraw

from binlatent.data.images import read_image, read_whole
from binlatent.runtime.errors import UserError

# Named after the part that is redrawn.
PRESETS = ("centre", "top", "bottom", "left", "right", "strokes", "outpainting")

_WHITE = 128  # pixels of at least this value are redrawn


def preset_name(mask: str) -> str | None:
    """Returns the preset that a word names, in any case, or None; "center" is "centre"."""
    name = "centre" if mask.lower() == "center" else mask.lower()
    return name if name in PRESETS else None


def preset(name: str, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Returns one of `PRESETS`, bool (height, width) in pixels, True where a pixel is kept.

    "centre" redraws the central square of half the side, "outpainting" everything else, "top" to
    "right" one half, and "strokes" thick random strokes.
    """
    y, x = np.mgrid[:height, :width]
    centre = (abs(2 * y + 1 - height) < height / 2) & (abs(2 * x + 1 - width) < width / 2)
    kept = {
        "centre": ~centre,
        "outpainting": centre,
        "top": y >= height // 2,
        "bottom": y < height // 2,
        "left": x >= width // 2,
        "right": x < width // 2,
    }
    return kept[name] if name in kept else ~_strokes(height, width, seed)


def _strokes(height: int, width: int, seed: int) -> np.ndarray:
    """Returns where random strokes pass, bool (height, width); they cover at least a fifth."""
    rng = np.random.default_rng(seed)
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    thickness = max(min(height, width) // 8, 1)
    while np.mean(np.asarray(canvas) > 0) < 0.2:
        point = rng.uniform((0, 0), (width, height))
        for _ in range(4):
            step = rng.uniform(-0.3, 0.3, 2) * (width, height)
            end = np.clip(point + step, 0, (width - 1, height - 1))
            draw.line([*point, *end], fill=255, width=thickness)
            point = end
    return np.asarray(canvas) > 0


def read_mask(path: str, image_path: str, image_size: int) -> np.ndarray:
    """Reads a mask, bool (image_size, image_size), True where a pixel is kept.

    White and transparent pixels are redrawn, black ones are kept. The mask must have the size of
    the image in `image_path`, both upright, and is cropped and scaled like that image.
    """
    sizes = [read_whole(file, repr(file)).shape[1::-1] for file in (path, image_path)]
    if sizes[0] != sizes[1]:
        own, wanted = (f"{width}x{height}" for width, height in sizes)
        raise UserError(
            f"The mask {path} must have the size of the image, {wanted}, not {own} (both "
            "after rotation by their EXIF tags)."
        )
    side = min(sizes[0])
    # Thresholded at its own size: a pixel of the result is hidden if any part of it is.
    values = read_image(path, side, 1)[..., 0]
    shares = Image.fromarray((values >= _WHITE).astype(np.float32))
    hidden = np.asarray(shares.resize((image_size, image_size), Image.Resampling.BOX)) > 0
    if not hidden.any():
        raise UserError(
            f"The mask {path} has no white pixel in the centre square, the part of an image that "
            "is used: nothing would be redrawn."
        )
    return ~hidden


def known_tokens(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Returns the known tokens of a code, bool (n, h, w): those with all pixels known.

    The mask is bool (n, height, width). The `grid`, (h, w), must divide its size.
    """
    n, height, width = mask.shape
    h, w = grid
    return mask.reshape(n, h, height // h, w, width // w).all(axis=(2, 4))
