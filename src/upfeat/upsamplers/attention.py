"""Upsamplers in which each pixel attends to a rectangle of cells, with several attention heads.

Queries belong to pixels of the output, keys to cells of the features' grid. The rectangle depends
on the row and column of the pixel alone. Either the heads' weights are averaged and applied to all
channels, or each head's weights are applied to a block of channels of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from operator import index

import numpy as np
import torch
from torch import Tensor

from upfeat import functional
from upfeat.backends import dispatch
from upfeat.bounds import whole
from upfeat.types import Size, Window
from upfeat.upsamplers.base import Kernels
from upfeat.upsamplers.head import apply_head
from upfeat.upsamplers.maps import Map
from upfeat.upsamplers.published import PublishedUpsampler


class AttentionKernels:
    """Queries and keys of one image, and the rectangles of cells that its pixels attend to."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        rows: list[int],
        columns: list[int],
        *,
        heads: int,
        split: bool = False,
        backend: str = "auto",
    ) -> None:
        """Keep the tensors and tables.

        Args:
            queries: (B, D, H, W).
            keys: (B, D, h, w).
            rows: 2·H numbers: the first row of cells of every row of pixels, then one past the last
                row of cells of every row of pixels.
            columns: 2·W numbers: the columns of cells, in the order of ``rows``.
            heads: number of heads; each reads D/heads channels of queries and keys.
            split: whether each head's weights apply to a block of the features' channels of its
                own; otherwise the mean of the heads' weights applies to all channels.
            backend: backend of the operator; see :mod:`upfeat.functional`.
        """
        self.queries, self.keys = queries, keys
        self.output_size, self.grid_size = queries.shape[2:], keys.shape[2:]
        self.rows, self.columns = rows, columns
        self.heads, self.split, self.backend = heads, split, backend

    def __call__(self, features: Tensor) -> Tensor:
        """Upsample features, (B, C, h, w) -> (B, C, H, W)."""
        return self.crop(features, Window(0, 0, *self.queries.shape[2:]))

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`."""
        blocks = [features.shape[1]]
        if self.split:
            blocks = self.channel_blocks(features.shape[1])
        return self.attend(features, window, blocks)

    def channel_blocks(self, channels: int) -> list[int]:
        """Number of channels in each head's block, for C channels in all.

        Raises:
            ValueError: C is no multiple of the number of heads.
        """
        if channels % self.heads:
            raise ValueError(
                f"features has {channels} channels, which its {self.heads} heads cannot share "
                f"evenly; give a multiple of {self.heads}"
            )
        return [channels // self.heads] * self.heads

    def attend(self, values: Tensor, window: Window, blocks: list[int]) -> Tensor:
        """Weighted sums of values at the pixels of a window, each head on its block of channels.

        Args:
            values: (B, C, h, w).
            window: window of the output.
            blocks: number of channels of each head, C in all; a single number, C, applies the mean
                of the heads' weights to all channels.

        Returns:
            (B, C, window.height, window.width).
        """
        height, width = self.queries.shape[2:]
        rows = [*self.rows[window.top : window.bottom]]
        rows += self.rows[height + window.top : height + window.bottom]
        columns = [*self.columns[window.left : window.right]]
        columns += self.columns[width + window.left : width + window.right]
        return functional.window_attention(
            self.queries[:, :, window.top : window.bottom, window.left : window.right],
            self.keys,
            values,
            rows,
            columns,
            heads=self.heads,
            blocks=blocks,
            backend=self.backend,
        )


class AttentionUpsampler(PublishedUpsampler):
    """Common base of AnyUp, JAFAR and NAF, which differ in :meth:`prepare`."""

    always_small = True  # whatever its arguments: see :attr:`Upsampler.always_small`

    def __init__(self, *, width: int, heads: int, backend: str) -> None:
        """Check and store the common arguments.

        Raises:
            ValueError: ``width`` is no multiple of 8 (the groups of the norms) and of 4·``heads``.
        """
        super().__init__()
        dispatch.check_name(backend)
        width, heads = whole("width", width, 1, 1024), whole("heads", heads, 1, 256)
        if width % (4 * heads) or width % 8:
            raise ValueError(f"width={width} must be a multiple of 8 and of 4 times heads={heads}")
        self.width, self.heads, self.backend = width, heads, backend

    @abstractmethod
    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> AttentionKernels:
        """See :meth:`Upsampler.prepare`."""

    def render_linear(
        self,
        kernels: Kernels,
        mixed: Tensor | Map,
        *,
        head: Tensor | slice | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """See :meth:`Upsampler.render_linear`.

        With split attention, a linear head mixes blocks of channels that have different weights.
        The head is therefore split by blocks: its output for each block is upsampled with the
        weights of that block, and the results are added.
        """
        assert isinstance(kernels, AttentionKernels)
        if not kernels.split or head is None:
            return super().render_linear(kernels, mixed, head=head, window=window)
        assert isinstance(mixed, Tensor)
        window = Window(0, 0, *kernels.queries.shape[2:]) if window is None else window
        blocks = kernels.channel_blocks(mixed.shape[1])
        if isinstance(head, slice):
            chosen = range(*head.indices(mixed.shape[1]))
            if chosen.step != 1:
                raise ValueError(f"head={head} must be a range of channels, one by one")
            inside = [_overlap(chosen, n * blocks[0], blocks[0]) for n in range(len(blocks))]
            return kernels.attend(mixed[:, head], window, inside)
        outputs = head.shape[-2]
        # Attention to C channels costs no more than to the K outputs of every head of attention.
        if len(blocks) * outputs >= mixed.shape[1]:
            return apply_head(kernels.attend(mixed, window, blocks), head)
        parts = [
            apply_head(values, share)
            for values, share in zip(
                mixed.split(blocks, dim=1), head.split(blocks, dim=-1), strict=True
            )
        ]
        out = kernels.attend(torch.cat(parts, dim=1), window, [outputs] * len(blocks))
        return out.unflatten(1, (len(blocks), outputs)).sum(1)


def _overlap(chosen: range, start: int, count: int) -> int:
    """Number of channels of ``chosen`` in the block of ``count`` channels from ``start``."""
    return max(min(chosen.stop, start + count) - max(chosen.start, start), 0)


def relative_window(cells: int, length: int, ratio: float) -> list[int]:
    """Cells within a fraction of the axis around each pixel, including partly covered cells.

    Args:
        cells: number of cells on the axis.
        length: number of pixels on the axis.
        ratio: distance to each side, as a fraction of the axis.

    Returns:
        The first cell of every pixel, then one past the last cell of every pixel; 2·``length``.
    """
    # The conversions have torch.compile make a program for each size, instead of one with symbols.
    return _relative_window(index(cells), index(length), ratio.__float__())


def _relative_window(cells: int, length: int, ratio: float) -> list[int]:
    # In float32, as in the published code: a bound on the edge of a cell depends on rounding.
    at = (np.arange(length, dtype=np.float32) + np.float32(0.5)) / np.float32(length)
    low = np.clip(at - np.float32(ratio), 0, 1) * np.float32(cells)
    high = np.clip(at + np.float32(ratio), 0, 1) * np.float32(cells)
    return np.concatenate([np.floor(low), np.ceil(high)]).astype(np.int64).tolist()


# torch.compile would trace NumPy as tensors of unknown values, so it takes the result for a
# constant; see `unavailable_reason` in `upfeat.backends.cpu.library`.
_relative_window._dynamo_marked_constant = True  # type: ignore[attr-defined]


def shifted_window(cells: int, length: int, side: int) -> list[int]:
    """``side`` cells around the cell of each pixel, shifted inwards at the ends of the axis.

    Args:
        cells: number of cells on the axis; if it is less than ``side``, every pixel gets all.
        length: number of pixels on the axis.
        side: width of the window in cells, odd.

    Returns:
        As :func:`relative_window`.
    """
    side = min(side, cells)
    own = [(2 * pixel + 1) * cells // (2 * length) for pixel in range(length)]
    first = [min(max(cell - side // 2, 0), cells - side) for cell in own]
    return first + [cell + side for cell in first]


def whole_window(cells: int, length: int) -> list[int]:
    """All cells of an axis for every pixel, in the format of :func:`relative_window`."""
    return [0] * length + [cells] * length
