"""Upsamplers whose pixels attend to a rectangle of cells each, by several heads.

Queries live on the output, keys on the grid of the features; which cells a pixel sees is a matter
of its row and its column alone. Heads are either averaged, and weigh all channels alike, or each
weighs a block of channels of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from upfeat import functional
from upfeat.backends import dispatch
from upfeat.bounds import whole
from upfeat.normalization import IMAGENET
from upfeat.types import Size, Window
from upfeat.upsamplers import compiled_encoders
from upfeat.upsamplers.base import Kernels, Upsampler
from upfeat.upsamplers.checks import check_inputs
from upfeat.upsamplers.head import apply_head
from upfeat.upsamplers.maps import Map

_BAND_BYTES = 32 * 2**20
"""Approximate size of a band of rows, before it is copied into a caller's buffer."""


class AttentionKernels:
    """Queries and keys of one image, and which cells every pixel attends to."""

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
            rows: first cell of every row of pixels, then one past the last, 2·H numbers.
            columns: likewise, 2·W.
            heads: blocks of D/heads channels of queries and keys.
            split: whether each head weighs a block of the features' channels of its own; or else
                their mean weighs all.
            backend: of the operator; see :mod:`upfeat.functional`.
        """
        self.queries, self.keys = queries, keys
        self.rows, self.columns = rows, columns
        self.heads, self.split, self.backend = heads, split, backend

    def __call__(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W)."""
        return self.crop(features, Window(0, 0, *self.queries.shape[2:]))

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`."""
        blocks = [features.shape[1]]
        if self.split:
            blocks = self.channel_blocks(features.shape[1])
        return self.attend(features, window, blocks)

    def channel_blocks(self, channels: int) -> list[int]:
        """Number of the C channels that each head weighs.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        if channels % self.heads:
            raise ValueError(
                f"features has {channels} channels, which its {self.heads} heads cannot share "
                f"evenly; give a multiple of {self.heads}"
            )
        return [channels // self.heads] * self.heads

    def attend(self, values: Tensor, window: Window, blocks: list[int]) -> Tensor:
        """The window's pixels, each head weighing its block of the values' channels.

        Args:
            values: (B, C, h, w).
            window: of the output.
            blocks: channels of each head, C in all; one number for the mean of the heads.

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


class AttentionUpsampler(Upsampler):
    """Common base of AnyUp, JAFAR and NAF, which differ in :meth:`prepare`."""

    mean, std = IMAGENET

    always_small = True

    def __init__(self, *, width: int, heads: int, backend: str) -> None:
        """Check what they share.

        Raises:
            ValueError: the width is no multiple of the heads or of the norms' groups.
        """
        super().__init__()
        dispatch.check_name(backend)
        width, heads = whole("width", width, 1, 1024), whole("heads", heads, 1, 256)
        if width % (4 * heads) or width % 8:
            raise ValueError(f"width={width} must be a multiple of 8 and of 4 times heads={heads}")
        self.width, self.heads, self.backend = width, heads, backend

    def exact(self, x: Tensor, *beside: Tensor) -> Tensor:
        """Convert to the precision of the encoders: float32 at least, the same for all inputs.

        Their cost does not grow with the channels of the features, and five layers of half
        precision would cost the weights two digits.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        for other in (next(self.parameters()), *beside):
            dtype = torch.promote_types(dtype, other.dtype)
        return x.to(dtype)

    def compiled(self, *tensors: Tensor) -> bool:
        """Return whether the compiled library runs the image encoders on these."""
        return self.backend in ("auto", "cpu") and compiled_encoders.can_run(self, *tensors)

    @abstractmethod
    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> AttentionKernels:
        """See :meth:`Upsampler.prepare`."""

    def forward(
        self,
        features: Tensor,
        guidance: Tensor,
        output_size: Size | None = None,
        *,
        hidden: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Upsample features; see :meth:`Upsampler.forward`.

        Args:
            features: (B, C, h, w).
            guidance: (B, 3, H, W) normalised by :attr:`mean` and :attr:`std`.
            output_size: (height, width); ``None`` for the guidance's.
            hidden: ``None``: these make no use of it.
            out: a buffer (B, C, *output_size) of any floating type, on any device, to fill a band
                of rows at a time: nothing else of that size then exists. No gradient goes through.

        Returns:
            ``out``, or (B, C, *output_size).

        Raises:
            ValueError: as :meth:`Upsampler.forward`, or the buffer has another shape.
        """
        given = [one for one in (features, guidance) if isinstance(one, Tensor)]
        if any(isinstance(side, torch.SymInt) for one in given for side in one.shape[2:]):
            raise ValueError(
                f"{self.name} cannot be exported for a height and width yet unknown: its windows "
                "are tables of one size; export it for fixed ones, a dynamic batch included"
            )
        if out is None:
            return super().forward(features, guidance, output_size, hidden=hidden)
        size = check_inputs(features, guidance, output_size)
        expected = (*features.shape[:2], *size)
        if tuple(out.shape) != expected or not out.is_floating_point():
            raise ValueError(buffer_refused(out, expected))
        with torch.no_grad():
            grid = (features.shape[2], features.shape[3])
            kernels = self.prepare_with(guidance, grid, size, features, hidden)
            row_bytes = 4 * features.shape[0] * features.shape[1] * size[1]
            band = max(1, _BAND_BYTES // row_bytes)
            for top in range(0, size[0], band):
                window = Window(top, 0, min(band, size[0] - top), size[1])
                out[:, :, top : window.bottom] = self.render(kernels, features, window=window)
        return out

    def render_linear(
        self,
        kernels: Kernels,
        mixed: Tensor | Map,
        *,
        head: Tensor | slice | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """See :meth:`Upsampler.render_linear`.

        With split attention, a linear head mixes blocks of channels that have weights of their own:
        its part for each block is upsampled by that block's weights, and the parts are added.
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
        if len(blocks) * outputs >= mixed.shape[1]:  # fewer channels before the head than after
            return apply_head(kernels.attend(mixed, window, blocks), head)
        parts = [
            apply_head(values, share)
            for values, share in zip(
                mixed.split(blocks, dim=1), head.split(blocks, dim=-1), strict=True
            )
        ]
        out = kernels.attend(torch.cat(parts, dim=1), window, [outputs] * len(blocks))
        return out.unflatten(1, (len(blocks), outputs)).sum(1)


def buffer_refused(out: Tensor, expected: tuple[int, ...]) -> str:
    """Return the message for a buffer of another shape or of no floating-point type."""
    return f"out is {out.dtype} {tuple(out.shape)}; give a floating-point buffer of {expected}"


def _overlap(chosen: range, start: int, count: int) -> int:
    """Number of channels that a range has in common with a block."""
    return max(min(chosen.stop, start + count) - max(chosen.start, start), 0)


@lru_cache(maxsize=64)
def _relative_window(cells: int, length: int, ratio: float) -> tuple[int, ...]:
    # In float32, as published: where a bound falls on a cell's edge, rounding decides.
    at = (np.arange(length, dtype=np.float32) + np.float32(0.5)) / np.float32(length)
    low = np.clip(at - np.float32(ratio), 0, 1) * np.float32(cells)
    high = np.clip(at + np.float32(ratio), 0, 1) * np.float32(cells)
    return tuple(np.concatenate([np.floor(low), np.ceil(high)]).astype(np.int64).tolist())


def relative_window(cells: int, length: int, ratio: float) -> list[int]:
    """Cells within a fraction of the axis of each pixel, partly covered cells included.

    Args:
        cells: cells on the axis.
        length: pixels on it.
        ratio: fraction of the axis to each side.

    Returns:
        First cells of all pixels, then one past their last ones.
    """
    return list(_relative_window(cells, length, ratio))


def shifted_window(cells: int, length: int, side: int) -> list[int]:
    """``side`` cells around each pixel's own, shifted inwards at the edges; all where fewer exist.

    Args:
        cells: cells on the axis.
        length: pixels on it.
        side: of the window, odd.

    Returns:
        First cells of all pixels, then one past their last ones.
    """
    side = min(side, cells)
    own = [(2 * pixel + 1) * cells // (2 * length) for pixel in range(length)]
    first = [min(max(cell - side // 2, 0), cells - side) for cell in own]
    return first + [cell + side for cell in first]


def whole_window(cells: int, length: int) -> list[int]:
    """All cells for every pixel."""
    return [0] * length + [cells] * length
