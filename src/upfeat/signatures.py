"""Recognition of unsupported kinds of files by their first bytes, for error messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CONVERT = "convert it to PNG or TIFF"
_DEVELOP = "a camera's raw file; develop it to a 16-bit TIFF first (rawpy and darktable do)"
# Offset, bytes at the offset, and the message for files that contain them.
_KINDS = (
    (0, b"\xff\x0a", f"a JPEG XL image; {_CONVERT}"),
    (4, b"JXL ", f"a JPEG XL image; {_CONVERT}"),
    (0, b"II\xbc", f"a JPEG XR image; {_CONVERT}"),
    (0, b"v/1\x01", f"an OpenEXR image; {_CONVERT}"),
    (0, b"#?RADIANCE", f"a Radiance HDR image; {_CONVERT}"),
    (4, b"ftypcrx ", _DEVELOP),
    (0, b"FUJIFILMCCD-RAW", _DEVELOP),
    (0, b"IIRO", _DEVELOP),
    (0, b"IIU\0", _DEVELOP),
    (128, b"DICM", "a DICOM file; give the array that pydicom reads, with max_value="),
    (0, b"\x93NUMPY", "a NumPy array; give numpy.load of it"),
    (0, b"\x89HDF", "an HDF5 file; give the array that h5py reads"),
    (0, b"%PDF", f"a PDF document; {_CONVERT}"),
    (0, b"%!PS", f"a PostScript document; {_CONVERT}"),
    (0, b"\xc5\xd0\xd3\xc6", f"a PostScript document; {_CONVERT}"),
    (0, b"<svg", f"an SVG drawing; {_CONVERT}"),
    (0, b"<!DOCTYPE html", "a web page, as servers send in place of an image"),
    (0, b"<html", "a web page, as servers send in place of an image"),
)
LONGEST = 132
"""Number of bytes at the start of a file that are needed to recognise it."""

_SUBFILE, _PHOTOMETRIC, _SUB_IFDS, _NO_DATA = 254, 262, 330, 42113
_SENSOR = (32803, 34892)
"""Photometric interpretations of raw sensor data: a mosaic of colours (CFA), or linear raw."""


def kind_of(start: bytes) -> str | None:
    """Kind of a file and advice, by its first :data:`LONGEST` bytes; ``None`` if not recognised."""
    if not start:
        return "an empty file"
    lower = start[:16].lower()
    for place, mark, kind in _KINDS:
        if start[place:].startswith(mark) or (not place and lower.startswith(mark.lower())):
            return kind
    return None


def refuse_raw(tags: Mapping[int, Any], start: bytes, label: str) -> None:
    """Refuse cameras' TIFF files whose first image is a thumbnail or a sensor's mosaic.

    Args:
        tags: tags of the first image, by number.
        start: the file's first bytes.
        label: name of the image, for error messages.

    Raises:
        ValueError: the file is a camera's raw file.
    """
    thumbnail = int(tags.get(_SUBFILE, 0) or 0) & 1 and _SUB_IFDS in tags
    if thumbnail or tags.get(_PHOTOMETRIC) in _SENSOR or start[8:10] == b"CR":
        raise ValueError(f"{label}: {_DEVELOP}")


def value_without_data(tags: Mapping[int, Any]) -> float | None:
    """Value of pixels without data, from a TIFF's GDAL_NODATA tag; ``None`` without a valid tag."""
    text = tags.get(_NO_DATA)
    if isinstance(text, tuple):
        text = text[0] if text else None
    try:
        return float(str(text).strip(" \0"))
    except ValueError:
        return None
