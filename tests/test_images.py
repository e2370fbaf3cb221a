"""Every kind of picture becomes the same RGB; every broken one a clear line."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import upfeat
from upfeat.images import read_image


@pytest.fixture
def picture():
    values = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    return Image.fromarray(values)


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_path_pil_array_and_tensor_agree(picture, tmp_path):
    picture.save(tmp_path / "x.png")
    expected = as_tensor(picture)
    array = np.asarray(picture)
    for given in (
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
        picture,
        array,
        array[::-1][::-1],
        array.astype(np.float64) / 255,
        expected,
        expected[None],
        (expected * 255).byte(),
    ):
        torch.testing.assert_close(read_image(given), expected, rtol=0, atol=1 / 500)


def test_grey_sixteen_bit_palette_and_alpha(picture, tmp_path):
    grey = picture.convert("L")
    expected = torch.from_numpy(np.array(grey)).float()[None].expand(3, -1, -1) / 255
    torch.testing.assert_close(read_image(grey), expected)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    torch.testing.assert_close(read_image(tmp_path / "deep.png"), expected)
    torch.testing.assert_close(read_image(np.asarray(deep)), expected)
    bits = Image.new("1", (3, 2), 1)
    assert torch.equal(read_image(bits), torch.ones(3, 2, 3))
    palette = picture.quantize(16)
    torch.testing.assert_close(read_image(palette), as_tensor(palette.convert("RGB")))
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    assert torch.equal(read_image(clear), torch.ones(3, 12, 20))
    clear.putalpha(255)
    torch.testing.assert_close(read_image(clear), as_tensor(picture))
    torch.testing.assert_close(read_image(np.asarray(clear), alpha=True), as_tensor(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(picture, tmp_path, orientation):
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture.transpose(turned[orientation]) if orientation > 1 else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    torch.testing.assert_close(read_image(tmp_path / "x.png"), as_tensor(picture))


def test_preprocess_sizes():
    backbone = upfeat.load_backbone("efficientnet_lite0")
    image = Image.new("RGB", (100, 71), (255, 0, 127))
    x = backbone.preprocess(image)
    assert x.shape == (1, 3, 71, 100)
    torch.testing.assert_close(x[0, :, 5, 5], torch.tensor([1.0, -1.0, 127 / 127.5 - 1]))
    assert backbone.preprocess(image, 33).shape == (1, 3, 33, 46)
    assert backbone.preprocess(image, align=True).shape == (1, 3, 64, 96)
    assert backbone.preprocess(image, size=32, align=True).shape == (1, 3, 32, 48)
    torch.testing.assert_close(backbone.denormalize(x)[0, :, 0, 0], torch.tensor([1, 0, 127 / 255]))


def bomb(path, side=30000):
    """A PNG of a few bytes that claims to be ``side`` pixels wide and high."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    path.write_bytes(content)
    return path


def test_bad_files_are_one_clear_line(picture, tmp_path):
    buffer = io.BytesIO()
    picture.resize((400, 300)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, words in (
        ("cut.jpg", "truncated"),
        ("text.jpg", "not an image"),
        ("empty.png", "not an image"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    for side in (17_000, 30_000):
        with pytest.raises(ValueError, match="max_pixels"):
            read_image(bomb(tmp_path / "bomb.png", side))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(FileNotFoundError, match="folder"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 2), np.uint8), "2 bands, not 3"),
        (np.zeros((4, 4, 13), np.uint8), r"13 bands, not 3; choose some, as bands=\(0, 1, 2\)"),
        (np.zeros((3, 40, 50), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), "one image at a time"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4, 3), np.int32), "int32"),
        (np.full((4, 4, 3), 255.0), "max_value="),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (torch.zeros(4, 4, 3), r"permute\(2, 0, 1\)"),
        (torch.zeros(2, 3, 4, 4), r"\(3, H, W\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
        (b"bytes", "not an image"),
        ("https://host/a.jpg", "download it"),
        (12, "is a int"),
        (io.StringIO("text"), "of text; open it by"),
    ],
)
def test_bad_arrays_are_named(image, words):
    with pytest.raises(ValueError, match=words):
        read_image(image)


@pytest.mark.parametrize("size", [(1, 1), (4000, 5)])
def test_too_small_images_say_so(size):
    backbone = upfeat.load_backbone("efficientnet_lite0")
    with pytest.raises(ValueError, match="at least the stride"):
        backbone.preprocess(Image.new("RGB", size))
    for bad in (0, 8, -3, 224.5):
        with pytest.raises(ValueError, match="size="):
            backbone.preprocess(Image.new("RGB", (64, 64)), size=bad)


