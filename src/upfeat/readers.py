"""Readers of image files that Pillow cannot read, by other packages: HEIC and some TIFF files."""

from __future__ import annotations

import io
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from upfeat.optional import import_optional
from upfeat.signatures import refuse_raw, value_without_data
from upfeat.types import times

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_ORIENTATION = 274
_USUAL_TILE = 1 << 22
_BYTES_A_PIXEL = 16
"""Bytes of the largest pixels that Pillow knows, four values of 32 bits; more bands need more."""


class Decoded(NamedTuple):
    """Bands of an upright image, and their meaning."""

    values: NDArray[Any]
    """Bands, (H, W, bands): uint8, uint16, or float32."""
    alpha: bool | None = False
    """True if the last band is transparency; ``None`` if unknown."""
    premultiplied: bool = False
    """True if the colours are multiplied by the transparency."""
    nodata: float | None = None
    """Value of pixels without data; ``None`` if the file does not define it."""


@contextmanager
def naming_damage(label: str, kind: str) -> Iterator[None]:
    """Context that turns an error of Pillow into a ``ValueError`` that names the file.

    Pillow's readers trust a file's header, so damage can raise errors of any class. Errors of the
    system and of memory, warnings, unknown formats and errors that begin with the name pass.

    Args:
        label: name of the image.
        kind: kind of the damaged file, as "a damaged image".
    """
    try:
        yield
    except (UnidentifiedImageError, MemoryError, Warning):
        raise
    except Exception as error:
        named = isinstance(error, ValueError) and str(error).startswith(f"{label}: ")
        if named or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise ValueError(f"{label}: {kind} ({one_line(error)})") from None


def check_pixels(size: tuple[int, int], *, label: str, max_pixels: int) -> None:
    """Check that an image has at most ``max_pixels`` pixels; ``size`` is (width, height).

    Raises:
        ValueError: the image has more pixels.
    """
    pixels = size[0] * size[1]
    if pixels > max_pixels:
        raise ValueError(
            f"{label}: {size[0]}×{size[1]} are {pixels:,} pixels, more than max_pixels="
            f"{max_pixels:,}; if you trust it and have the memory, raise max_pixels"
        )


def check_tile(width: Any, height: Any, label: str, max_pixels: int) -> None:
    """Check the sides of a TIFF's tiles, which are decoded whole even if the image is smaller.

    Raises:
        ValueError: a tile has more than ``max_pixels`` pixels, and more than are usual.
    """
    if isinstance(width, int) and isinstance(height, int):
        check_pixels(
            (width, height), label=f"{label}: a tile", max_pixels=max(max_pixels, _USUAL_TILE)
        )


def one_line(error: Exception) -> str:
    """First 300 characters of an error's message, in one line; its class if there is none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def heif_image(source: Path | bytes, label: str, max_pixels: int, brand: bytes) -> Image.Image:
    """Decode a HEIC image by pillow-heif.

    Raises:
        ValueError: the image is damaged, larger than ``max_pixels`` or AVIF, or the package is not
            installed.
    """
    if brand in (b"avif", b"avis"):
        raise ValueError(f"{label}: an AVIF image; pip install -U pillow (11.3 or newer reads it)")
    missing = f"{label}: a HEIC image; pip install pillow-heif to read it"
    pillow_heif = import_optional("pillow_heif", missing)
    file = source if isinstance(source, Path) else io.BytesIO(source)
    with naming_damage(label, "a damaged HEIC image"):
        opened = pillow_heif.open_heif(file)
        check_pixels(opened.size, label=label, max_pixels=max_pixels)
        return opened.to_pillow()


def by_tifffile(source: Path | bytes, label: str, max_pixels: int) -> Decoded:
    """Decode a TIFF file with many bands, with colours in floating point, or with planar bands.

    Raises:
        ValueError: the file is damaged, a camera's raw file or larger than ``max_pixels``, its
            bands take more than 16 bytes for each of ``max_pixels``, or the package tifffile is not
            installed.
    """
    tifffile = import_optional(
        "tifffile",
        f"{label}: a TIFF file of a kind that Pillow cannot read (bands, depth or layout); "
        "pip install tifffile imagecodecs to read it",
    )
    file = source if isinstance(source, Path) else io.BytesIO(source)
    try:
        with tifffile.TiffFile(file) as opened:
            page = opened.pages.first
            tags = {tag.code: tag.value for tag in page.tags if tag.code < 65536}
            size = (page.imagewidth, page.imagelength)
            check_pixels(size, label=label, max_pixels=max_pixels)
            check_tile(page.tilewidth, page.tilelength, label, max_pixels)
            if page.nbytes > _BYTES_A_PIXEL * max_pixels:
                raise ValueError(
                    f"its {times(page.shape)} values are {page.nbytes:,} bytes, more than "
                    f"{_BYTES_A_PIXEL} for each of max_pixels={max_pixels:,}; if you trust it and "
                    "have the memory, raise max_pixels"
                )
            values = page.asarray()
            extra, orientation = page.extrasamples, int(page.tags.valueof(_ORIENTATION, 1))
            extra = int(extra[-1]) if extra else 0
            planes, inverted = page.planarconfig == 2, page.photometric == 0
    except ValueError as error:  # for example a compression that needs imagecodecs
        raise ValueError(f"{label}: {one_line(error).removeprefix(f'{label}: ')}") from None
    except MemoryError:
        raise
    except Exception as error:  # tifffile trusts the file's header, so any error can follow
        raise ValueError(f"{label}: a damaged TIFF file ({one_line(error)})") from None
    refuse_raw(tags, b"", label)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise ValueError(f"{label}: a damaged TIFF file (its image is {times(values.shape)})")
    values = values[:, :, None] if values.ndim == 2 else values
    if planes and values.ndim == 3:
        values = np.moveaxis(values, 0, -1)
    if inverted and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    alpha = extra in (1, 2)
    said = alpha if alpha or values.shape[-1] != 4 else None
    values = _turned(values, orientation)
    return Decoded(values, said, premultiplied=extra == 1, nodata=value_without_data(tags))


def _turned(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Rotate and mirror an array (H, W, …) upright by the value of its orientation tag, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values
