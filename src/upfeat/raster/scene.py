"""Windows of a raster as images for a backbone: chosen bands, scaled to [0, 1], with a mask."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upfeat.bounds import indices, path_of, shown
from upfeat.optional import import_optional
from upfeat.types import Window

PERCENTILES = (2.0, 98.0)
"""Percentiles of a band whose values become 0 and 1, for types other than uint8."""

CACHE_BYTES = 128 * 2**20
"""Size of GDAL's cache of decoded blocks, bytes."""

_OVERVIEW_SIDE = 1024
_READERS = {
    **dict.fromkeys((".tif", ".tiff"), "GTiff"),
    **dict.fromkeys((".jp2", ".j2k"), "JP2OpenJPEG"),
    **dict.fromkeys((".jpg", ".jpeg"), "JPEG"),
    ".png": "PNG",
}
"""GDAL's readers by suffix. A file of another suffix is opened by the reader that recognises it,
perhaps that of VRT, whose files name other files and addresses."""
_COLOURS = ("red", "green", "blue")

Scale = tuple[float, float] | Sequence[tuple[float, float]] | None
"""(low, high) for all bands, a pair for each band, or ``None`` to derive pairs from the raster."""


def import_rasterio(needed_for: str) -> Any:
    """Import rasterio with its submodules ``errors`` and ``enums``.

    Raises:
        ValueError: rasterio is not installed; ``needed_for`` names the purpose in the message.
    """
    missing = f"{needed_for} needs the package rasterio: pip install 'upfeat[raster]'"
    rasterio = import_optional("rasterio", missing)
    for name in ("rasterio.errors", "rasterio.enums"):
        import_optional(name, missing)
    return rasterio


def open_raster(path: Path, needed_for: str) -> Any:
    """Open a file with rasterio.

    Raises:
        ValueError: the file is no raster, or one under the name of a picture that refers to another
            file, or rasterio is not installed.
    """
    rasterio = import_rasterio(needed_for)
    reader = _READERS.get(path.suffix.lower())
    with rasterio.Env() as environment:
        reader = reader if reader in environment.drivers() else None
    try:
        with warnings.catch_warnings():
            # A raster without a georeference is upsampled like any other.
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            # Absolute, since GDAL reads the text before a colon as the name of a protocol.
            file = rasterio.open(path.absolute(), driver=reader)
            other = file.tags(ns="OVERVIEWS").get("OVERVIEW_FILE", "")
            # A file in the same folder is no stranger: some programs keep overviews beside a file.
            if reader is not None and other and not re.fullmatch(r":::BASE:::[^/\\]+", other):
                file.close()
                raise ValueError(f"{path}: takes its overviews from {other}; remove that metadata")
            return file
    except raster_errors() as error:
        kind = "" if reader is None else f" as {reader}, by its name"
        raise ValueError(f"{path}: not a raster that GDAL can read{kind} ({error})") from None


def raster_errors() -> tuple[type[Exception], ...]:
    """Errors of rasterio, and of GDAL, which rasterio passes on; its messages may be no UTF-8."""
    errors = importlib.import_module("rasterio.errors")
    gdal = importlib.import_module("rasterio._err").CPLE_BaseError
    return errors.RasterioError, gdal, UnicodeDecodeError


def block_cache(rasterio: Any) -> AbstractContextManager[Any]:
    """Return a context that bounds GDAL's block cache, by default 1/20 of the machine's memory.

    GDAL reads the bound once, before its first block. A bound that the user set by the environment
    variable ``GDAL_CACHEMAX`` stays.
    """
    if "GDAL_CACHEMAX" in os.environ:
        return nullcontext()
    return rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES)