OPTIONS = [
    ({"bands": 3}, "bands=3 must be numbers of image's bands, 0 to 2"),
    ({"bands": "012"}, "bands='012' must be numbers"),
    ({"bands": ()}, r"bands=\(\) must be numbers"),
    ({"bands": (0, 1, 3)}, r"bands=\(0, 1, 3\) must be numbers"),
    ({"bands": (True, 0, 1)}, r"bands=\(True, 0, 1\) must be numbers"),
    ({"bands": (0.0, 1.0, 2.0)}, "bands=.* must be numbers"),
    ({"bands": (0,)}, r"bands=\(0,\) are 1; efficientnet_lite0 takes 3"),
    ({"bands": (0, 1, 2, 0)}, r"bands=\(0, 1, 2, 0\) are 4; efficientnet_lite0 takes 3"),
    ({"max_value": float("inf")}, "max_value=inf must be a finite number above 0"),
    ({"max_value": float("nan")}, "max_value=nan must be a number above 0"),
    ({"max_value": 0}, "max_value=0 must be a number above 0"),
    ({"max_value": "white"}, "max_value='white' must be a number above 0"),
    ({"nodata": "none"}, "nodata='none' must be a number, or NaN"),
    ({"nodata": True}, "nodata=True must be a number"),
    ({"nodata": [1]}, r"nodata=\[1\] must be a number"),
    ({"alpha": "yes"}, "alpha='yes' must be true or false"),
    ({"alpha": True}, "alpha=True but image has 3 bands"),
    ({"mask": 3}, "mask is a int; give an array"),
    ({"mask": np.zeros((3, 3))}, "give one value for each pixel"),
    ({"mask": np.ones((12, 20))}, "leaves no pixel of the image"),
    ({"max_pixels": 0}, "max_pixels=0 must be 1 or more"),
    ({"max_pixels": None}, "max_pixels=None must be a whole number"),
    ({"max_pixels": 5}, "240 pixels, more than max_pixels=5"),
    ({"size": 0}, "size=0 must be 16 or more; the stride of efficientnet_lite0 is 16 pixels"),
    ({"size": 32.5}, r"size=32\.5 must be a whole number"),
    ({"size": float("nan")}, "size=nan must be a whole number"),
    ({"size": "32"}, "size='32' must be a whole number"),
    ({"size": (32, 32)}, r"size=\(32, 32\) must be a whole number"),
]


@pytest.fixture(scope="module")
def backbone():
    return upfeat.load_backbone("efficientnet_lite0")


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=lambda value: str(value)[:40])
def test_every_option_is_named_with_its_value(backbone, picture, options, words):
    with pytest.raises(ValueError, match=words):
        backbone.preprocess(np.asarray(picture), **options)


def test_bands_by_any_whole_numbers(backbone, picture):
    image = np.asarray(picture.resize((20, 32)))
    expected = backbone.preprocess(image[..., ::-1])
    for bands in ((2, 1, 0), [2, 1, 0], np.array([2, 1, 0]), torch.tensor([2, 1, 0])):
        assert torch.equal(backbone.preprocess(image, bands=bands), expected)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it does without
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp", "bmp", "gif"])
def test_a_file_cut_off_anywhere_is_whole_or_refused(picture, kind):
    file = io.BytesIO()
    picture.save(file, kind)
    content = file.getvalue()
    whole = read_image(content)
    for cut in {*range(12), *range(0, len(content), max(1, len(content) // 12)), len(content) - 1}:
        found = _outcome(content[:cut])
        if isinstance(found, str):
            assert "\n" not in found
        else:  # what is missing holds no pixels
            assert torch.equal(found, whole)


def _outcome(content):
    try:
        return read_image(content, max_pixels=1 << 16)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp", "bmp", "gif"])
def test_pillows_own_limit_is_put_aside_and_comes_back(picture, kind, monkeypatch):
    file = io.BytesIO()
    picture.save(file, kind)
    expected = read_image(file.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # of 240; TIFF is looked at twice
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(read_image(file.getvalue())))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)
    assert len(results) == 4
    assert Image.MAX_IMAGE_PIXELS == 50
    with pytest.raises(ValueError, match="more than max_pixels=239"):
        read_image(file.getvalue(), max_pixels=239)
    assert Image.MAX_IMAGE_PIXELS == 50


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp", "bmp", "gif"])
def test_damaged_files_are_read_or_refused_in_one_line(picture, kind):
    file, draw = io.BytesIO(), np.random.default_rng(0)
    picture.save(file, kind)
    for _ in range(40):
        content = bytearray(file.getvalue())
        for place in draw.integers(0, min(len(content), draw.choice([40, 200])), 2):
            content[place] = draw.integers(256)
        found = _outcome(bytes(content))
        assert "\n" not in found if isinstance(found, str) else found.shape[0] == 3


@pytest.mark.parametrize("name", ["drawing.eps", "photo.jpg"])
def test_postscript_is_not_run(tmp_path, name, monkeypatch):
    """Pillow would have Ghostscript run the program, whatever the file's suffix."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # were it called, a TypeError
    Image.new("RGB", (8, 8)).save(tmp_path / name, format="EPS")
    with pytest.raises(ValueError, match="a PostScript document; convert it to PNG or TIFF"):
        read_image(tmp_path / name)
