"""ICC profiles for the colour spaces that PNG files define without a profile."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Chromaticities = tuple[float, ...]
"""Chromaticities x and y of white, red, green and blue: eight numbers."""

_WHITE = (0.3127, 0.329)
_SRGB: Chromaticities = (*_WHITE, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_PRIMARIES: dict[int, Chromaticities] = {
    1: _SRGB,
    9: (*_WHITE, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    12: (*_WHITE, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
"""Chromaticities of code points of ITU-T H.273: sRGB, BT.2020, Display P3."""
_GAMMAS = {4: 1 / 2.2, 5: 1 / 2.8, 8: 1.0}
"""Exponents of transfer functions of ITU-T H.273, by code point.

Transfer functions that are neither here nor in :data:`HIGH_RANGE` are close to sRGB's."""
HIGH_RANGE = (16, 18)
"""Code points of ITU-T H.273 for transfer functions of high dynamic range, PQ and HLG."""

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def embedded_profile(info: Mapping[Any, Any]) -> bytes | None:
    """Profile of an image, or a profile of the colour space that a PNG's chunks define.

    Args:
        info: ``info`` of a Pillow image: ``icc_profile``, ``srgb``, ``gamma`` (gAMA) and
            ``chromaticity`` (cHRM) as read by Pillow, and ``cicp`` as read by
            :func:`coding_points`.

    Returns:
        A profile made from cICP; without cICP the file's profile; without that a profile made from
        gAMA and cHRM. This is the order that PNG specifies. ``None`` for sRGB, and for images
        without a colour space.
    """
    cicp = info.get("cicp")
    if cicp and cicp[0] in _PRIMARIES and cicp[1] not in HIGH_RANGE:
        return _made(_PRIMARIES[cicp[0]], _GAMMAS.get(cicp[1]))
    if "icc_profile" in info or "srgb" in info:
        return info.get("icc_profile")
    gamma, chromaticities = info.get("gamma"), info.get("chromaticity", _SRGB)
    if not isinstance(gamma, float) or not 0.05 < gamma < 20 or len(chromaticities) != 8:
        return None
    # With a gamma of 1/2.2, files approximate sRGB's curve.
    return _made(tuple(chromaticities), None if abs(gamma - 1 / 2.2) < 0.01 else gamma)


def coding_points(source: Path | bytes) -> tuple[int, ...] | None:
    """Read the numbers of a PNG's cICP chunk, which Pillow ignores; ``None`` without a chunk."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            start = file.read(4096)
    else:
        start = source[:4096]
    place = 8
    while place + 12 <= len(start):
        length, kind = struct.unpack(">I4s", start[place : place + 8])
        if kind == b"IDAT":
            return None
        if kind == b"cICP" and length == 4:
            return tuple(start[place + 8 : place + 12])
        place += 12 + length
    return None


@lru_cache(maxsize=16)
def _made(chromaticities: Chromaticities, gamma: float | None) -> bytes | None:
    """Make a matrix profile, ICC version 4.

    Args:
        chromaticities: chromaticities of white, red, green and blue.
        gamma: exponent by which light was encoded as the file's values; ``None`` for sRGB's curve.

    Returns:
        The profile; ``None`` for sRGB, and for chromaticities that span no colour space.
    """
    if gamma is None and np.abs(np.subtract(chromaticities, _SRGB)).max() < 0.002:
        return None
    points = np.array(chromaticities).reshape(4, 2)
    if (points[:, 1] <= 0).any():
        return None
    # Columns X, Y, Z of white, red, green and blue, at luminance Y = 1.
    light = np.stack([points[:, 0], points[:, 1], 1 - points.sum(1)]) / points[:, 1]
    white, primaries = light[:, 0], light[:, 1:]
    if abs(np.linalg.det(primaries)) < 1e-6:
        return None
    primaries = primaries * np.linalg.solve(primaries, white)
    adapted = _BRADFORD / (_BRADFORD @ white)[:, None] * (_BRADFORD @ _D50)[:, None]
    primaries = np.linalg.solve(_BRADFORD, adapted @ primaries)
    if gamma is None:
        curve = _numbers(b"para\0\0\0\0\0\3\0\0", 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    else:
        curve = _numbers(b"para\0\0\0\0\0\0\0\0", 1 / gamma)
    tags = [(b"wtpt", _numbers(b"XYZ \0\0\0\0", *_D50))]
    for band, colour in enumerate((b"r", b"g", b"b")):
        tags.append((colour + b"XYZ", _numbers(b"XYZ \0\0\0\0", *primaries[:, band])))
        tags.append((colour + b"TRC", curve))
    return _packed(tags)


def _packed(tags: list[tuple[bytes, bytes]]) -> bytes:
    """Encode a display profile with the given tags (name and content)."""
    place = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags:
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content
    header = struct.pack(">II", place + len(data), 0) + b"\4\0\0\0mntrRGB XYZ " + b"\0" * 12
    header = _numbers(header + b"acsp" + b"\0" * 28, *_D50).ljust(128, b"\0")
    return header + table + data


def _numbers(start: bytes, *values: float) -> bytes:
    """Append numbers to ``start`` in the fixed-point format s15Fixed16."""
    return start + b"".join(struct.pack(">i", round(value * 65536)) for value in values)
