"""Colour spaces that PNG files name without a profile, as profiles."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Chromaticities = tuple[float, ...]
"""x and y of white, red, green and blue."""

_WHITE = (0.3127, 0.329)
_SRGB: Chromaticities = (*_WHITE, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_PRIMARIES: dict[int, Chromaticities] = {
    1: _SRGB,
    9: (*_WHITE, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    12: (*_WHITE, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
"""Of ITU-T H.273: sRGB, BT.2020, Display P3."""
_GAMMAS = {4: 1 / 2.2, 5: 1 / 2.8, 8: 1.0}
"""Exponents of its transfer functions; the others but :data:`HIGH_RANGE` are as sRGB's or close."""
HIGH_RANGE = (16, 18)
"""Its transfer functions of high dynamic range, PQ and HLG."""

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def embedded_profile(info: Mapping[Any, Any]) -> bytes | None:
    """The profile of an image, or one of the colours that a PNG's chunks name.

    Args:
        info: of a Pillow image: ``icc_profile``, ``srgb``, ``gamma`` (gAMA) and ``chromaticity``
            (cHRM) as Pillow has them, and ``cicp`` as :func:`coding_points` reads it.

    Returns:
        The file's profile if it has one, one made from cICP, or from gAMA and cHRM; ``None`` for
        sRGB, and where nothing is said. The order of preference is the format's.
    """
    cicp = info.get("cicp")
    if cicp and cicp[0] in _PRIMARIES and cicp[1] not in HIGH_RANGE:
        return _made(_PRIMARIES[cicp[0]], _GAMMAS.get(cicp[1]))
    if "icc_profile" in info or "srgb" in info:
        return info.get("icc_profile")
    gamma, chromaticities = info.get("gamma"), info.get("chromaticity", _SRGB)
    if not isinstance(gamma, float) or not 0.05 < gamma < 20 or len(chromaticities) != 8:
        return None
    # 1/2.2 is how files without a better word say sRGB.
    return _made(tuple(chromaticities), None if abs(gamma - 1 / 2.2) < 0.01 else gamma)


def coding_points(source: Path | bytes) -> tuple[int, ...] | None:
    """The numbers of a PNG's cICP chunk, which Pillow passes over; ``None`` without one."""
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
    """A matrix profile, ICC version 4; ``None`` for sRGB, and for points that make no space.

    Args:
        chromaticities: of white, red, green and blue.
        gamma: the exponent that made the file's values of light; ``None`` for sRGB's curve.
    """
    if gamma is None and np.abs(np.subtract(chromaticities, _SRGB)).max() < 0.002:
        return None
    points = np.array(chromaticities).reshape(4, 2)
    if (points[:, 1] <= 0).any():
        return None
    # Columns of X, Y, Z for each point at luminance 1.
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
    """A profile of a display with these tags."""
    place = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags:
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content
    header = struct.pack(">II", place + len(data), 0) + b"\4\0\0\0mntrRGB XYZ " + b"\0" * 12
    header = _numbers(header + b"acsp" + b"\0" * 28, *_D50).ljust(128, b"\0")
    return header + table + data


def _numbers(start: bytes, *values: float) -> bytes:
    """Numbers of 16 and 16 bits behind what names them."""
    return start + b"".join(struct.pack(">i", round(value * 65536)) for value in values)
