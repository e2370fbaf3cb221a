"""The network of the early detail upsampler: from a backbone's early layers to maps of detail."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.transforms import channels_last
from upfeat.types import Size, Window
from upfeat.upsamplers.early import on_grid
from upfeat.upsamplers.encoder import pointwise
from upfeat.upsamplers.maps import Computed, cut, inside, is_recorded, widened


class EarlyNetwork(nn.Sequential):
    """A small convolutional network on the finer grid: as many cells out as in."""

    def __init__(self, hidden_dim: int, width: int, depth: int) -> None:
        """Make it with PyTorch's initial weights.

        Args:
            hidden_dim: channels of the early layers.
            width: number of maps.
            depth: residual blocks.
        """
        entry = nn.Conv2d(hidden_dim, width, 3, padding=1, padding_mode="replicate")
        super().__init__(entry, nn.GELU(), *(_Block(width) for _ in range(depth)))
        self.reach = depth + 1
        """Cells beyond its own that a value of the maps depends on."""


class _Block(nn.Module):
    """Its input and a correction, which is 0 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.around = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate", groups=width)
        self.hidden = nn.Conv2d(width, 2 * width, 1)
        self.last = nn.Conv2d(2 * width, width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same."""
        return x + pointwise(self.last, F.gelu(pointwise(self.hidden, self.around(x))))


class EarlyMaps(Computed):
    """The network's maps of what early layers say, (B, width, *finer grid)."""

    def __init__(self, network: EarlyNetwork, hidden: Tensor, finer: Size, *, whole: bool) -> None:
        """Keep what they are made of.

        Args:
            network: makes them.
            hidden: (B, D', h', w'), of any grid.
            finer: the grid's size.
            whole: make all at once.
        """
        recorded = is_recorded(hidden, *network.parameters())
        super().__init__(finer, whole=whole or recorded, recorded=recorded, step=2)
        self.network, self.hidden = network, on_grid(hidden, finer)

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        around = widened(window, self.network.reach, self.size)
        maps = self.network(channels_last(cut(self.hidden, around)))
        return cut(maps, inside(window, around)).contiguous()
