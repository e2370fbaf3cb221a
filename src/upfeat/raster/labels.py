"""Labels of a raster: another raster on its grid, or polygons, lines and points."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from upfeat.bounds import number
from upfeat.failures import one_line
from upfeat.raster.scene import Scene, import_rasterio, open_raster, raster_errors
from upfeat.types import Window

UNLABELLED = 255
_VECTORS = (".geojson", ".json")
# Nesting depth of a geometry's coordinates; a position, itself a list of numbers, has depth 0.
_DEPTHS = {"Point": 0, "MultiPoint": 1, "LineString": 1, "MultiLineString": 2, "Polygon": 2}
_DEPTHS["MultiPolygon"] = 3


@dataclass(frozen=True)
class Labels:
    """Class indices of a raster's pixels.

    Attributes:
        names: names of the classes, in the order of indices.
        read: function from a window of pixels to class indices, (height, width) uint8, 255 where
            there is no label.
    """

    names: list[str]
    read: Callable[[Window], Any]


def read_labels(path: str | Path, scene: Scene, names: list[str] | None = None) -> Labels:
    """Open labels and check that they fit a raster.

    Args:
        path: a raster of class indices, or a GeoJSON file whose features have a property ``class``.
        scene: the raster.
        names: names of the classes, in the order of indices; ``None``: the indices themselves for
            a raster, the sorted values of ``class`` for a GeoJSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the labels are on another grid, are no class indices, or have too many classes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    labels = (_vector if path.suffix.lower() in _VECTORS else _raster)(path, scene, names)
    if len(labels.names) > UNLABELLED:
        raise ValueError(f"{path}: {len(labels.names)} classes; {UNLABELLED} are the most")
    return labels


def _raster(path: Path, scene: Scene, names: list[str] | None) -> Labels:
    file = open_raster(path, "reading labels")
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
        values, unlabelled = _read(file, path, region)
        known = values[~unlabelled]
        if known.size and (known.min() < 0 or known.max() >= len(classes)):
            raise ValueError(
                f"{path}: has class {known.min() if known.min() < 0 else known.max()}, and there "
                f"are {len(classes)} classes (0 to {len(classes) - 1}, 255 for no label)"
            )
        return np.where(unlabelled, UNLABELLED, values).astype(np.uint8)

    classes = names or [str(index) for index in range(_largest(file, path) + 1)]
    return Labels(classes, read)


def _largest(file: Any, path: Path) -> int:
    """Return the largest class index of a raster, at least 1, reading block by block."""
    largest = 1
    for _, window in file.block_windows(1):
        values, unlabelled = _read(file, path, window)
        largest = max(largest, int(values[~unlabelled].max(initial=1)))
    if largest >= UNLABELLED:
        raise ValueError(f"{path}: has class {largest}; {UNLABELLED - 1} is the largest")
    return largest


def _read(file: Any, path: Path, region: Any) -> tuple[Any, Any]:
    """Return the values of a window, and a mask that is True where a value is no label."""
    try:
        values = file.read(1, window=region).astype(np.int64)
        masks = file.read_masks(1, window=region)
    except raster_errors() as error:
        raise ValueError(f"{path}: damaged, it cannot be read ({error})") from None
    return values, (masks == 0) | (values == UNLABELLED)


def _vector(path: Path, scene: Scene, names: list[str] | None) -> Labels:
    """Labels from polygons, lines and points, drawn in the order of the file."""
    import_rasterio("reading labels")
    rasterize = importlib.import_module("rasterio.features").rasterize
    windows = importlib.import_module("rasterio.windows")

    content, shapes = _read_shapes(path)
    _check_system(path, content, scene)
    _check_place(path, [geometry for geometry, _ in shapes], scene)
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


