"""Files as users have them: the right pixels, or the reason why not."""

import importlib.util
import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from odd_images import (
    COLOUR,
    DEEP,
    frames,
    from_linear,
    p3_to_srgb,
    png,
    png_chunk,
    profile,
    saved,
    shallow_png,
    tiff,
    to_linear,
)
from PIL import Image, ImageCms

import upfeat
from upfeat.decoding import MAX_PIXELS, decode_file
from upfeat.images import fill_missing, read_image

NEEDS = {"tifffile": "tifffile", "heif": "pillow_heif"}
UNIT = COLOUR / 255
DEEP_UNIT = DEEP[..., :3] / 65535
OPAQUE = DEEP[..., 3:] / 65535


def grey(values):
    return np.repeat(values, 3, axis=2)


def on_white(colour, alpha):
    return colour * alpha + 1 - alpha


def tall(orientation):
    """What is stored so that COLOUR is seen, as an array."""
    turned = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[::-1],
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[:, ::-1],
    }
    return np.ascontiguousarray(turned[orientation](COLOUR))


def cmyk():
    image = Image.fromarray(COLOUR).convert("CMYK")
    return saved(image, "TIFF"), np.asarray(image.convert("RGB")) / 255


def gif():
    first, content = frames("GIF")
    return content, np.asarray(first.convert("RGB")) / 255


def mpo():
    picture = Image.fromarray(COLOUR)
    content = saved(picture, "MPO", save_all=True, append_images=[picture.resize((5, 4))])
    return content, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) / 255


def ycck():
    content = saved(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=100)
    return content, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) / 255


def lab():
    srgb, target = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(
        Image.new("RGB", (20, 12), (200, 100, 50)), srgb, target, outputMode="LAB"
    )
    return saved(image, "TIFF"), np.broadcast_to(np.array([200, 100, 50]) / 255, COLOUR.shape)


def animated(kind):
    picture = Image.fromarray(COLOUR)
    return saved(picture, kind, save_all=True, append_images=[picture.rotate(180)], lossless=True)


def jpeg_2000():
    return saved(Image.fromarray(COLOUR), "JPEG2000", irreversible=False)