class Scene:
    """An open raster.

    Attributes:
        path: path of the file.
        size: (height, width), pixels.
        bands: chosen bands, counted from 1, in the order in which the backbone sees them.
        crs: coordinate reference system, or ``None``.
        transform: affine map from (column, row) to coordinates.
        gcps: (ground control points, their reference system) of a raster that has these instead of
            a transform; else ([], ``None``).
        rpcs: coefficients of rational polynomials that locate the raster, or ``None``.
        scales: (low, high) of each colour: the values that become 0 and 1.
        fill: (colours,) in [0, 1], the value of masked pixels: the mean of the valid pixels.

    The colours are the chosen bands, or the three colours of a single band with a palette.
    """

    def __init__(
        self, path: str | Path, *, bands: Sequence[int] | None = None, scale: Scale = None
    ) -> None:
        """Open a raster and compute scales and fill from an overview of it.

        Args:
            path: any raster that rasterio opens: GeoTIFF, COG, VRT, JP2, ….
            bands: three bands, or a single grey band, counted from 1; ``None`` for the bands marked
                red, green and blue, or for all bands but transparency if these are one or three.
            scale: the values that become 0 and 1: (low, high) for all bands, or a pair for each.
                ``None``: 0 to 255 for uint8 (less for a file of fewer bits), and for other types
                the 2nd and 98th percentile of each band over an overview of the whole raster.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no raster, its values are complex, its bands must be chosen,
                an argument is out of range, or no pixel is valid.
        """
        self.path = path_of("path", path)
        import_rasterio("reading rasters")
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: {_reason_without_file(str(path))}")
        if not self.path.is_file() and not self.path.is_dir():
            raise ValueError(f"{self.path}: a pipe or a device, not a file")
        self._error = raster_errors()
        self._file = file = open_raster(self.path, "reading rasters")
        if not file.count and file.subdatasets:
            raise ValueError(
                f"{self.path}: holds several rasters; write one of them by gdal_translate -of VRT "
                f"'{file.subdatasets[0]}' scene.vrt, and give scene.vrt"
            )
        try:
            overview, valid = self._read_facts(file, bands)
        except self._error as error:
            raise ValueError(f"{self.path}: damaged, it cannot be read ({error})") from None
        if not valid.any():
            raise ValueError(f"{self.path}: holds no valid pixel: all of it is no-data")
        self.scales = self._find_scales(scale, overview, valid)
        scaled = self._scaled(overview)[:, valid]
        self.fill = scaled.mean(axis=1, dtype=np.float64).astype(np.float32)

    def __repr__(self) -> str:
        """One line: path, size and bands."""
        height, width = self.size
        return f"{type(self).__name__}({str(self.path)!r}: {height}×{width}, bands {self.bands})"

    def _read_facts(self, file: Any, bands: Sequence[int] | None) -> tuple[Any, Any]:
        """Read the file's facts; return an overview of its values, and a mask of valid pixels."""
        rasterio = import_rasterio("reading rasters")
        self.size = (int(file.height), int(file.width))
        self.crs, self.transform = file.crs, file.transform
        self.gcps, self.rpcs = file.gcps, file.rpcs
        self.bands = _choose_bands(file, bands)
        self._palette = _read_palette(file, self.bands)
        kinds = [np.dtype(file.dtypes[band - 1]) for band in self.bands]
        if any(kind.kind == "c" for kind in kinds):
            raise ValueError(
                f"{self.path}: holds complex numbers; write their magnitude as a raster first"
            )
        flags = [file.mask_flag_enums[band - 1] for band in self.bands]
        all_valid = [rasterio.enums.MaskFlags.all_valid]
        # GDAL uses a band of transparency as a mask only beside one or three other bands.
        transparent = [index + 1 for index, name in enumerate(_names(file)) if name == "alpha"]
        masked = all(rasterio.enums.MaskFlags.alpha in flag for flag in flags)
        self._transparency = [] if masked else transparent
        # True if no pixel can be without data, in which case masks need not be read.
        self._whole = not self._transparency and all(
            kind.kind != "f" and flag == all_valid for kind, flag in zip(kinds, flags, strict=True)
        )
        if self._palette is not None and not self._palette[:, 3].all():
            self._whole = False
        bits = [file.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "8") for band in self.bands]
        self._brightest = 255 if self._palette is not None else 2 ** min(8, max(map(int, bits))) - 1
        with block_cache(rasterio):
            shape = tuple(min(side, _OVERVIEW_SIDE) for side in self.size)
            return self._coloured(self._read_bands(shape), self._read_masks(shape))

    @property
    def facts(self) -> dict[str, Any]:
        """All properties that determine features and georeference, as JSON values."""
        return {
            "size": list(self.size),
            "bands": list(self.bands),
            "scales": [list(pair) for pair in self.scales],
            "fill": [float(value) for value in self.fill],
            "crs": self.crs.to_wkt() if self.crs else None,
            "transform": list(self.transform)[:6],
        }

    def read(self, window: Window) -> tuple[Tensor, Tensor]:
        """Read a window.

        Args:
            window: in pixels; pixels beyond the lower or right edge repeat the edge.

        Returns:
            The image, (3, height, width) in [0, 1], masked pixels filled; and the mask, (height,
            width) bool, True where a pixel is valid.

        Raises:
            ValueError: a block of the file is damaged.
        """
        bottom, right = min(window.bottom, self.size[0]), min(window.right, self.size[1])
        # A window entirely beyond an edge reads the last row or column.
        top, left = min(window.top, self.size[0] - 1), min(window.left, self.size[1] - 1)
        values, valid = self._read(Window(top, left, bottom - top, right - left))
        image = self._scaled(values)
        if not valid.all():
            image[:, ~valid] = self.fill[:, None]
        beyond = (window.height - values.shape[1], window.width - values.shape[2])
        if any(beyond):
            below, beside = (0, beyond[0]), (0, beyond[1])
            image = np.pad(image, ((0, 0), below, beside), mode="edge")
            valid = np.pad(valid, (below, beside), mode="edge")
        pixels = torch.from_numpy(image).expand(3, -1, -1)
        return pixels, torch.from_numpy(valid)

    def read_valid(self, window: Window) -> Tensor:
        """Return the mask that :meth:`read` returns, (height, width) bool, True where valid."""
        if self._whole:
            return torch.ones(window.height, window.width, dtype=torch.bool)
        return self.read(window)[1]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, window: Window) -> tuple[Any, Any]:
        """Return the values of the chosen bands, and a mask of pixels valid in all of them."""
        region = ((window.top, window.bottom), (window.left, window.right))
        try:
            values = self._read_bands(window=region)
            masks = None if self._whole else self._read_masks(window=region)
        except self._error as error:
            raise ValueError(
                f"{self.path}: rows {window.top} to {window.bottom - 1}, columns {window.left} to "
                f"{window.right - 1} cannot be read, the file is damaged there ({error})"
            ) from None
        return self._coloured(values, masks)

    def _read_bands(self, shape: tuple[int, ...] | None = None, window: Any = None) -> Any:
        """Read the chosen bands, (bands, H, W), in the smallest type that holds all of them."""
        if len({self._file.dtypes[band - 1] for band in self.bands}) == 1:
            size = None if shape is None else (len(self.bands), *shape)
            return self._file.read(self.bands, out_shape=size, window=window)
        bands = [self._file.read(band, out_shape=shape, window=window) for band in self.bands]
        return np.stack([band.astype(np.result_type(*bands)) for band in bands])

    def _coloured(self, values: Any, masks: Any) -> tuple[Any, Any]:
        """Apply the palette to values of bands; return colours and a mask of valid pixels."""
        valid = np.ones(values.shape[1:], dtype=bool) if masks is None else _valid(values, masks)
        if self._palette is None:
            return values, valid
        colours = np.take(self._palette, values[0], axis=0, mode="clip")  # (H, W, 4)
        return np.moveaxis(colours[..., :3], -1, 0), valid & (colours[..., 3] > 0)

    def _read_masks(self, shape: tuple[int, ...] | None = None, window: Any = None) -> Any:
        """Read masks of the chosen bands and bands of transparency, (…, H, W): 0 where invalid."""
        masks = []
        for read, bands in (
            (self._file.read_masks, self.bands),
            (self._file.read, self._transparency),
        ):
            size = None if shape is None else (len(bands), *shape)
            masks += list(read(bands, out_shape=size, window=window)) if bands else []
        return np.stack(masks)

    def _find_scales(self, scale: Scale, overview: Any, valid: Any) -> list[tuple[float, float]]:
        count = len(overview)
        if scale is None:
            if overview.dtype == np.uint8:
                return [(0.0, float(self._brightest))] * count
            ends = np.percentile(overview[:, valid].astype(np.float64), PERCENTILES, axis=1).T
            # A constant band would divide by 0; it becomes 0 throughout.
            return [(low, high if _wide(low, high) else low + 1.0) for low, high in ends.tolist()]
        try:
            pairs = np.asarray(scale, dtype=np.float64)
            pairs = np.tile(pairs, (count, 1)) if pairs.shape == (2,) else pairs
        except (TypeError, ValueError):
            pairs = np.empty(0)
        if pairs.shape != (count, 2) or not all(_wide(*pair) for pair in pairs.tolist()):
            raise ValueError(
                f"scale={shown(scale)} must be (low, high), two finite numbers with low below "
                f"high, or {count} such pairs, one for each band"
            )
        return [(low, high) for low, high in pairs.tolist()]

    def _scaled(self, values: Any) -> Any:
        """Scale the values of bands to [0, 1], float32."""
        if values.dtype == np.uint8 and values.size > 3 * 256:
            # A table of all 256 values gives equal results in a fifth of the time.
            known = np.arange(256, dtype=np.uint8)
            tables = self._scaled(np.tile(known, (len(values), 1)))
            out = np.empty(values.shape, dtype=np.float32)
            for band, table in enumerate(tables):
                np.take(table, values[band], out=out[band], mode="clip")
            return out
        # float64 for types with values that float32 does not represent exactly.
        kind = np.result_type(values.dtype, np.float32)
        low, high = np.asarray(self.scales).T.reshape(2, -1, *[1] * (values.ndim - 1))
        width = (high - low).astype(kind)
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = np.clip((values.astype(kind) - low.astype(kind)) / width, 0, 1)
        return scaled.astype(np.float32, copy=False)


