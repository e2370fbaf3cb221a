"""Grid field: features on a grid of a few pixels, brought to the pixels of the image."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from upfeat.bounds import number, whole
from upfeat.implicit.guides import normalised
from upfeat.implicit.one_pass import ONE_PASS_PIXELS
from upfeat.normalization import HALF, check_normalization
from upfeat.tensor_checks import check_layouts, layouts_of
from upfeat.types import Size
from upfeat.upsamplers.maps import cut, inside, tiles, widened
from upfeat.upsamplers.neighbourhood import NeighbourhoodUpsampler
from upfeat.upsamplers.smoothing import PIXEL_SMOOTHINGS, smooth_pixels

_MOST_CELLS = 1 << 24
_LARGEST_MAP = 1 << 28
"""Most numbers in a map of the image: 1 GiB. A larger image is reduced to fit."""
_RADII = (4, 8)
"""Least and largest radius in which pixels are smoothed, pixels."""
_TILE = 256
"""Side, in pixels, of the windows in which maps of the image are computed."""


class GridField:
    """Values on a grid, which a neighbourhood upsampler brings to the pixels of the image.

    The pixels are then smoothed among those that are alike in colours, textures and values, so that
    outlines are those of the image, and regions flat. Between pixels, values are interpolated.
    """

    kind: ClassVar[str] = "grid"

    def __init__(
        self, values: Tensor, lengths: Tensor, step: NeighbourhoodUpsampler, *, smoothed: bool
    ) -> None:
        """Copy the upsampler; round values and weights to half precision, that of files.

        Args:
            values: (k, h, w), coordinates of the features of the grid's cells.
            lengths: (k,), lengths of the features that a unit of each coordinate adds, by which
                pixels are compared; only their ratios count.
            step: upsampler from the grid to the pixels.
            smoothed: whether pixels are smoothed.
        """
        self.values, self.smoothed = values.half().float().contiguous(), smoothed
        self.lengths = lengths / lengths.max().clamp(min=torch.finfo(lengths.dtype).tiny)
        self.step = copy.deepcopy(step).float().eval().requires_grad_(False)
        for value in self.step.state_dict().values():
            value.copy_(value.half())

    @property
    def width(self) -> int:
        """Number k of values at a point."""
        return len(self.values)

    def radius(self, size: Size) -> int:
        """Return the radius in which pixels are smoothed: a cell's width, from 4 to 8 pixels."""
        cell = min(size[0] / self.values.shape[1], size[1] / self.values.shape[2])
        return min(max(round(cell), _RADII[0]), _RADII[1])

    @torch.no_grad()
    def look(self, guidance: Tensor) -> Tensor:
        """Compute the values of all pixels: image (3, H, W) uint8 -> (H', W', k) float32.

        The map has the size of the image, or about two million pixels if that is less, and less
        for more than 128 values.
        """
        most = max(min(ONE_PASS_PIXELS, _LARGEST_MAP // self.width), 1)
        image = normalised(guidance, self.step.normalization or HALF, most)
        grid, size = (self.values.shape[1], self.values.shape[2]), (image.shape[2], image.shape[3])
        radius = self.radius(size)
        step = self.step.prepare(image, grid, size)
        kernels, kept = step.precompute(self.values[None])
        centre, scale = self.values.mean((1, 2))[:, None, None], self.lengths[:, None, None]
        out = self.values.new_empty(*size, self.width)
        for window in tiles(size, _TILE):
            outer = widened(window, PIXEL_SMOOTHINGS * radius, size) if self.smoothed else window
            drawn = kernels.crop(kept, outer)
            if self.smoothed:
                alike = (drawn - centre) * scale
                drawn = smooth_pixels(drawn, step.queries.at(outer), alike, radius)
            rows, columns = slice(window.top, window.bottom), slice(window.left, window.right)
            out[rows, columns] = cut(drawn, inside(window, outer))[0].permute(1, 2, 0)
        return out

    def __call__(self, places: Tensor, seen: Tensor) -> Tensor:
        """See :class:`~upfeat.implicit.fields.Field`: the values of the map at the places."""
        del places
        return seen

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`~upfeat.implicit.fields.Field`."""
        weights = {f"step.{name}": value.half() for name, value in self.step.state_dict().items()}
        return {"values": self.values.half(), "lengths": self.lengths, **weights}

    def facts(self) -> dict[str, Any]:
        """See :class:`~upfeat.implicit.fields.Field`."""
        mean, std = (list(one) for one in self.step.normalization or HALF)
        return {
            "grid_size": list(self.values.shape[1:]),
            "step": self.step.config(),
            "mean": mean,
            "std": std,
            "smoothed": int(self.smoothed),
        }

    @staticmethod
    def rebuild(tensors: dict[str, Tensor], facts: dict[str, Any]) -> GridField:
        """Build a field from its :meth:`tensors` and :meth:`facts`, which need not be trusted.

        Raises:
            KeyError: a part is missing.
            ValueError: a part is out of bounds, or does not fit the others.
        """
        height, width = (whole("grid_size", side, 1, _MOST_CELLS) for side in facts["grid_size"])
        values, lengths = tensors["values"], tensors["lengths"]
        if values.dim() != 3 or tuple(values.shape) != (len(values), height, width):
            raise ValueError(f"values is {tuple(values.shape)}, not (k, {height}, {width})")
        if tuple(lengths.shape) != (len(values),):
            raise ValueError(f"lengths is {tuple(lengths.shape)}, not ({len(values)},)")
        if not bool((lengths >= 0).all()):
            raise ValueError("lengths has numbers below 0")
        # Shapes are checked first, so that the network is no larger than the file.
        with torch.device("meta"):
            known = NeighbourhoodUpsampler().config()
            known.pop("least_contrast")  # files of earlier versions have none
            settings = {name: facts["step"][name] for name in known}
            settings["least_contrast"] = facts["step"].get("least_contrast", 0.0)
            expected = NeighbourhoodUpsampler(**settings).state_dict()
        weights = {k.removeprefix("step."): v for k, v in tensors.items() if k[:5] == "step."}
        check_layouts("step", layouts_of(weights), expected)
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
            step = NeighbourhoodUpsampler(**settings)
        step.load_state_dict(weights)
        for name, (_, largest) in step.magnitudes.items():
            number(name, float(weights[name]), -largest, largest)
        step.mean, step.std = check_normalization(facts["mean"], facts["std"])
        smoothed = bool(whole("smoothed", facts["smoothed"], 0, 1))
        return GridField(values.float(), lengths.float(), step, smoothed=smoothed)
