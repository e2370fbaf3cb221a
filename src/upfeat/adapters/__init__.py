"""Adapters to tools of other fields: pixel classifiers, pathology, geographic data sets."""

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
