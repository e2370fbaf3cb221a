"""Upsampling of georeferenced rasters of any size, tile by tile, within a memory budget."""

from upfeat.machine import parse_memory
from upfeat.raster.outputs import Features, HeadOutput
from upfeat.raster.plan import make_plan
from upfeat.raster.run import upsample_raster
from upfeat.raster.scene import Scene
from upfeat.raster.store import unfinished_tiles

__all__ = [
    "Features",
    "HeadOutput",
    "Scene",
    "make_plan",
    "parse_memory",
    "unfinished_tiles",
    "upsample_raster",
]
