"""Reading image files: orientation, formats, transparency of PNG."""

import ast
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from binlatent.data import images, masks, transforms
from binlatent.evaluation import exchange
from binlatent.runtime.errors import UserError

# The upright image is 32 wide and 48 high, in 8x8 blocks of these values.
BLOCKS = np.zeros((6, 4), np.uint8)
BLOCKS[0] = 255, 200, 150, 100
UPRIGHT = np.kron(BLOCKS, np.ones((8, 8), np.uint8))
# The operation from the upright to the stored image, by the value of the EXIF tag.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].T,
    8: lambda x: np.rot90(x, -1),
}
TURNED = ["jpg", "png", "tif", "webp", *(["avif"] if features.check("avif") else [])]


def write_turned(path, upright, orientation):
    """Writes an image with an EXIF tag; it is shown as `upright`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(stored).save(path, exif=exif, quality=95)


def blocks(image):
    return np.asarray(image, np.int64)[4::8, 4::8]


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", TURNED)
def test_images_are_upright_however_they_are_read(tmp_path, ending, orientation):
    path = tmp_path / f"x.{ending}"
    write_turned(path, UPRIGHT, orientation)
    whole = images.read_whole(str(path), "x")
    assert whole.shape == (48, 32, 3)
    np.testing.assert_allclose(blocks(whole[..., 0]), BLOCKS, atol=12)  # JPEG is lossy
    # From a stream, as for TFDS and LMDB, cropped to the top square.
    square = images.read_image(io.BytesIO(path.read_bytes()), 32, 1, position=0)
    np.testing.assert_allclose(blocks(square[..., 0]), BLOCKS[:4], atol=12)
    (batch,) = exchange.open_set(tmp_path).batches(1)
    np.testing.assert_array_equal(batch[0], whole)
    assert exchange.open_set(tmp_path).protocol["size"] == "48x32"


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", TURNED)
def test_a_mask_is_that_of_the_upright_image(tmp_path, ending, orientation):
    photo, mask = str(tmp_path / f"photo.{ending}"), str(tmp_path / "mask.png")
    write_turned(photo, UPRIGHT, orientation)
    hidden = np.zeros((48, 32), np.uint8)
    hidden[24:] = 255  # the lower half of the centre square
    for own in (1, orientation):  # the mask may be rotated too
        write_turned(mask, hidden, own)
        keep = masks.read_mask(mask, photo, 16)
        assert keep[:8].all() and not keep[8:].any()
    Image.fromarray(hidden.T).save(mask)  # the stored size, if rotated by a quarter turn
    with pytest.raises(UserError, match="size of the image, 32x48, not 48x32"):
        masks.read_mask(mask, photo, 16)


def test_few_places_open_images():
    """Only those that apply the EXIF tag; other code could get the size before rotation."""
    package = Path(images.__file__).parents[1]
    opening = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "Image.open"
    }
    assert opening == {"data/images.py", "data/transforms.py"}


def test_both_spellings_of_centre():
    assert masks.preset_name("center") == masks.preset_name("centre") == "centre"
    assert masks.preset_name("middle") is None


def test_pillow_reads_all_formats():
    assert ("AVIF" in images.FORMATS) == bool(features.check("avif"))
    assert set(images.FORMATS) <= set(Image.OPEN)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow is built without AVIF")
def test_avif(tmp_path):
    colours = np.zeros((16, 16, 4), np.uint8)
    colours[..., :3], colours[:, 8:, 3] = (200, 40, 90), 255
    Image.fromarray(colours).save(tmp_path / "x.avif", quality=100)
    found = images.read_whole(str(tmp_path / "x.avif"), "x")
    np.testing.assert_allclose(found[:, :6], 255, atol=3)  # transparent: white
    np.testing.assert_allclose(found[:, 10:], [[(200, 40, 90)] * 6] * 16, atol=6)


def png(depth, colour_type, values, *chunks):
    """The bytes of a PNG with integer values (h, w, c); Pillow cannot write all bit depths."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    def packed(row):
        bits = "".join(f"{x:0{depth}b}" for x in row)
        bits += "0" * (-len(bits) % 8)
        return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + packed(row.ravel().tolist()) for row in values)
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*x) for x in every)


