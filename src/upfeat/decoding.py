"""Image files of any kind to arrays of their bands, at the depth that they have."""

from __future__ import annotations

import io
import logging
import math
import struct
import sys
import threading
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from upfeat.types import times

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

MAX_PIXELS = 1 << 28
"""Default limit, about 268 million: the largest cameras' images, in 3 GiB as floats."""

# What Pillow raises, by format, where a file is not what it says of itself.
_DAMAGED = (OSError, SyntaxError, EOFError, IndexError, TypeError, struct.error, zlib.error)
_BITS = 258
_ORIENTATION = 274
_EXTRA_SAMPLES = 338
_SAMPLES_PER_PIXEL = 277
_PLANAR = 284
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


class Decoded(NamedTuple):
    """The bands of an image, upright."""

    values: NDArray[Any]
    """(H, W, bands): uint8, uint16, or float32."""
    alpha: bool | None = False
    """True if the last band is transparency; ``None`` where nobody said."""
    premultiplied: bool = False
    """True if the colours have been multiplied by it."""


def decode_file(source: Path | bytes | IO[bytes], *, label: str, max_pixels: int) -> Decoded:
    """Decode an image file.

    Args:
        source: a path, the file's bytes, or an open binary file, read to its end.
        label: what errors call it.
        max_pixels: limit; more are refused before they are decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, a damaged one, larger than the limit, or needs a package that is
            not installed (which is named).
    """
    if isinstance(source, Path):
        if not source.is_file():
            what = "is a folder, not an image" if source.is_dir() else "no such file"
            raise FileNotFoundError(f"{source}: {what}")
    elif not isinstance(source, bytes):
        source = source.read()
        if not isinstance(source, bytes):
            raise ValueError(f'{label}: a file of text; open it by open(path, "rb")')

    try:
        with _opened(source) as image:
            check_pixels(image.size, label=label, max_pixels=max_pixels)
            return _decode(image, source, label)
    except UnidentifiedImageError:
        return _without_pillow(source, label, max_pixels)
    except _DAMAGED as error:
        raise ValueError(f"{label}: a truncated or damaged image ({_line(error)})") from None


def decode_pil(image: Image.Image, label: str) -> Decoded:
    """Decode a Pillow image of any mode, upright and in sRGB."""
    return _from_pil(image, label, _unsaid_bands(image))