def _reason_without_file(name: str) -> str:
    """Return why there is no file of a name: it may be another of GDAL's names for a raster."""
    if re.match(r"(\w{2,}:|/vsi)", name):
        return (
            "is no file; for a raster on a server or inside a file, write a file that refers "
            "to it, such as by gdal_translate -of VRT /vsicurl/https://… scene.vrt, and give that"
        )
    return "no such file"


def _valid(values: Any, masks: Any) -> Any:
    valid = (masks != 0).all(axis=0)
    return valid & np.isfinite(values).all(axis=0) if values.dtype.kind == "f" else valid


def _read_palette(file: Any, bands: list[int]) -> Any:
    """Return the palette of a single chosen band as RGBA, (entries, 4) uint8; ``None`` without."""
    if len(bands) != 1 or _names(file)[bands[0] - 1] != "palette":
        return None
    entries = file.colormap(bands[0])
    palette = np.zeros((max(entries) + 1, 4), dtype=np.uint8)
    palette[list(entries)] = list(entries.values())
    return palette


def _names(file: Any) -> list[str]:
    return [interpretation.name for interpretation in file.colorinterp]


def _wide(low: float, high: float) -> bool:
    """Return whether two numbers are finite and far enough apart to divide by, in float32."""
    largest = float(np.finfo(np.float32).max)
    return -largest <= low and high <= largest and high - low >= float(np.finfo(np.float32).tiny)


def _choose_bands(file: Any, bands: Sequence[int] | None) -> list[int]:
    """Check the chosen bands; without a choice, return red, green and blue, or the only bands."""
    if bands is not None:
        chosen = indices(bands, 1, file.count)
        if len(chosen) not in (1, 3):
            raise ValueError(
                f"bands={shown(bands)} must be three bands or one, each from 1 to {file.count}, "
                f"for {file.name}"
            )
        return chosen
    names = _names(file)
    if all(colour in names for colour in _COLOURS):
        return [names.index(colour) + 1 for colour in _COLOURS]
    found = [index + 1 for index, name in enumerate(names) if name != "alpha"]
    if len(found) in (1, 3):
        return found
    raise ValueError(
        f"{file.name}: has {len(found)} bands, none marked red, green and blue; choose three (or "
        "one), for example bands=[4, 3, 2] (--bands 4,3,2)"
    )
