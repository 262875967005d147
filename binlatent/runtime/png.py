"""Pictures of arrays of images: grids, and PNG files."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP = 2
_BACKGROUND = 96


def grid(rows: Sequence[np.ndarray], titles: Sequence[str] | None = None) -> np.ndarray:
    """Lays out rows of images with gaps, titles on the left.

    Args:
      rows: uint8 (n, h, w, channels) each.
      titles: one a row, of which 20 characters are shown; the letters are those of DejaVu Sans.

    Returns:
      uint8 (height, width, channels).
    """
    images = np.stack(rows)
    num_rows, num_columns, h, w, channels = images.shape
    pad = ((0, 0), (0, 0), (_GAP, 0), (_GAP, 0), (0, 0))
    cells = np.pad(images, pad, constant_values=_BACKGROUND)
    height, width = num_rows * (h + _GAP), num_columns * (w + _GAP)
    sheet = cells.transpose(0, 2, 1, 3, 4).reshape(height, width, channels)
    sheet = np.pad(sheet, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=_BACKGROUND)
    if titles is None:
        return sheet
    lines = [" ".join(title.split()) for title in titles]
    shown = [line if len(line) <= 20 else f"{line[:19]}…" for line in lines]
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font = ImageFont.truetype(file, min(max(h // 3, 10), 24))
    width = _GAP + math.ceil(max(font.getlength(title) for title in shown))
    margin = Image.new("L", (width, len(sheet)), _BACKGROUND)
    draw = ImageDraw.Draw(margin)
    for row, title in enumerate(shown):
        middle = _GAP + row * (h + _GAP) + h // 2
        draw.text((_GAP, middle), title, fill=255, font=font, anchor="lm")
    letters = np.asarray(margin)[..., None].repeat(channels, axis=-1)
    return np.concatenate([letters, sheet], axis=1)


def save_png(path: Path, image: np.ndarray, min_side: int = 400) -> None:
    """Writes uint8 (height, width, 1 or 3) as PNG; makes the folder.

    An image whose longer side has fewer than `min_side` pixels is enlarged by a whole factor.
    """
    factor = -(-min_side // max(image.shape[:2]))
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