GRADIENT = np.tile(np.arange(0, 240, 12, dtype=np.uint8), (12, 1))[:, :, None]
BANDS = np.random.default_rng(1).integers(0, 256, (12, 20, 6)).astype(np.uint8)
HALVED = np.dstack([DEEP[..., :3] // 2, np.full((12, 20), 32768, np.uint16)])
PACKED = zlib.compress(profile("RGB "))
PLANES = [Image.fromarray(COLOUR[..., band]) for band in (0, 1)]
FLOATS = np.random.default_rng(2).random((12, 20, 3)).astype(np.float32)
TWELVE_BITS = (DEEP[..., :3] >> 4).astype(np.uint16)
GREYS = DEEP[..., :1]
SIXTEEN = (DEEP[..., 0] >> 12).astype(np.uint8)
P3_POINTS = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
P3_CHUNKS = png_chunk(b"gAMA", struct.pack(">I", 45455)) + png_chunk(
    b"cHRM", struct.pack(">8I", *P3_POINTS)
)


def ascii_tag(number, text):
    return (number, 2, text.encode() + b"\0")


HOLED = np.where(np.arange(20)[None, :, None] < 4, 0, COLOUR).astype(np.uint8)

# name: (content, options, pixels in [0, 1] or words of the error, tolerance, words of the warning)
CASES = {
    "png8": (png(COLOUR, 2, 8), {}, UNIT, 1e-6, None),
    "png16 rgb": (png(DEEP[..., :3], 2, 16), {}, DEEP_UNIT, 1e-6, None),
    "png16 rgba": (png(DEEP, 6, 16), {}, on_white(DEEP_UNIT, OPAQUE), 1e-6, None),
    "png16 la": (
        png(DEEP[..., 2:], 4, 16),
        {},
        grey(on_white(DEEP[..., 2:3] / 65535, OPAQUE)),
        1e-6,
        None,
    ),
    "png16 grey": (png(DEEP[..., :1], 0, 16), {}, grey(DEEP[..., :1] / 65535), 1e-6, None),
    "png16 one colour transparent": (
        png(
            np.where(np.arange(20)[None, :, None] < 9, DEEP[0, 0, :3], DEEP[..., :3]),
            *(2, 16, png_chunk(b"tRNS", DEEP[0, 0, :3].astype(">u2").tobytes())),
        ),
        {},
        np.where(np.arange(20)[None, :, None] < 9, 1, DEEP_UNIT),
        1e-6,
        None,
    ),
    "png16 of twelve bits": (
        *(png(TWELVE_BITS, 2, 16), {}, TWELVE_BITS / 65535, 1e-6, "max_value=, as 4095"),
    ),
    "png16 of twelve bits, said": (
        *(png(TWELVE_BITS, 2, 16), {"max_value": 4095}, TWELVE_BITS / 4095, 1e-6, None),
    ),
    "png display p3": (
        *(saved(Image.fromarray(COLOUR), "PNG", icc_profile=profile("RGB ")), {}),
        *(p3_to_srgb(UNIT), 2.5 / 255, None),
    ),
    "png16 display p3": (
        png(
            DEEP[..., :3],
            2,
            16,
            png_chunk(b"iCCP", b"p\0\0" + PACKED),
        ),
        {},
        p3_to_srgb(DEEP_UNIT),
        4 / 255,
        None,
    ),
    "png srgb profile": (
        saved(
            Image.fromarray(COLOUR),
            "PNG",
            icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        ),
        *({}, UNIT, 1e-6, None),
    ),
    "png broken profile": (
        *(saved(Image.fromarray(COLOUR), "PNG", icc_profile=b"nonsense" * 20), {}),
        *(UNIT, 1e-6, "profile is ignored"),
    ),
    "png profile of another kind": (
        *(saved(Image.fromarray(COLOUR), "PNG", icc_profile=profile("GRAY")), {}),
        *(UNIT, 1e-6, "it is for L images"),
    ),
    "png grey profile": (
        saved(Image.fromarray(GRADIENT[..., 0]), "PNG", icc_profile=profile("GRAY", gamma=1.0)),
        {},
        grey(from_linear(GRADIENT / 255)),
        2.5 / 255,
        None,
    ),
    "png palette": (
        saved(Image.fromarray(COLOUR).quantize(16), "PNG"),
        {},
        np.asarray(Image.fromarray(COLOUR).quantize(16).convert("RGB")) / 255,
        *(1e-6, None),
    ),
    "png one bit": (
        saved(Image.fromarray(GRADIENT[..., 0] > 99), "PNG"),
        *({}, grey(GRADIENT > 99), 1e-6, None),
    ),
    "png la": (
        *(saved(Image.merge("LA", PLANES), "PNG"), {}),
        *(grey(on_white(UNIT[..., :1], UNIT[..., 1:2])), 1e-6, None),
    ),
    "png of linear light": (
        *(png(COLOUR, 2, 8, png_chunk(b"gAMA", struct.pack(">I", 100000))), {}),
        *(from_linear(UNIT), 1.5 / 255, None),
    ),
    "png of linear light, sixteen bits of grey": (
        *(png(GREYS, 0, 16, png_chunk(b"gAMA", struct.pack(">I", 100000))), {}),
        *(grey(from_linear(GREYS / 65535)), 2.5 / 255, None),
    ),
    "png of linear light, sixteen bits": (
        *(png(DEEP[..., :3], 2, 16, png_chunk(b"gAMA", struct.pack(">I", 100000))), {}),
        *(from_linear(DEEP_UNIT), 2.5 / 255, None),
    ),
    "png of sRGB in other words": (
        *(png(COLOUR, 2, 8, png_chunk(b"gAMA", struct.pack(">I", 45455))), {}, UNIT, 1e-6, None),
    ),
    "png of sRGB, which counts more than a gamma": (
        png(COLOUR, 2, 8, png_chunk(b"sRGB", b"\0") + png_chunk(b"gAMA", struct.pack(">I", 10**5))),
        *({}, UNIT, 1e-6, None),
    ),
    "png of display p3 by its points": (
        *(png(COLOUR, 2, 8, P3_CHUNKS), {}, p3_to_srgb(UNIT, to_linear), 2.5 / 255, None),
    ),
    "png of display p3 by its number": (
        *(png(COLOUR, 2, 8, png_chunk(b"cICP", bytes([12, 13, 0, 1]))), {}),
        *(p3_to_srgb(UNIT, to_linear), 2.5 / 255, None),
    ),
    "png of high dynamic range": (
        *(png(COLOUR, 2, 8, png_chunk(b"cICP", bytes([9, 16, 0, 1]))), {}),
        *(UNIT, 1e-6, "high dynamic range"),
    ),
    "png of points that make no space": (
        *(png(COLOUR, 2, 8, P3_CHUNKS[:16] + png_chunk(b"cHRM", bytes(32))), {}, UNIT, 1e-6, None),
    ),
    "png4 one grey transparent": (
        shallow_png(SIXTEEN, 4, png_chunk(b"tRNS", struct.pack(">H", 5))),
        {},
        grey(np.where(SIXTEEN == 5, 1, SIXTEEN / 15)[..., None]),
        *(1e-6, None),
    ),
    "png2 one grey transparent": (
        shallow_png(SIXTEEN >> 2, 2, png_chunk(b"tRNS", struct.pack(">H", 2))),
        {},
        grey(np.where(SIXTEEN >> 2 == 2, 1, (SIXTEEN >> 2) / 3)[..., None]),
        *(1e-6, None),
    ),
    "png16 one grey transparent": (
        png(GREYS, 0, 16, png_chunk(b"tRNS", GREYS[3, 4].astype(">u2").tobytes())),
        {},
        grey(np.where(GREYS[3, 4] == GREYS, 1, GREYS / 65535)),
        *(1e-6, None),
    ),
    "png animated": (animated("PNG"), {}, UNIT, 1e-6, "its first frame is taken"),
    "webp animated": (animated("WEBP"), {}, UNIT, 1e-6, "its first frame is taken"),
    "jpeg 2000": (jpeg_2000(), {}, UNIT, 1e-6, None),
    "jpeg ycck": (*ycck()[:1], {}, ycck()[1], 1e-6, None),
    "jpeg mpo": (*mpo()[:1], {}, mpo()[1], 1e-6, None),
    "jpeg cut": (saved(Image.fromarray(COLOUR), "JPEG")[:300], {}, "truncated or damaged", 0, None),
    "gif animated": (gif()[0], {}, gif()[1], 1e-6, "its first frame is taken"),
    "tiff cmyk": (cmyk()[0], {}, cmyk()[1], 1e-6, None),
    "tiff lab": (lab()[0], {}, lab()[1], 3 / 255, None),
    "tiff16 rgb": (tiff(DEEP[..., :3]), {}, DEEP_UNIT, 1e-6, None),
    "tiff16 rgb big-endian": (tiff(DEEP[..., :3], order=">"), {}, DEEP_UNIT, 1e-6, None),
    "tiff16 rgba": (tiff(DEEP, extra=(2,)), {}, on_white(DEEP_UNIT, OPAQUE), 1e-6, None),
    "tiff16 premultiplied": (
        *(tiff(HALVED, extra=(1,)), {}),
        *(np.minimum(HALVED[..., :3] / 65535 + 1 - 32768 / 65535, 1), 1e-6, None),
    ),
    "tiff16 rgb + nir": (tiff(DEEP, extra=(0,)), {}, DEEP_UNIT, 1e-6, "a fourth band"),
    "tiff8 rgb + nir": (tiff(BANDS[..., :4], extra=(0,)), {}, BANDS[..., :3] / 255, 1e-6, "fourth"),
    "tiff8 rgb + nir, no tag": (tiff(BANDS[..., :4]), {}, BANDS[..., :3] / 255, 1e-6, "fourth"),
    "tiff8 rgb + nir, false colours": (
        *(tiff(BANDS[..., :4], extra=(0,)), {"bands": (3, 0, 1)}),
        *(BANDS[..., [3, 0, 1]] / 255, 1e-6, None),
    ),
    "tiff8 rgb + nir, all": (
        *(tiff(BANDS[..., :4], extra=(0,)), {"channels": 4}, BANDS[..., :4] / 255, 1e-6, None),
    ),
    "tiff grey, orientation": (
        *(tiff(tall(6)[..., :1], photometric=1, orientation=6), {}),
        *(grey(UNIT[..., :1]), 1e-6, None),
    ),
    "tiff16 orientation": (
        *(tiff(tall(8).astype(np.uint16) * 257, orientation=8), {}, UNIT, 1e-6, None),
    ),
    "tiff16 grey": (tiff(GREYS, photometric=1), {}, grey(GREYS / 65535), 1e-6, None),
    "tiff16 grey, white at 0": (
        *(tiff(GREYS, photometric=0), {}, grey(1 - GREYS / 65535), 1e-6, None),
    ),
    "tiff16 grey, white at 0, big-endian": (
        *(tiff(GREYS, photometric=0, order=">"), {}, grey(1 - GREYS / 65535), 1e-6),
        *(None, "tifffile"),
    ),
    "tiff8 grey, white at 0": (
        *(tiff(COLOUR[..., :1], photometric=0), {}, grey(1 - UNIT[..., :1]), 1e-6, None),
    ),
    "tiff that says what is no data": (
        tiff(HOLED, tags=[ascii_tag(42113, "0")]),
        *({}, HOLED / 255, 1e-6, r"48 pixels are 0, which the file says is no data"),
    ),
    "tiff that says what is no data, filled": (
        *(tiff(HOLED, tags=[ascii_tag(42113, "0")]), {"nodata": 0}, None, 0, None),
    ),
    "tiff of a camera's sensor": (
        tiff(GREYS, photometric=32803),
        *({}, "a camera's raw file; develop it", 0, None, "tifffile"),
    ),
    "tiff of a camera, its thumbnail first": (
        tiff(COLOUR, tags=[(330, 4, [8]), (254, 4, [1])]),
        *({}, "a camera's raw file; develop it", 0, None),
    ),
    "tiff six bands": (
        *(tiff(BANDS, photometric=1, extra=(0,) * 5), {}, "6 bands, not 3", 0, None, "tifffile"),
    ),
    "tiff six bands, three": (
        *(tiff(BANDS, photometric=1, extra=(0,) * 5), {"bands": (5, 3, 1)}),
        *(BANDS[..., [5, 3, 1]] / 255, 1e-6, None, "tifffile"),
    ),
    "tiff six bands, turned": (
        tiff(tall(5)[..., [0, 1, 2, 0, 1, 2]], photometric=1, extra=(0,) * 5, orientation=5),
        *({"bands": (0, 1, 2)}, UNIT, 1e-6, None, "tifffile"),
    ),
    "tiff floats": (tiff(FLOATS), {}, FLOATS, 1e-6, None, "tifffile"),
    "tiff floats of reflectance": (tiff(FLOATS * 3000), {}, "max_value=", 0, None, "tifffile"),
    "no data": (png(HOLED, 2, 8), {"nodata": 0}, None, 0, None),
    "mask": (
        png(COLOUR, 2, 8),
        {"mask": np.arange(20)[None] + np.zeros((12, 1)) < 4},
        *(None, 0, None),
    ),
    "mask of another size": (
        *(png(COLOUR, 2, 8), {"mask": np.zeros((3, 3), bool)}, "one value for each pixel", 0, None),
    ),
    "too large": (png(COLOUR, 2, 8), {"max_pixels": 99}, "raise max_pixels", 0, None),
    "a header that promises too much": (
        png(COLOUR, 2, 8)[:8]
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0))
        + png(COLOUR, 2, 8)[33:],
        *({}, "100000×100000 are 10,000,000,000 pixels, more than max_pixels=", 0, None),
    ),
    "nothing": (b"", {}, "an empty file", 0, None),
    "noise": (b"noise" * 9, {}, "not an image", 0, None),
    "a web page": (b"<!doctype html>", {}, "a web page, as servers send", 0, None),
    "jpeg xl": (b"\xff\x0a" + bytes(40), {}, "a JPEG XL image; convert it", 0, None),
    "an array": (b"\x93NUMPY" + bytes(40), {}, r"give numpy\.load of it", 0, None),
    "medical": (bytes(128) + b"DICM", {}, "a DICOM file; give the array", 0, None),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("source", ["path", "bytes"])
def test_odd_files_give_their_pixels_or_a_reason(name, source, tmp_path):
    content, options, expected, tolerance, warning, *needs = CASES[name]
    for package in needs:
        pytest.importorskip(package)
    path = tmp_path / "odd"
    path.write_bytes(content)
    given = path if source == "path" else io.BytesIO(content)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected) as caught:
            read_image(given, **options)
        assert "\n" not in str(caught.value)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        values = read_image(given, **options)
    assert [warning in str(one.message) for one in said] == [True] * bool(warning)
    if expected is None:  # without data on the left: filled from the rest, which is as it was
        torch.testing.assert_close(
            values[:, :, 4:].permute(1, 2, 0).numpy(), UNIT[:, 4:].astype("f")
        )
        assert values[:, :, :4].min() > 0.1
        return
    assert values.dtype == torch.float32
    assert tuple(values.shape) == np.shape(expected)[2:] + np.shape(expected)[:2]
    error = np.abs(values.permute(1, 2, 0).numpy() - expected)
    assert error.max() <= tolerance


