"""Grids of images, and PNG files."""

import numpy as np
from PIL import Image

from binlatent.runtime import png


def test_grid_lays_images_out_in_rows_with_gaps():
    rows = [np.full((3, 4, 5, 1), value, np.uint8) for value in (10, 200)]
    sheet = png.grid(rows)
    assert sheet.shape == (2 * (4 + 2) + 2, 3 * (5 + 2) + 2, 1)
    np.testing.assert_array_equal(sheet[2:6, 2:7], 10)
    np.testing.assert_array_equal(sheet[8:12, 16:21], 200)
    np.testing.assert_array_equal(sheet[:, :2], 96)


def test_titles_are_beside_their_rows():
    rows = [np.zeros((2, 12, 5, channels), np.uint8) for channels in (3, 3)]
    plain, sheet = png.grid(rows), png.grid(rows, ["cat", "x" * 50])
    width = sheet.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(sheet[:, width:], plain)
    upper, lower = sheet[2:14, :width], sheet[16:28, :width]
    assert upper.max() > 200 < lower.max() and sheet[[0, 1, 14, 15], :width].min() == 96
    # Cut after 20 characters; a title of three letters is narrower.
    assert np.flatnonzero((upper > 96).any((0, 2))).max() < 0.4 * width
    letters = [png.grid(rows, [x, "a"])[:14].tobytes() for x in ("\u00e9", "\u00e8", "e")]
    assert len(set(letters)) == 3
    np.testing.assert_array_equal(png.grid(rows, ["a\nb", "c"]), png.grid(rows, ["a b", "c"]))
    longer = png.grid(rows, ["cat", "x" * 500])
    np.testing.assert_array_equal(longer, sheet)


def test_captions_are_below_their_rows():
    rows = [np.full((4, 30, 30, 3), value, np.uint8) for value in (0, 255)]
    plain, sheet = png.grid(rows), png.grid(rows, captions=["cat", "dog"])
    assert sheet.shape[1] == plain.shape[1]
    below = (len(sheet) - len(plain)) // 2
    assert below > 8
    np.testing.assert_array_equal(sheet[:32], plain[:32])
    np.testing.assert_array_equal(sheet[32 + below : 64 + below], plain[32:64])
    for top in (32, 64 + below):
        letters = sheet[top : top + below]
        assert letters.max() > 200 and letters[0].max() == letters[-1].max() == 96


def test_a_long_caption_has_at_most_three_lines():
    rows = [np.zeros((1, 40, 40, 1), np.uint8)]
    heights = [
        len(png.grid(rows, captions=[text]))
        for text in ("a", "a cat here", "a " * 10, "word " * 50, "x" * 90)
    ]
    line = heights[1] - heights[0]
    assert line > 8 and heights[3] - heights[0] == 2 * line and heights[4] == heights[0]


def test_png_is_enlarged_by_a_whole_factor(tmp_path):
    image = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    png.save_png(tmp_path / "new" / "x.png", image, min_side=8)
    read = np.asarray(Image.open(tmp_path / "new" / "x.png"))
    np.testing.assert_array_equal(read, image[..., 0].repeat(2, 0).repeat(2, 1))
