"""Decoding of image files to arrays of their bands, at the files' own bit depth."""

from __future__ import annotations

import io
import logging
import math
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from upfeat.png_colours import HIGH_RANGE, coding_points, embedded_profile
from upfeat.readers import (
    HEIF,
    Decoded,
    by_tifffile,
    check_pixels,
    check_tile,
    heif_image,
    naming_damage,
)
from upfeat.signatures import LONGEST, kind_of, refuse_raw, value_without_data

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)
# Pillow warns of files with more samples than it reads; tifffile reads these files here.
logging.getLogger("PIL.TiffImagePlugin").addFilter(lambda said: "More samples" not in str(said.msg))

MAX_PIXELS = 1 << 28
"""Default limit of an image, 268 million pixels: the largest cameras', 3 GiB as RGB in float32."""

_BITS = 258
_ORIENTATION = 274
_EXTRA_SAMPLES = 338
_SAMPLES_PER_PIXEL = 277
_PLANAR = 284
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_PHOTOMETRIC = 262
_ICON = b"\0\0\1\0"
_SHALLOW = {"L;2": 85, "L;4": 17}
"""Factors by which Pillow multiplies greys of 2 and 4 bits, but not the transparent grey level."""


def decode_file(source: Path | bytes | IO[bytes], *, label: str, max_pixels: int) -> Decoded:
    """Decode an image file.

    Args:
        source: a path, the file's bytes, or an open binary file, read to its end.
        label: name of the image, for error messages.
        max_pixels: largest number of pixels; larger images are refused before decoding.

    Raises:
        FileNotFoundError: ``source`` is a path that is not a file.
        ValueError: the file is not an image, is damaged, exceeds the limit, or needs a package that
            is not installed (the message names it).
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
        with (
            naming_damage(label, "a truncated or damaged image"),
            _opened(source, max_pixels) as image,
        ):
            check_pixels(image.size, label=label, max_pixels=max_pixels)
            decoded = _decode(image, source, label, max_pixels)
            height, width = decoded.values.shape[:2]  # an icon's header may tell another size
            check_pixels((width, height), label=label, max_pixels=max_pixels)
            return decoded
    except UnidentifiedImageError:
        return _without_pillow(source, label, max_pixels)


def decode_pil(image: Image.Image, label: str) -> Decoded:
    """Decode a Pillow image of any mode, upright and in sRGB."""
    return _from_pil(image, label, _unsaid_bands(image))


def open_upright(path: Path, *, short_side: int | None = None) -> Image.Image:
    """Decode a file that Pillow can read, upright, in its own mode and colours.

    Args:
        path: path of the file.
        short_side: number of pixels that the caller needs on the shorter side. A JPEG file is
            decoded at a reduced size of at least twice that; ``None`` for the full size.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: Pillow cannot read the file, or the file is damaged or exceeds
            :data:`MAX_PIXELS`.
    """
    try:
        with naming_damage(str(path), "a damaged image"), _opened(path, MAX_PIXELS) as image:
            check_pixels(image.size, label=str(path), max_pixels=MAX_PIXELS)
            if short_side is not None and image.format == "JPEG":
                # Twice as fine as needed, so that the caller's resampling sets the quality.
                scale = 2 * short_side / min(image.size)
                image.draft("RGB", tuple(math.ceil(side * scale) for side in image.size))  # pyright: ignore[reportArgumentType]
            return _upright(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that Pillow can read") from None


def image_size(path: Path | bytes) -> tuple[int, int] | None:
    """(height, width) of an upright image, from the file's header; ``None`` if it cannot be read.

    Nothing is decoded, and no error is raised: decoding the file raises it.
    """
    try:
        with warnings.catch_warnings(), _opened(path) as image:
            warnings.simplefilter("ignore")
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
    except Exception:  # Pillow's readers raise errors of any class
        return None
    return (width, height) if turned else (height, width)


class _Limit:
    """Pillow's own limit of pixels, set to that of the images that are being decoded.

    Pillow's limit is below the size of telephones' photographs. It is lifted while a file is
    opened, since :func:`check_pixels` follows with a clear message. While it is decoded, Pillow
    applies the limit to images inside it, such as the PNG of an icon, whose size the file's header
    need not tell. Pillow has one limit for all threads: the largest that any of them needs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: list[float] = []
        self._own: Any = None

    @contextmanager
    def at_least(self, pixels: float) -> Iterator[None]:
        """Context in which Pillow accepts images of ``pixels`` pixels."""
        with self._lock:
            if not self._limits:
                self._own = Image.MAX_IMAGE_PIXELS
            self._limits.append(pixels)
            self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._limits.remove(pixels)
                self._apply()

    def _apply(self) -> None:
        largest: Any = max(self._limits, default=self._own)
        Image.MAX_IMAGE_PIXELS = None if largest == math.inf else largest