def _read_shapes(path: Path) -> tuple[Any, list[tuple[Any, str]]]:
    """Return a GeoJSON file, and geometry and class of each feature that has a geometry."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        shapes = [(one["geometry"], one["properties"]["class"]) for one in content["features"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{path}: not a GeoJSON of features with a property "class" ({one_line(error)})'
        ) from None
    for index, (geometry, name) in enumerate(shapes):
        if name is None:
            raise ValueError(f'{path}: feature {index}, from 0, has no "class"')
        if geometry is not None and _bounds(geometry) is None:
            raise ValueError(f"{path}: feature {index}, from 0, has no geometry to be drawn")
    located = [(geometry, str(name)) for geometry, name in shapes if geometry is not None]
    if not located:
        raise ValueError(f"{path}: holds no feature")
    return content, located


def _check_system(path: Path, content: Any, scene: Scene) -> None:
    """Check the reference system that a GeoJSON names, as those of QGIS and GDAL do.

    Raises:
        ValueError: it is not that of the raster. A raster of another zone may overlap the
            coordinates all the same.
    """
    rasterio = import_rasterio("reading labels")
    try:
        name = content["crs"]["properties"]["name"]
        named = rasterio.crs.CRS.from_user_input(name)
    except (KeyError, TypeError, ValueError, rasterio.errors.CRSError):
        return
    if scene.crs and not _same_places(named, scene):
        raise ValueError(
            f"{path}: is in {name}, and {scene.path} in {scene.crs.to_string()}; reproject it, for "
            f"example by ogr2ogr -t_srs {scene.crs.to_string()}"
        )


def _same_places(crs: Any, scene: Scene) -> bool:
    """Return whether a raster's corners have the same coordinates in a system as in its own."""
    x, y = _corners(scene)
    transform = importlib.import_module("rasterio.warp").transform
    try:
        others = np.array(transform(scene.crs, crs, x, y))
    except raster_errors():
        return False
    side = abs(scene.transform.determinant) ** 0.5
    return bool((np.abs(others - [x, y]) < side).all())


def _corners(scene: Scene) -> tuple[Any, Any]:
    """Coordinates (x, y) of a raster's corners, of 4 values each."""
    a, b, c, d, e, f = scene.transform[:6]
    down, across = scene.size[0] * np.array([0, 0, 1, 1]), scene.size[1] * np.array([0, 1, 0, 1])
    return c + a * across + b * down, f + d * across + e * down


def _bounds(geometry: Any) -> Any:
    """Return the least and the largest (x, y) of a geometry, (2, 2); ``None`` if it is damaged.

    The check comes before rasterising since GDAL ends the process on some damaged geometries.
    """
    try:
        places = [(number("x", x), number("y", y)) for x, y, *_ in _positions(geometry)]
        whole = importlib.import_module("rasterio.features").is_valid_geom(geometry)
        return np.array([np.min(places, axis=0), np.max(places, axis=0)]) if whole else None
    except (TypeError, ValueError, KeyError, RecursionError):
        return None


def _positions(geometry: Any) -> list[Any]:
    """Return the positions of a geometry of any type as one flat list."""
    if geometry["type"] == "GeometryCollection":
        return [place for part in geometry["geometries"] for place in _positions(part)]
    found = [geometry["coordinates"]]
    for _ in range(_DEPTHS[geometry["type"]]):
        found = list(chain.from_iterable(found))
    return found


def _check_place(path: Path, geometries: list[Any], scene: Scene) -> None:
    """Check that at least one geometry overlaps the raster's bounding box.

    Raises:
        ValueError: no geometry does, for example since they are of another reference system.
    """
    x, y = _corners(scene)
    least, most = np.stack([_bounds(geometry) for geometry in geometries], axis=1)
    near = (least <= (x.max(), y.max())) & (most >= (x.min(), y.min()))
    if not near.all(axis=1).any():
        system = f" ({scene.crs.to_string()})" if scene.crs else ""
        raise ValueError(
            f"{path}: no feature lies in {scene.path}; coordinates must be of its reference "
            f"system{system}"
        )
