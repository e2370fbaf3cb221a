"""Features as tools of other fields take them: pixel classifiers, pathology, geography."""

from upfeat.adapters.grids import DenseGrid, encode_grid, read_grid, write_grid
from upfeat.adapters.pixels import PixelFeatures
from upfeat.adapters.samplers import TileSampler, stitch

__all__ = [
    "DenseGrid",
    "PixelFeatures",
    "TileSampler",
    "encode_grid",
    "read_grid",
    "stitch",
    "write_grid",
]
