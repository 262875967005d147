"""Grids of images, and PNG files."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 400  # pixels of the longer side that a picture is enlarged to

_GAP = 2
_BACKGROUND = 96


def grid(
    rows: Sequence[np.ndarray],
    titles: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
) -> np.ndarray:
    """Lays out rows of images with gaps, titles on the left, captions below.

    Args:
      rows: uint8 (n, h, w, channels) each.
      titles: one per row, shortened to 20 characters; drawn in DejaVu Sans.
      captions: one per row, shortened to three lines.

    Returns:
      uint8 (height, width, channels).
    """
    images = np.stack(rows)
    num_rows, num_columns, h, w, channels = images.shape
    font = _font(h)
    width = num_columns * (w + _GAP)
    shown = [_wrapped(caption, font, width - _GAP) for caption in captions or ()]
    line_height = sum(font.getmetrics())
    below = line_height * max(map(len, shown), default=0) + _GAP * bool(shown)
    pad = ((0, 0), (0, 0), (_GAP, below), (_GAP, 0), (0, 0))
    cells = np.pad(images, pad, constant_values=_BACKGROUND)
    height = num_rows * (h + _GAP + below)
    sheet = cells.transpose(0, 2, 1, 3, 4).reshape(height, width, channels)
    sheet = np.pad(sheet, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=_BACKGROUND)
    tops = _GAP + np.arange(num_rows) * (h + _GAP + below)
    if captions is not None:
        for top, lines in zip(tops + h, shown, strict=True):
            middles = [_GAP + line_height * i + line_height // 2 for i in range(len(lines))]
            letters = _letters(lines, middles, font, (below, width + _GAP))
            sheet[top : top + below] = letters[..., None]
    if titles is None:
        return sheet
    lines = [" ".join(title.split()) for title in titles]
    shown = [line if len(line) <= 20 else f"{line[:19]}…" for line in lines]
    width = _GAP + math.ceil(max(font.getlength(title) for title in shown))
    letters = _letters(shown, tops + h // 2, font, (len(sheet), width))
    return np.concatenate([letters[..., None].repeat(channels, axis=-1), sheet], axis=1)


def _font(height: int) -> ImageFont.FreeTypeFont:
    """Returns a font for images of this height."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(file, min(max(height // 3, 10), 24))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wraps a text into at most three lines of at most `width` pixels; words may be cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > 3:
        lines[2:] = [" ".join(lines[2:])]
    return [_fitting(line, font, width) for line in lines]


def _fitting(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shortens a line to at most `width` pixels."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


def _letters(
    lines: Sequence[str],
    middles: Sequence[int],
    font: ImageFont.FreeTypeFont,
    shape: tuple[int, int],
) -> np.ndarray:
    """Draws each line of text centred at its height, on the background; uint8 of the shape."""
    margin = Image.new("L", shape[::-1], _BACKGROUND)
    draw = ImageDraw.Draw(margin)
    for middle, line in zip(middles, lines, strict=True):
        draw.text((_GAP, int(middle)), line, fill=255, font=font, anchor="lm")
    return np.asarray(margin)


def picture(image: np.ndarray, min_side: int = MIN_SIDE) -> Image.Image:
    """Returns uint8 (height, width, 1 or 3) as a Pillow image, which a notebook shows.

    An image whose longer side has fewer than `min_side` pixels is enlarged by a whole factor.
    """
    factor = -(-min_side // max(image.shape[:2]))
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_png(path: Path, image: np.ndarray, min_side: int = MIN_SIDE) -> None:
    """Writes what `picture` returns as PNG; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(image, min_side).save(path)
