"""The network of the detail upsampler: from an image to maps at an eighth of its size."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.resampling import bilinear, resample, resize
from upfeat.transforms import channels_last
from upfeat.types import Size, Window
from upfeat.upsamplers.encoder import pointwise, spans_of
from upfeat.upsamplers.maps import Computed, cut, inside, is_recorded, widened

_PIXELS = 8
"""Pixels of the network's input image along each side of a cell of its output."""


class DetailNetwork(nn.Sequential):
    """A small convolutional network, image to maps at an eighth of its size."""

    def __init__(self, width: int, depth: int) -> None:
        """Make the network with PyTorch's initial weights.

        Args:
            width: number of maps, ≥ 2.
            depth: number of residual blocks, at an eighth of the image's size, ≥ 0.
        """
        widths = (3, max(width * 3 // 8, 1), max(width * 3 // 4, 1), width)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            halve = nn.Conv2d(before, after, 3, 2, 1, padding_mode="replicate")
            layers += [halve, nn.GELU()]
        super().__init__(*layers, *(_Block(width) for _ in range(depth)))
        self.reach = depth + 1
        """Number of cells beyond its own that a value of the maps depends on."""


class _Block(nn.Module):
    """Residual block: the input plus a learned correction, which is initially 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate")
        self.last = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, (B, width, h, w) -> (B, width, h, w)."""
        return x + pointwise(self.last, F.gelu(self.hidden(x)))


class DetailMaps(Computed):
    """The network's maps of an image, (B, width, *finer grid)."""

    def __init__(
        self, network: DetailNetwork, guidance: Tensor, finer: Size, *, whole: bool
    ) -> None:
        """Keep the network and its image.

        Args:
            network: the network.
            guidance: (B, 3, H, W).
            finer: (height, width) of the finer grid.
            whole: compute the whole maps at once.
        """
        recorded = is_recorded(guidance, *network.parameters())
        super().__init__(finer, whole=whole or recorded, recorded=recorded, step=2)
        self.network, self.guidance = network, guidance
        self.seen: Size = (_PIXELS * finer[0], _PIXELS * finer[1])

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        if window == (0, 0, *self.size):
            image = self.guidance
            if image.shape[-2:] != self.seen:
                image = resize(image, self.seen)
            return self._run(image)
        around = widened(window, self.network.reach, self.size)
        rows, columns = (
            bilinear(
                length,
                target,
                torch.arange(_PIXELS * start, _PIXELS * stop, device="cpu"),
                antialias=True,
            )
            for length, target, (start, stop) in zip(
                self.guidance.shape[2:], self.seen, spans_of(around), strict=True
            )
        )
        return cut(self._run(resample(self.guidance, rows, columns)), inside(window, around))

    def _run(self, image: Tensor) -> Tensor:
        return self.network(channels_last(image)).contiguous()
