"""Writing of a finished array of an output as a Cloud Optimized GeoTIFF."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upfeat.failures import one_line
from upfeat.raster.scene import Scene, block_cache, import_rasterio, raster_errors
from upfeat.tiling import split

_BLOCK = 256
"""Side of the blocks of a GeoTIFF, pixels, and of the parts that are copied at once."""
_MANY = 32
"""Number of bands above which a GeoTIFF has smaller blocks."""


def file_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of the values in a GeoTIFF, which knows no float16."""
    return np.dtype("float32") if dtype == np.float16 else dtype


def write_cog(
    path: Path, values: Any, scene: Scene, names: list[str], provenance: Mapping[str, Any]
) -> None:
    """Write an array as a Cloud Optimized GeoTIFF, part by part, through a plain one next to it.

    Args:
        path: file to write, in a folder for temporary files: what a killed process leaves of this
            file, the plain one and their overviews is removed with the folder.
        values: Zarr array (K, height, width).
        scene: the raster, which supplies the georeference.
        names: names of the K values at a pixel.
        provenance: description of the result's origin, as JSON values.

    Raises:
        OSError: GDAL cannot write.
    """
    rasterio = import_rasterio("writing GeoTIFF")
    plain = path.with_name("plain.tif")
    with warnings.catch_warnings(), block_cache(rasterio):
        # A raster without a georeference gives an output without one.
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            _write_plain(plain, values, scene, names, provenance)
            importlib.import_module("rasterio.shutil").copy(
                plain,
                path,
                driver="COG",
                compress="deflate",
                predictor="YES",
                resampling="mode" if values.dtype.kind == "u" else "average",
                # A block holds all bands, and several blocks are held at once.
                blocksize=_BLOCK if values.shape[0] > _MANY else 2 * _BLOCK,
                # By default, a compressed file of more than 4 GB fails at its end.
                bigtiff="if_safer",
            )
        except raster_errors() as error:
            raise OSError(f"GDAL cannot write a GeoTIFF; is the disk full? ({error})") from None
        finally:
            plain.unlink(missing_ok=True)


def _write_plain(
    path: Path, values: Any, scene: Scene, names: list[str], provenance: Mapping[str, Any]
) -> None:
    count, height, width = values.shape
    dtype = file_dtype(values.dtype)
    profile = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": dtype.name,
        "crs": scene.crs,
        "transform": scene.transform,
        "nodata": 255 if dtype.kind == "u" else float("nan"),
        "tiled": True,
        "blockxsize": _BLOCK,
        "blockysize": _BLOCK,
        # From pixels of many bands, overviews take about ten times as long with a small cache.
        "interleave": "band",
        "bigtiff": "if_safer",
    }
    with import_rasterio("writing GeoTIFF").open(path, "w", **profile) as target:
        if scene.gcps[0]:
            target.gcps = scene.gcps
        if scene.rpcs is not None:
            target.rpcs = scene.rpcs
        for index, name in enumerate(names[:count], start=1):
            target.set_band_description(index, name)
        target.update_tags(upfeat=json.dumps(dict(provenance), sort_keys=True))
        for part in (tile.core for tile in split((height, width), _BLOCK)):
            rows, columns = (part.top, part.bottom), (part.left, part.right)
            block = _read_block(path, values, rows, columns)
            target.write(block.astype(dtype), window=(rows, columns))


def _read_block(path: Path, values: Any, rows: tuple[int, int], columns: tuple[int, int]) -> Any:
    """Read a block of the unfinished output, whose tiles have checksums."""
    try:
        return values[:, slice(*rows), slice(*columns)]
    except (ValueError, RuntimeError) as error:
        place = f"rows {rows[0]} to {rows[1] - 1}, columns {columns[0]} to {columns[1] - 1}"
        raise ValueError(
            f"{path.parent}: damaged at {place} ({one_line(error)}); begin anew by --overwrite"
        ) from None