@pytest.mark.parametrize("orientation", range(2, 9))
def test_tiff_orientation(orientation, tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(tall(orientation), orientation=orientation))
    values = read_image(tmp_path / "a.tif").permute(1, 2, 0).numpy()
    np.testing.assert_allclose(values, UNIT, atol=1e-6)


def test_heic_where_its_package_is_installed(tmp_path, monkeypatch):
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        picture = Image.fromarray(np.full((64, 48, 3), (200, 100, 50), np.uint8))
        buffer = io.BytesIO()
        pillow_heif.from_pillow(picture).save(buffer, quality=-1)
        content = buffer.getvalue()
        values = read_image(content)
        assert values.shape == (3, 64, 48)
        expected = torch.tensor([200, 100, 50])[:, None, None] / 255
        assert (values - expected).abs().max() < 4 / 255
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="pip install pillow-heif"):
        read_image(content)


def test_a_missing_reader_of_tiff_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match="pip install tifffile imagecodecs"):
        read_image(tiff(BANDS, photometric=1, extra=(0,) * 5), bands=(0, 1, 2))


def test_compressed_tiff_keeps_sixteen_bits():
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    for compression in ("zlib", "lzw", None):
        for layout in ("contig", "separate"):
            values = DEEP[..., :3] if layout == "contig" else np.moveaxis(DEEP[..., :3], 2, 0)
            buffer = io.BytesIO()
            tifffile.imwrite(
                *(buffer, np.ascontiguousarray(values)),
                photometric="rgb",
                planarconfig=layout,
                compression=compression,
                predictor=compression is not None,
            )
            read = read_image(buffer.getvalue()).permute(1, 2, 0).numpy()
            np.testing.assert_allclose(read, DEEP_UNIT, atol=1e-6)


