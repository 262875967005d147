"""Masks: presets, files, and the known tokens of a code."""

import numpy as np
import pytest
from PIL import Image

from binlatent.data import masks
from binlatent.runtime.errors import UserError


def test_presets_hide_the_parts_they_are_named_after():
    hidden = {name: ~masks.preset(name, 40, 60) for name in masks.PRESETS}
    np.testing.assert_array_equal(hidden["top"], ~hidden["bottom"])
    np.testing.assert_array_equal(hidden["left"], ~hidden["right"])
    assert hidden["top"][:20].all() and hidden["left"][:, :30].all()
    np.testing.assert_array_equal(hidden["outpainting"], ~hidden["centre"])
    assert hidden["centre"][10:30, 15:45].all() and hidden["centre"].sum() == 20 * 30
    assert 0.2 <= hidden["strokes"].mean() <= 0.6
    other = ~masks.preset("strokes", 40, 60, seed=1)
    assert np.any(other != hidden["strokes"])
    np.testing.assert_array_equal(~masks.preset("strokes", 40, 60), hidden["strokes"])


def test_masks_from_files_are_white_where_redrawn(tmp_path):
    image, mask = str(tmp_path / "image.png"), str(tmp_path / "mask.png")
    Image.new("RGB", (60, 40)).save(image)
    values = np.zeros((40, 60), np.uint8)
    values[:, 30:] = 255
    Image.fromarray(values).save(mask)
    keep = masks.read_mask(mask, image, 20)  # the centre 40x40, halved
    assert keep[:, :10].all() and not keep[:, 10:].any()
    values[:] = 0
    values[7, 20:40] = 255  # a thin stroke hides every pixel that it touches
    Image.fromarray(values).save(mask)
    keep = masks.read_mask(mask, image, 20)
    assert not keep[3, 5:15].any() and keep.sum() == 20 * 20 - 10
    Image.new("L", (60, 40)).save(mask)
    with pytest.raises(UserError, match="no white pixel"):
        masks.read_mask(mask, image, 20)
    Image.new("L", (40, 40), 255).save(mask)
    with pytest.raises(UserError, match="size of the image, 60x40, not 40x40"):
        masks.read_mask(mask, image, 20)
    with pytest.raises(UserError, match="there is no image .*nothing.png"):
        masks.read_mask(str(tmp_path / "nothing.png"), image, 20)


def test_a_token_is_known_if_all_its_pixels_are():
    mask = np.ones((2, 28, 28), bool)
    mask[0, 3, 10] = False  # in token (0, 1)
    mask[1, 6:8, 27] = False  # on both sides of the border between (0, 3) and (1, 3)
    known = masks.known_tokens(mask, (4, 4))
    assert not known[0, 0, 1] and known[0].sum() == 15
    assert not known[1, 0, 3] and not known[1, 1, 3] and known[1].sum() == 14
