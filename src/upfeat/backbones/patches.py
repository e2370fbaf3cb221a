"""Vision models of transformers that take an image as patches, with their grid beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.types import Size

# Arguments by which models are told the grid, and those that go with each.
_BESIDE = {
    "grid_thw": (),  # Qwen-VL, GLM-V: patches of all images in one row, block by block
    "spatial_shapes": ("pixel_attention_mask",),  # SigLIP2 NaFlex
    "pixel_position_ids": (),  # Gemma 4
}


class Patches:
    """Conversion of images to a model's patches, and of its tokens to maps.

    Attributes:
        GRIDS: arguments by which models are told the grid of patches.

    Patches that a model merges after its blocks lie block by block: the merged patches of one
    square follow each other, square by square.
    """

    GRIDS = tuple(_BESIDE)

    def __init__(self, network: nn.Module, grid_name: str) -> None:
        """Read the sizes of patches and blocks from a model's configuration.

        Args:
            network: the model.
            grid_name: argument by which it is told the grid.
        """
        config: Any = network.config
        self.grid_name = grid_name
        self.packed = grid_name == "grid_thw"
        self.patch: int = config.patch_size
        self.merge: int = getattr(config, "spatial_merge_size", None) or 1
        if not self.packed:
            self.merge = getattr(config, "pooling_kernel_size", None) or 1
        self.frames: int = getattr(config, "temporal_patch_size", None) or 1
        # Qwen2.5-VL's blocks see windows, in whose order it leaves its tokens.
        window = getattr(config, "window_size", None) if self.packed else None
        self.window: int = (window or 0) // (self.patch * self.merge)

    @staticmethod
    def needed(network: nn.Module, parameters: Mapping[str, Any]) -> str | None:
        """Return the argument by which a model is told the grid; ``None`` if it takes images."""
        found = next((name for name in _BESIDE if name in parameters), None)
        if found == "grid_thw" and not any(isinstance(m, nn.Conv3d) for m in network.modules()):
            return None  # the order of numbers in a patch is unknown
        return found

    @staticmethod
    def arguments(grid_name: str | None) -> tuple[str, ...]:
        """List the arguments that are given beside the patches."""
        return () if grid_name is None else (grid_name, *_BESIDE[grid_name])

    def grid(self, x: Tensor) -> Size:
        """Return the grid (h, w) of patches of an image.

        Raises:
            ValueError: a side is no multiple of a block.
        """
        block = self.patch * self.merge
        if x.shape[2] % block or x.shape[3] % block:
            raise ValueError(f"{x.shape[2]}×{x.shape[3]} pixels are no multiples of {block}")
        return x.shape[2] // self.patch, x.shape[3] // self.patch

    def given(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut images (B, C, H, W) into patches; return these and the arguments beside them."""
        (height, width), merge = self.grid(x), self.merge if self.packed else 1
        cut = x.unflatten(3, (width // merge, merge, self.patch))
        cut = cut.unflatten(2, (height // merge, merge, self.patch))
        # (B, C, rows, merge, patch, columns, merge, patch) -> block by block
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(1, 4)  # (B, N, C, patch, patch)
        size = torch.tensor([(height, width)], device=x.device).expand(len(x), -1)
        if self.packed:
            cut = cut.unsqueeze(3).expand(-1, -1, -1, self.frames, -1, -1)
            times = torch.ones_like(size[:, :1])
            return cut.flatten(0, 1).flatten(1), {"grid_thw": torch.cat([times, size], 1)}
        patches = cut.permute(0, 1, 3, 4, 2).flatten(2)
        if self.grid_name == "spatial_shapes":
            mask = torch.ones(patches.shape[:2], dtype=torch.long, device=x.device)
            return patches, {"spatial_shapes": size, "pixel_attention_mask": mask}
        rows, columns = torch.arange(height).to(size), torch.arange(width).to(size)
        places = torch.cartesian_prod(rows, columns).flip(1)  # (x, y)
        return patches, {"pixel_position_ids": places.expand(len(x), -1, -1)}

    def map(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Arrange the tokens of images x as maps (B, C, h, w), or of merged patches if they are."""
        height, width = self.grid(x)
        tokens = tokens.reshape(len(x), -1, tokens.shape[-1])  # (B, N, C)
        rows, columns = height // self.merge, width // self.merge
        if tokens.shape[1] == rows * columns:
            return tokens.mT.unflatten(2, (rows, columns))
        if not self.packed:
            return tokens.mT.unflatten(2, (height, width))
        blocks = tokens.unflatten(1, (rows * columns, self.merge * self.merge))
        if self.window:
            blocks = blocks[:, self._from_windows(rows, columns).to(tokens.device)]
        cells = blocks.unflatten(2, (self.merge, self.merge)).unflatten(1, (rows, columns))
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)

    def _from_windows(self, rows: int, columns: int) -> Tensor:
        """Return where each block stands, row by row, among blocks sorted by window."""
        down, across = torch.arange(rows)[:, None], torch.arange(columns)
        windows = (down // self.window) * columns + across // self.window
        return windows.flatten().argsort(stable=True).argsort()
