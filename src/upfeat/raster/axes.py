"""Coordinates of a raster's features in a Zarr store, by the conventions of CF and GeoZarr."""

from __future__ import annotations

from typing import Any

import numpy as np

from upfeat.raster.scene import Scene


def write_axes(group: Any, scene: Scene) -> None:
    """Write coordinates of pixel centres and the reference system, following CF and GeoZarr."""
    transform = scene.transform
    spatial: dict[str, Any] = {
        "GeoTransform": " ".join(repr(value) for value in transform.to_gdal()),
    }
    if scene.crs:
        spatial["crs_wkt"] = spatial["spatial_ref"] = scene.crs.to_wkt()
    group.create_array(
        "spatial_ref",
        shape=(),
        dtype="int64",
        attributes=spatial,
        dimension_names=(),
        overwrite=True,
    )
    if transform.b == 0 and transform.d == 0:  # in a rotated raster, y varies along a row
        height, width = scene.size
        down = transform.f + transform.e * (np.arange(height) + 0.5)
        across = transform.c + transform.a * (np.arange(width) + 0.5)
        for name, values in (("y", down), ("x", across)):
            axis = group.create_array(
                name,
                shape=values.shape,
                dtype="float64",
                dimension_names=(name,),
                attributes={"axis": name.upper(), **_meaning(scene.crs, name)},
                overwrite=True,
            )
            axis[:] = values


def _meaning(crs: Any, name: str) -> dict[str, str]:
    """Attributes of CF that say what a coordinate, "y" or "x", measures."""
    if crs and crs.is_geographic:
        kind, unit = {"y": ("latitude", "degrees_north"), "x": ("longitude", "degrees_east")}[name]
        return {"standard_name": kind, "units": unit}
    if crs and crs.is_projected:
        unit = crs.linear_units.replace(" ", "_")  # "US survey foot" to UDUNITS' spelling
        return {"standard_name": f"projection_{name}_coordinate", "units": unit}
    return {}
