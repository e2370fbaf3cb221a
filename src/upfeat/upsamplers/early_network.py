"""The network of the early detail upsampler: from features of early layers to maps of detail."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.resampling import on_grid
from upfeat.transforms import channels_last
from upfeat.types import Size, Window
from upfeat.upsamplers.encoder import pointwise
from upfeat.upsamplers.maps import Computed, cut, inside, is_recorded, widened


class EarlyNetwork(nn.Sequential):
    """A small convolutional network on the finer grid, whose size it keeps."""

    def __init__(self, hidden_dim: int, width: int, depth: int) -> None:
        """Make the network with PyTorch's initial weights.

        Args:
            hidden_dim: number of channels of the early layers.
            width: number of maps.
            depth: number of residual blocks.
        """
        entry = nn.Conv2d(hidden_dim, width, 3, padding=1, padding_mode="replicate")
        super().__init__(entry, nn.GELU(), *(_Block(width) for _ in range(depth)))
        self.reach = depth + 1
        """Number of cells beyond its own that a value of the maps depends on."""


class _Block(nn.Module):
    """Residual block: the input plus a learned correction, which is initially 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.around = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate", groups=width)
        self.hidden = nn.Conv2d(width, 2 * width, 1)
        self.last = nn.Conv2d(2 * width, width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, (B, width, h, w) -> (B, width, h, w)."""
        return x + pointwise(self.last, F.gelu(pointwise(self.hidden, self.around(x))))


class EarlyMaps(Computed):
    """The network's maps of the early layers of one image, (B, width, *finer grid)."""

    def __init__(self, network: EarlyNetwork, hidden: Tensor, finer: Size, *, whole: bool) -> None:
        """Keep the network and the early layers, resampled to the finer grid.

        Args:
            network: the network.
            hidden: (B, D', h', w'), features of early layers on any grid.
            finer: (height, width) of the finer grid.
            whole: compute the whole maps at once.
        """
        recorded = is_recorded(hidden, *network.parameters())
        super().__init__(finer, whole=whole or recorded, recorded=recorded, step=2)
        self.network, self.hidden = network, on_grid(hidden, finer)

    def compute(self, window: Window) -> Tensor:
        """See :meth:`Computed.compute`."""
        around = widened(window, self.network.reach, self.size)
        maps = self.network(channels_last(cut(self.hidden, around)))
        return cut(maps, inside(window, around)).contiguous()
