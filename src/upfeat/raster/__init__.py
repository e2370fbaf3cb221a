"""Georeferenced rasters of any size: read by windows, upsampled by tiles, written as they come."""

from upfeat.raster.run import upsample_raster
from upfeat.raster.scene import Scene

__all__ = ["Scene", "upsample_raster"]