def open_upright(path: Path, *, short_side: int | None = None) -> Image.Image:
    """Decode a file that Pillow knows, upright, in its own mode and colours.

    Args:
        path: of the file.
        short_side: pixels that its shorter side needs; a JPEG is decoded no finer than twice that.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: Pillow does not know it, or it is damaged or larger than :data:`MAX_PIXELS`.
    """
    try:
        with _opened(path) as image:
            check_pixels(image.size, label=str(path), max_pixels=MAX_PIXELS)
            if short_side is not None and image.format == "JPEG":
                # Twice as fine as the result: the reduction proper is done by resampling.
                scale = 2 * short_side / min(image.size)
                image.draft("RGB", tuple(math.ceil(side * scale) for side in image.size))  # pyright: ignore[reportArgumentType]
            return _upright(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that Pillow can read") from None
    except _DAMAGED as error:
        raise ValueError(f"{path}: a damaged image ({_line(error)})") from None


def check_pixels(size: tuple[int, int], *, label: str, max_pixels: int) -> None:
    """Refuse images of more than ``max_pixels``; ``size`` is (width, height).

    Raises:
        ValueError: there are more.
    """
    pixels = size[0] * size[1]
    if pixels > max_pixels:
        raise ValueError(
            f"{label}: {size[0]}×{size[1]} are {pixels:,} pixels, more than max_pixels="
            f"{max_pixels:,}; if you trust it and have the memory, raise max_pixels"
        )


def image_size(path: Path | bytes) -> tuple[int, int] | None:
    """(height, width) of an image file, upright, by its header; ``None`` where that does not say.

    Nothing is decoded, and nothing raised: decoding proper says what is wrong with a file.
    """
    try:
        with warnings.catch_warnings(), _opened(path) as image:
            warnings.simplefilter("ignore")
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
    except Exception:  # Pillow's readers raise what they like
        return None
    return (width, height) if turned else (height, width)


class _Limit:
    """Pillow's own limit, below what telephones take, put aside while any thread decodes.

    Ours is applied between the opening of a file and its decoding, where Pillow looks again.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._limit = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                Image.MAX_IMAGE_PIXELS = self._limit


_NO_LIMIT = _Limit()


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """Open without decoding."""
    # Never by name: Pillow maps uncompressed TIFF files into memory then and turns them wrongly.
    file = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
    with _NO_LIMIT, file, Image.open(file) as image:
        yield image


def _decode(image: Image.Image, source: Path | bytes, label: str) -> Decoded:
    unsaid = _unsaid_bands(image)
    tiff = image.format == "TIFF"
    raw = _raw_mode(image)
    if tiff:
        tags = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
        bands = tags.get(_SAMPLES_PER_PIXEL, 1)
        planes = bands > 1 and tags.get(_PLANAR) == 2 and max(tags.get(_BITS, (8,))) > 8
        if planes or bands > 4:
            return _by_tifffile(source, label)
    elif image.format != "MPO" and getattr(image, "is_animated", False):
        warnings.warn(f"{label}: an animation; its first frame is taken", stacklevel=2)
        image.seek(0)
    if raw.partition(";")[0] in ("RGB", "RGBA", "RGBa", "RGBX", "LA") and ";16" in raw:
        return _deep(image, source, raw, label, unsaid)
    if unsaid and raw == "RGBX":  # a fourth band that Pillow leaves out
        _reread(image, "RGBA", "RGBA")
    return _from_pil(image, label, unsaid)


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for the samples in the file; empty where it has none."""
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else ""
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw if isinstance(raw, str) else ""


def _reread(image: Any, mode: str, raw: str) -> None:
    """Have an opened image unpack its samples otherwise when it is loaded."""
    image._mode = mode
    image.tile = [
        tile._replace(args=(raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw)
        if hasattr(tile, "_replace")
        else (*tile[:3], (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw)
        for tile in image.tile
    ]


def _deep(image: Image.Image, source: Path | bytes, raw: str, label: str, unsaid: bool) -> Decoded:
    """16-bit colours, of which Pillow unpacks the high bytes only: a second pass for the low ones.

    They are the high ones for whoever reads the samples in the other byte order.
    """
    if raw.startswith("LA"):
        _reread(image, "RGBA", "RGBA")  # the four bytes of a pixel as they are
        upright = _upright(image)
        pairs = np.ascontiguousarray(np.asarray(upright)).view(">u2")  # (H, W, 2)
        return Decoded(pairs.astype(np.uint16), alpha=True)
    order = raw[-1]
    other = {"B": "L", "L": "B"}.get(order, "B" if sys.byteorder == "little" else "L")
    mode = "RGB" if raw.startswith("RGB;") else "RGBA"
    with _opened(source) as second:
        _reread(second, mode, f"{mode};16{other}")
        low = np.asarray(_upright(second))
    _reread(image, mode, f"{mode};16{order}")
    upright = _upright(image)
    values = (np.asarray(upright).astype(np.uint16) << 8) | low
    hidden = image.info.get("transparency")
    if mode == "RGB" and isinstance(hidden, tuple):  # one colour is transparent
        opaque = (values != np.array(hidden, np.uint16)).any(2, keepdims=True)
        return Decoded(np.concatenate([values, opaque * np.uint16(65535)], 2), alpha=True)
    values = _deep_to_srgb(values, upright, label)
    alpha = (None if unsaid else True) if mode == "RGBA" else False
    return Decoded(values, alpha, premultiplied=raw.startswith("RGBa"))


def _deep_to_srgb(values: NDArray[Any], high: Image.Image, label: str) -> NDArray[Any]:
    """Add what its profile changes of the high bytes: LittleCMS sees 8 bits through Pillow."""
    profile = high.info.get("icc_profile")
    if not profile:
        return values
    before = high.convert("RGB")
    after = in_srgb(before, profile, label)
    if after is before:
        return values
    change = np.asarray(after).astype(np.int32) - np.asarray(before)
    colours = values[..., :3] + 257 * change
    values[..., :3] = colours.clip(0, 65535)
    return values


def in_srgb(image: Image.Image, profile: bytes | None, label: str) -> Image.Image:
    """Bring an image of this profile into sRGB; LittleCMS is loaded for those that need it."""
    if not profile and image.mode in ("L", "RGB"):
        return image
    from upfeat.colour import to_srgb

    return to_srgb(image, profile, label)


def _upright(image: Image.Image) -> Image.Image:
    """Decoded, and turned as the camera was held; no copy where it was held straight."""
    image.load()
    if image.getexif().get(_ORIENTATION, 1) not in range(2, 9):
        return image
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _unsaid_bands(image: Image.Image) -> bool:
    """Return whether a TIFF has a fourth band and does not say that it is transparency."""
    if image.format != "TIFF":
        return False
    tags = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    extra = tags.get(_EXTRA_SAMPLES, ())
    extra = extra if isinstance(extra, tuple) else (extra,)
    # 999: Corel's own number for transparency.
    return (
        tags.get(_SAMPLES_PER_PIXEL, 1) == 4
        and image.mode in ("RGB", "RGBA")
        and not any(kind in (1, 2, 999) for kind in extra)
    )


def _from_pil(image: Image.Image, label: str, unsaid: bool) -> Decoded:
    upright = _upright(image)
    if upright.mode.startswith("I;16") or upright.mode == "I":
        values = np.asarray(upright)
        # Mode I is 32 bits, which hold 16 in most files.
        deeper = values.min(initial=0) < 0 or values.max(initial=0) > 65535
        return Decoded((values if deeper else values.astype(np.uint16))[:, :, None])
    if upright.mode == "F":
        return Decoded(np.asarray(upright)[:, :, None])
    profile = upright.info.get("icc_profile")
    if unsaid and upright.mode == "RGBA":
        colour = np.asarray(in_srgb(upright.convert("RGB"), profile, label))
        return Decoded(np.concatenate([colour, np.asarray(upright)[..., 3:]], 2), alpha=None)
    alpha = None
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        alpha = rgba.getchannel("A")
        upright = rgba.convert("RGB")
        if alpha.getextrema() == (255, 255):
            alpha = None
    if upright.mode not in ("L", "RGB", "CMYK", "LAB"):
        upright = upright.convert("L" if upright.mode == "1" else "RGB")
    values = np.asarray(in_srgb(upright, profile, label))
    values = values[:, :, None] if values.ndim == 2 else values
    if alpha is None:
        return Decoded(values)
    return Decoded(np.concatenate([values, np.asarray(alpha)[:, :, None]], 2), alpha=True)


def _without_pillow(source: Path | bytes, label: str, max_pixels: int) -> Decoded:
    """Files that Pillow does not know, by the package that does."""
    start = source[:16] if isinstance(source, bytes) else _first_bytes(source)
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _by_tifffile(source, label, max_pixels)
    if start[4:8] == b"ftyp" and start[8:12] in (*_HEIF, b"avif", b"avis"):
        return _by_pillow_heif(source, label, max_pixels, start[8:12])
    raise ValueError(f"{label}: not an image that Pillow can read")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _by_pillow_heif(source: Path | bytes, label: str, max_pixels: int, brand: bytes) -> Decoded:
    if brand in (b"avif", b"avis"):
        raise ValueError(f"{label}: an AVIF image; pip install -U pillow (11.3 or newer reads it)")
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"{label}: a HEIC image; pip install pillow-heif to read it") from None
    file = source if isinstance(source, Path) else io.BytesIO(source)
    try:
        opened = pillow_heif.open_heif(file)
        size = opened.size
        image = opened.to_pillow() if size[0] * size[1] <= max_pixels else None
    except (*_DAMAGED, ValueError, RuntimeError) as error:
        raise ValueError(f"{label}: a damaged HEIC image ({_line(error)})") from None
    check_pixels(size, label=label, max_pixels=max_pixels)
    assert image is not None
    return _from_pil(image, label, unsaid=False)


def _by_tifffile(source: Path | bytes, label: str, max_pixels: int | None = None) -> Decoded:
    """TIFF files of many bands, of floats in colour, or with a plane for each band."""
    try:
        import tifffile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{label}: a TIFF file of a kind that Pillow cannot read (bands, depth or layout); "
            "pip install tifffile imagecodecs to read it"
        ) from None
    file = source if isinstance(source, Path) else io.BytesIO(source)
    try:
        with tifffile.TiffFile(file) as opened:
            page = opened.pages.first
            if max_pixels is not None:
                size = (page.imagewidth, page.imagelength)
                check_pixels(size, label=label, max_pixels=max_pixels)
            values = page.asarray()
            extra, orientation = page.extrasamples, int(page.tags.valueof(_ORIENTATION, 1))
            extra = int(extra[-1]) if extra else 0
            planes, inverted = page.planarconfig == 2, page.photometric == 0
    except ValueError as error:  # compressions that need imagecodecs, among others
        raise ValueError(f"{label}: {_line(error)}") from None
    except MemoryError:
        raise
    except Exception as error:  # it believes what the file says of itself, and so fails anywhere
        raise ValueError(f"{label}: a damaged TIFF file ({_line(error)})") from None
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"{label}: a damaged TIFF file (its image is {times(values.shape)})")
    values = values[:, :, None] if values.ndim == 2 else values
    if planes and values.ndim == 3:
        values = np.moveaxis(values, 0, -1)
    if inverted and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    alpha = extra in (1, 2)
    if values.shape[-1] == 4 and not alpha:
        return Decoded(_turned(values, orientation), alpha=None)
    return Decoded(_turned(values, orientation), alpha, premultiplied=extra == 1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _turned(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """An array (H, W, …) upright, from what its orientation tag says, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values