def hiding(*colour):
    return b"tRNS", struct.pack(f">{len(colour)}H", *colour)


_COLOURS = (b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]))
_HIGH = 257 * 90


@pytest.mark.parametrize(
    "depth, colour_type, values, chunks, expected",
    [
        # Greyscale (0) with one transparent value, which becomes white.
        (1, 0, [0, 1, 1, 0], [hiding(0)], [255, 255, 255, 255]),
        (1, 0, [0, 1, 1, 0], [hiding(1)], [0, 255, 255, 0]),
        (2, 0, [0, 1, 2, 3], [hiding(1)], [0, 255, 170, 255]),
        (2, 0, [0, 1, 2, 3], [hiding(0)], [255, 85, 170, 255]),
        (4, 0, [0, 1, 7, 14], [hiding(7)], [0, 17, 255, 238]),
        (8, 0, [0, 1, 7, 254], [hiding(7)], [0, 1, 255, 254]),
        (16, 0, [0, _HIGH, _HIGH + 1, 257], [hiding(_HIGH)], [0, 255, 90, 1]),
        # Colour (2); with 16 bits, a colour that differs only in its lower bytes is opaque.
        (
            *(8, 2),
            [*(0, 1, 2), *(3, 4, 5), *(3, 4, 6), *(9, 9, 9)],
            [hiding(3, 4, 5)],
            [(0, 1, 2), (255, 255, 255), (3, 4, 6), (9, 9, 9)],
        ),
        (
            *(16, 2),
            [*(0, 0, 0), *(0x3000, 0x4000, 0x5000), *(0x3000, 0x4000, 0x5001), *(9 * 257,) * 3],
            [hiding(0x3000, 0x4000, 0x5000)],
            [(0, 0, 0), (255, 255, 255), (48, 64, 80), (9, 9, 9)],
        ),
        # A palette (3) with alphas of 100, 0 and 20%.
        (
            *(2, 3),
            [0, 1, 2, 3],
            [_COLOURS, (b"tRNS", b"\xff\x00\x33")],
            [(10, 20, 30), (255, 255, 255), (218, 220, 222), (100, 110, 120)],
        ),
        # Greyscale with alpha (4), colour with alpha (6).
        (8, 4, [0, 255, 100, 0, 100, 51, 9, 255], [], [0, 255, 224, 9]),
        (16, 4, [0, 65535, 25700, 0, 25700, 257 * 51, 257 * 9, 65535], [], [0, 255, 224, 9]),
        (
            *(16, 6),
            [*(0, 0, 0, 65535), *(25700, 0, 0, 0), *(25700, 0, 0, 257 * 51), *(2313, 0, 0, 65535)],
            [],
            [(0, 0, 0), (255, 255, 255), (224, 204, 204), (9, 0, 0)],
        ),
    ],
)
def test_the_transparency_of_png(tmp_path, depth, colour_type, values, chunks, expected):
    rgb = np.array([x if isinstance(x, tuple) else (x, x, x) for x in expected])
    content = png(depth, colour_type, np.array(values).reshape(2, 2, -1), *chunks)
    found = images.read_image(io.BytesIO(content), 2, 3)
    np.testing.assert_array_equal(found.reshape(4, 3), rgb)
    grey = images.read_image(io.BytesIO(content), 2, 1)
    np.testing.assert_allclose(grey.ravel(), rgb @ [0.299, 0.587, 0.114], atol=1)
    (tmp_path / "x.png").write_bytes(content)
    np.testing.assert_array_equal(images.read_whole(str(tmp_path / "x.png"), "x"), found)


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("LA", (100, 51), (224, 224, 224)),
        ("PA", (1, 51), (212, 214, 216)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_other_modes(mode, colour, expected):
    image = Image.new(mode, (2, 2), colour)
    if mode == "PA":
        image.putpalette([10, 20, 30, 40, 50, 60])
    assert (transforms.to_square(image, 2, 3) == expected).all()
