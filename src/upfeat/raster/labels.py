"""Labels of a raster: another raster on its grid, or polygons, lines and points."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upfeat.raster.scene import Scene, import_rasterio
from upfeat.types import Window

UNLABELLED = 255
_VECTORS = (".geojson", ".json")


@dataclass(frozen=True)
class Labels:
    """Class indices of a raster's pixels.

    Attributes:
        names: of the classes.
        read: from a window to (height, width) uint8, 255 where there is no label.
    """

    names: list[str]
    read: Callable[[Window], Any]


def read_labels(path: str | Path, scene: Scene, names: list[str] | None = None) -> Labels:
    """Open labels and check that they fit a raster.

    Args:
        path: a raster of class indices, or a GeoJSON file whose features have a property ``class``.
        scene: the raster.
        names: of the classes, in the order of indices.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: they are on another grid, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return (_vector if path.suffix.lower() in _VECTORS else _raster)(path, scene, names)


def _raster(path: Path, scene: Scene, names: list[str] | None) -> Labels:
    rasterio = import_rasterio("reading labels")
    try:
        file = rasterio.open(path)
    except rasterio.errors.RasterioError as error:
        raise ValueError(f"{path}: not a raster that GDAL can read ({error})") from None
    same = (file.height, file.width) == scene.size and file.transform.almost_equals(scene.transform)
    if not same or file.count != 1 or file.crs != scene.crs:
        raise ValueError(
            f"{path}: must have one band on the grid of {scene.path} ({scene.size[0]}×"
            f"{scene.size[1]} pixels, the same transform and reference system); warp it there first"
        )
    if np.dtype(file.dtypes[0]).kind not in "iu":
        raise ValueError(f"{path}: holds {file.dtypes[0]}; labels must be whole numbers")

    def read(window: Window) -> Any:
        region = ((window.top, window.bottom), (window.left, window.right))
        values = file.read(1, window=region).astype(np.int64)
        unlabelled = (file.read_masks(1, window=region) == 0) | (values == UNLABELLED)
        known = values[~unlabelled]
        if known.size and (known.min() < 0 or known.max() >= len(classes)):
            raise ValueError(
                f"{path}: has class {known.min() if known.min() < 0 else known.max()}, and there "
                f"are {len(classes)} classes (0 to {len(classes) - 1}, 255 for no label)"
            )
        return np.where(unlabelled, UNLABELLED, values).astype(np.uint8)

    classes = names or [str(index) for index in range(_largest(file) + 1)]
    return Labels(classes, read)


def _largest(file: Any) -> int:
    """The largest class index, block by block."""
    largest = 1
    for _, window in file.block_windows(1):
        values = file.read(1, window=window)
        known = values[(file.read_masks(1, window=window) != 0) & (values != UNLABELLED)]
        if known.size:
            largest = max(largest, int(known.max()))
    if largest >= UNLABELLED:
        raise ValueError(f"{file.name}: has class {largest}; 254 is the largest")
    return largest


def _vector(path: Path, scene: Scene, names: list[str] | None) -> Labels:
    """Polygons, lines and points, drawn in the order of the file."""
    import_rasterio("reading labels")
    rasterize = importlib.import_module("rasterio.features").rasterize
    windows = importlib.import_module("rasterio.windows")

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shapes = [(one["geometry"], str(one["properties"]["class"])) for one in content["features"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: not a GeoJSON of features with a property "class" ({error})'
        ) from None
    if not shapes:
        raise ValueError(f"{path}: holds no feature")
    classes = names or sorted({name for _, name in shapes})
    unknown = sorted({name for _, name in shapes} - set(classes))
    if unknown:
        raise ValueError(f"{path}: has class {unknown[0]!r}, which is none of {classes}")
    burnt = [(geometry, classes.index(name)) for geometry, name in shapes]

    def read(window: Window) -> Any:
        region = windows.Window(window.left, window.top, window.width, window.height)
        return rasterize(
            burnt,
            out_shape=(window.height, window.width),
            transform=windows.transform(region, scene.transform),
            fill=UNLABELLED,
            dtype="uint8",
        )

    return Labels(classes, read)