_LIMIT = _Limit()


@contextmanager
def _opened(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image file without decoding it, and bound images inside it by ``max_pixels``."""
    # Not by name: Pillow would map uncompressed TIFF files into memory and rotate them wrongly.
    file = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
    with file:
        # An icon, unlike all others, is decoded when it is opened.
        icon = _first_bytes(source).startswith(_ICON)
        with _LIMIT.at_least(max_pixels if icon else math.inf):
            image = Image.open(file)
        with _LIMIT.at_least(max_pixels), image:
            if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
                raise UnidentifiedImageError
            if image.format == "PNG" and (points := coding_points(source)):
                image.info["cicp"] = points
            yield image


def _decode(image: Image.Image, source: Path | bytes, label: str, max_pixels: int) -> Decoded:
    unsaid = _unsaid_bands(image)
    tiff = image.format == "TIFF"
    tags: Any = {}
    raw = _raw_mode(image)
    if tiff:
        tags = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
        refuse_raw(tags, _first_bytes(source), label)
        check_tile(tags.get(_TILE_WIDTH), tags.get(_TILE_HEIGHT), label, max_pixels)
        bands = tags.get(_SAMPLES_PER_PIXEL, 1)
        planes = bands > 1 and tags.get(_PLANAR) == 2 and max(tags.get(_BITS, (8,))) > 8
        if planes or bands > 4:
            return by_tifffile(source, label, max_pixels)
    elif image.format != "MPO" and getattr(image, "is_animated", False):
        warnings.warn(f"{label}: an animation; its first frame is taken", stacklevel=2)
        image.seek(0)
    if image.info.get("cicp", (0, 0))[1] in HIGH_RANGE:
        warnings.warn(f"{label}: of high dynamic range (PQ or HLG); read as stored", stacklevel=2)
    if raw in _SHALLOW and "transparency" in image.info:
        image.info["transparency"] *= _SHALLOW[raw]
    if raw.partition(";")[0] in ("RGB", "RGBA", "RGBa", "RGBX", "LA") and ";16" in raw:
        decoded = _deep(image, source, raw, label, unsaid)
    else:
        if unsaid and raw == "RGBX":  # Pillow would drop the fourth band
            _reread(image, "RGBA", "RGBA")
        decoded = _from_pil(image, label, unsaid)
    return decoded._replace(nodata=value_without_data(tags)) if tiff else decoded


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for the layout of samples in the file; empty if there is none."""
    tile = getattr(image, "tile", None)
    arguments = tile[0][3] if tile else ""
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw if isinstance(raw, str) else ""


def _reread(image: Any, mode: str, raw: str) -> None:
    """Make an opened image unpack its samples as another raw mode when it is loaded."""
    image._mode = mode
    image.tile = [
        tile._replace(args=(raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw)
        if hasattr(tile, "_replace")
        else (*tile[:3], (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw)
        for tile in image.tile
    ]


def _deep(image: Image.Image, source: Path | bytes, raw: str, label: str, unsaid: bool) -> Decoded:
    """Decode 16-bit colours, of which Pillow unpacks only the high bytes.

    The file is decoded twice: a second pass in the opposite byte order gives the low bytes.
    """
    if raw.startswith("LA"):
        _reread(image, "RGBA", "RGBA")  # grey and alpha: four bytes per pixel, unconverted
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
    values = _deep_to_srgb(values, upright.info, label)
    alpha = (None if unsaid else True) if mode == "RGBA" else False
    return Decoded(values, alpha, premultiplied=raw.startswith("RGBa"))


def _deep_to_srgb(values: NDArray[Any], info: dict[Any, Any], label: str) -> NDArray[Any]:
    """Convert 16-bit greys or colours (H, W, bands) to sRGB by the profile in Pillow's ``info``.

    Through Pillow, LittleCMS converts 8 bits. The results of the two nearest 8-bit levels are
    therefore interpolated linearly.
    """
    profile = embedded_profile(info)
    if not profile:
        return values
    bands = 3 if values.shape[2] >= 3 else 1
    level, rest = np.divmod(values[..., :bands], 257)
    before = _picture(level)
    after = in_srgb(before, profile, label)
    if after is before:
        return values
    mode = "RGB" if bands == 3 else "L"
    lower = np.asarray(after.convert(mode), np.int32).reshape(level.shape)
    after = in_srgb(_picture(np.minimum(level + 1, 255)), profile, label)
    upper = np.asarray(after.convert(mode), np.int32).reshape(level.shape)
    colours = 257 * lower + (upper - lower) * rest
    return np.concatenate([colours.clip(0, 65535).astype(np.uint16), values[..., bands:]], 2)


def _picture(levels: NDArray[Any]) -> Image.Image:
    levels = levels.astype(np.uint8)
    return Image.fromarray(levels if levels.shape[2] == 3 else levels[..., 0])


def in_srgb(image: Image.Image, profile: bytes | None, label: str) -> Image.Image:
    """Convert an image with the given profile to sRGB; LittleCMS is loaded only if needed."""
    if not profile and image.mode in ("L", "RGB"):
        return image
    from upfeat.colour import to_srgb

    return to_srgb(image, profile, label)


def _upright(image: Image.Image) -> Image.Image:
    """Decode an image and rotate it upright by its EXIF data; no copy if it is upright already."""
    image.load()
    if image.getexif().get(_ORIENTATION, 1) not in range(2, 9):
        return image
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _unsaid_bands(image: Image.Image) -> bool:
    """Return whether a TIFF has a fourth band that its tags do not declare as transparency."""
    if image.format != "TIFF":
        return False
    tags = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    extra = tags.get(_EXTRA_SAMPLES, ())
    extra = extra if isinstance(extra, tuple) else (extra,)
    # 1 and 2 are alpha, premultiplied or not; 999 is Corel's own number for it.
    return (
        tags.get(_SAMPLES_PER_PIXEL, 1) == 4
        and image.mode in ("RGB", "RGBA")
        and not any(kind in (1, 2, 999) for kind in extra)
    )


def _from_pil(image: Image.Image, label: str, unsaid: bool) -> Decoded:
    upright = _upright(image)
    if upright.mode.startswith("I;16") or upright.mode == "I":
        values = np.asarray(upright)
        # Mode I has 32 bits, but most files contain 16-bit values.
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            return Decoded(values[:, :, None])
        return _deep_grey(values.astype(np.uint16), image, upright, label)
    if upright.mode == "F":
        return Decoded(np.asarray(upright)[:, :, None])
    profile = embedded_profile(upright.info)
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


def _deep_grey(values: NDArray[Any], image: Any, upright: Image.Image, label: str) -> Decoded:
    """Decode 16-bit greys (H, W); Pillow ignores their polarity, transparent level and profile."""
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        values = 65535 - values
    hidden = upright.info.get("transparency")
    opaque = None if hidden is None else (values != hidden) * np.uint16(65535)
    deep = _deep_to_srgb(values[:, :, None], upright.info, label)
    return Decoded(deep if opaque is None else np.dstack([deep, opaque]), opaque is not None)


def _without_pillow(source: Path | bytes, label: str, max_pixels: int) -> Decoded:
    """Decode a file that Pillow cannot read by the package that can.

    Raises:
        ValueError: no package can, or it is not installed.
    """
    start = _first_bytes(source)
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return by_tifffile(source, label, max_pixels)
    if start[4:8] == b"ftyp" and start[8:12] in (*HEIF, b"avif", b"avis"):
        return _from_pil(heif_image(source, label, max_pixels, start[8:12]), label, unsaid=False)
    kind = kind_of(start)
    raise ValueError(f"{label}: not an image that Pillow can read" + (f": {kind}" if kind else ""))


def _first_bytes(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:LONGEST]
    with source.open("rb") as file:
        return file.read(LONGEST)
