"""Small files that unpack to large images are refused before they are unpacked."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from upfeat.images import read_image
from upfeat.readers import by_tifffile

LIMIT = 20_000
"""Pixels; the images below unpack to 16 million."""
SIDE = 4000


@pytest.fixture(scope="module")
def png():
    """A large picture in a few kilobytes."""
    file = io.BytesIO()
    Image.new("L", (SIDE, SIDE)).save(file, "png")
    return file.getvalue()


def ico(png):
    """An icon whose header tells 16 × 16 pixels."""
    return struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


def icns(png):
    """An icon of macOS, of a kind that has 128 × 128 pixels."""
    inside = b"ic07" + struct.pack(">I", len(png) + 8) + png
    return b"icns" + struct.pack(">I", len(inside) + 8) + inside


def iptc(png):
    """A message of a news agency with a picture of 16 × 16 pixels, by its fields."""
    fields = [(20, b"\0\x10"), (30, b"\0\x10"), (60, b"\1\0"), (65, b"\0"), (120, b"\5")]
    start = b"".join(bytes([0x1C, 3, kind, 0, len(content)]) + content for kind, content in fields)
    return start + bytes([0x1C, 8, 10, 0x84, 0]) + struct.pack(">I", len(png)) + png


def tiff(size, tags, strip):
    """A deflated TIFF of (width, height) with the given tags, of numbers or of lists of them."""
    common = {256: size[0], 257: size[1], 258: 8, 259: 8, 262: 1, 277: 1}
    tags = dict(sorted({**common, **tags}.items()))
    place = 8 + 2 + 12 * len(tags) + 4
    entries, beside = b"", b""
    for tag, value in tags.items():
        if isinstance(value, list):
            entries += struct.pack("<HHII", tag, 3, len(value), place + len(beside))
            beside += struct.pack(f"<{len(value)}H", *value)
        else:
            entries += struct.pack("<HHII", tag, 4, 1, value)
    where = struct.pack("<I", place + len(beside))
    entries = entries.replace(struct.pack("<I", 0xFFFFFFF0), where)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + b"\0\0\0\0" + beside + strip


DATA = 0xFFFFFFF0
"""Place of the pixels, as long as it is unknown."""


def one_tile(side):
    """A picture of 16 × 16 pixels in one tile."""
    strip = zlib.compress(bytes(side * side))
    return tiff((16, 16), {322: side, 323: side, 324: DATA, 325: len(strip)}, strip)


@pytest.mark.parametrize("wrap", [ico, icns, iptc])
def test_images_inside_others(png, wrap):
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match=r"^image: .*exceeds limit of"):
        read_image(wrap(png), max_pixels=LIMIT)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_an_icon_is_as_large_as_the_picture_inside(png):
    small = io.BytesIO()
    Image.new("L", (16, 16)).save(small, "png")
    assert read_image(ico(small.getvalue()), max_pixels=256).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("package", "read"),
    [
        ("PIL", lambda content: read_image(content, max_pixels=LIMIT)),
        ("tifffile", lambda content: by_tifffile(content, "image", LIMIT)),
    ],
)
def test_tiles_are_no_larger_than_images_may_be(package, read):
    pytest.importorskip(package)
    assert read_image(one_tile(256), max_pixels=256).shape == (3, 16, 16)
    with pytest.raises(ValueError, match=r"^image: a tile: 4000×4000 are 16,000,000 pixels, more"):
        read(one_tile(SIDE))


def test_bands_count_too():
    pytest.importorskip("tifffile")
    bands = 300
    strip = zlib.compress(bytes(100 * 100 * bands))
    tags = {258: [8] * bands, 273: DATA, 277: bands, 278: 100, 279: len(strip)}
    content = tiff((100, 100), {**tags, 338: [0] * (bands - 1)}, strip)
    shown = r"^image: its 100×100×300 values are 3,000,000 bytes, more than 16 for each of max_pix"
    with pytest.raises(ValueError, match=shown):
        read_image(content, max_pixels=LIMIT, bands=(0, 1, 2))
    values = read_image(content, max_pixels=10 * LIMIT, bands=(0, 1, 2))
    np.testing.assert_array_equal(values, 0)