def test_a_fourth_band_is_transparency_only_when_said():
    array = np.dstack([COLOUR, COLOUR[..., :1]])
    with pytest.warns(UserWarning, match="alpha=True"):
        plain = read_image(array).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(plain, UNIT, atol=1e-6)
    laid = read_image(array, alpha=True).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(laid, on_white(UNIT, UNIT[..., :1]), atol=1e-6)
    assert read_image(array, channels=4).shape == (4, 12, 20)
    chosen = read_image(array, bands=(0, 1, 2)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(chosen, UNIT, atol=1e-6)
    with pytest.raises(ValueError, match="0 to 3"):
        read_image(array, bands=(0, 1, 4))


def test_large_images_are_read_unless_limited(tmp_path):
    # 108 million pixels, which Pillow alone takes for an attack, in a few bytes.
    Image.new("1", (12_000, 9_000)).save(tmp_path / "large.png")
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="108,000,000 pixels"):
        read_image(tmp_path / "large.png", max_pixels=10**8)
    decoded = decode_file(tmp_path / "large.png", label="large", max_pixels=MAX_PIXELS)
    assert decoded.values.shape == (9_000, 12_000, 1)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_what_is_masked_has_no_influence():
    backbone = upfeat.load_backbone("efficientnet_lite0")
    mask = np.zeros((12, 20), bool)
    mask[3:7, 5:9] = True
    changed = COLOUR.copy()
    changed[mask] = 255
    sized = {"size": 64, "mask": mask}
    x = backbone.preprocess(COLOUR, **sized)
    assert torch.equal(x, backbone.preprocess(changed, **sized))
    floats = UNIT.copy()
    floats[mask] = np.nan
    assert torch.equal(x, backbone.preprocess(floats.astype("f"), 64, nodata=float("nan")))
    masked = np.ma.array(COLOUR, mask=np.repeat(mask[..., None], 3, 2))
    assert torch.equal(x, backbone.preprocess(masked, 64))
    with pytest.raises(ValueError, match="leaves no pixel"):
        read_image(COLOUR, mask=~np.zeros((12, 20), bool))


def test_filling_keeps_constants_bounds_and_data():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 37, 50, generator=generator)
    missing = torch.rand(37, 50, generator=generator) < 0.97
    filled = fill_missing(values, missing)
    assert torch.equal(filled[:, ~missing], values[:, ~missing])
    known = values[:, ~missing]
    assert filled.min() >= known.min() - 1e-6
    assert filled.max() <= known.max() + 1e-6
    torch.testing.assert_close(
        fill_missing(torch.ones(1, 9, 9), torch.arange(81).view(9, 9) != 80), torch.ones(1, 9, 9)
    )
    assert fill_missing(values, torch.zeros(37, 50, dtype=torch.bool)) is values
