"""The encoder of the neighbourhood upsampler: a query for every pixel, from several scales."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.randomness import stream
from upfeat.resampling import bilinear, pool_to, pooled, resample
from upfeat.transforms import channels_last
from upfeat.types import Size, Window
from upfeat.upsamplers.maps import cut, inside, widened

INITIAL_COLOUR_SCALE = 0.8
"""Standard deviation of the initial Gaussian kernel of colours, in units of the guidance."""


class PyramidEncoder(nn.Module):
    """Compute a query for every pixel, from the image at several scales.

    The first layer is a sine of random projections of the colour, whose inner products approximate
    a Gaussian kernel of colour distance (random Fourier features). Each coarser scale is the mean
    of the finer scale, plus a learned correction that is initially 0. The mean of random Fourier
    features describes the colours of a window, so untrained queries are already descriptors of
    colour and texture. The scales are interpolated bilinearly and added up: a query depends on a
    neighbourhood of about 2^levels pixels, at little more than the cost of one layer at full size.
    """

    def __init__(self, width: int, levels: int, channels: int = 3) -> None:
        """Make an encoder with initial weights.

        Args:
            width: number of channels of every scale and of the queries, ≥ 1.
            levels: number of scales, ≥ 1.
            channels: number of bands of the guidance, ≥ 1.
        """
        super().__init__()
        self.entry = _window_of_three(channels, width)
        self.coarser = nn.ModuleList(_Correction(width) for _ in range(levels - 1))
        self.join = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(levels))
        # On the "meta" device there are only shapes, and arithmetic there would import a compiler.
        if not self.entry.weight.is_meta:
            self._initialise()

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator | None = None) -> None:
        """Set the initial weights, which make queries descriptors of colour and texture."""
        width, channels = self.entry.weight.shape[:2]
        place = self.entry.weight.device
        window = torch.tensor([0.25, 0.5, 0.25], device=place)
        colours = torch.randn(width, channels, generator=generator, device=place)
        colours /= INITIAL_COLOUR_SCALE
        self.entry.weight.copy_(colours[:, :, None, None] * (window[:, None] * window))
        assert self.entry.bias is not None
        nn.init.uniform_(self.entry.bias, -math.pi, math.pi, generator=generator)
        for join in self.join:
            assert isinstance(join, nn.Conv2d)
            nn.init.orthogonal_(join.weight.view(width, width), generator=generator)
            nn.init.zeros_(join.bias)  # pyright: ignore[reportArgumentType]

    @classmethod
    def untrained(cls, width: int, levels: int, channels: int) -> PyramidEncoder:
        """Make an untrained encoder whose weights depend on the arguments alone."""
        with torch.device("meta"):  # which draws no numbers from the global generator
            encoder = cls(width, levels, channels)
            encoder.coarser = nn.ModuleList(nn.Identity() for _ in encoder.coarser)
        encoder = encoder.to_empty(device="cpu")
        encoder._initialise(stream("bands", width, levels, channels))
        return encoder

    def forward(self, guidance: Tensor) -> Tensor:
        """Compute queries, (B, channels, H, W) -> (B, width, H, W), any size, channels last."""
        entry = self.entry(channels_last(guidance))
        scales = [torch.sin(entry) if torch.is_grad_enabled() else entry.sin_()]
        del entry
        for correction in self.coarser:
            if min(scales[-1].shape[-2:]) < 2:
                break
            scales.append(correction(_halve(scales[-1])))
        out = pointwise(self.join[len(scales) - 1], scales.pop())
        while scales:  # each scale is freed once added: at full size they are the largest tensors
            finer = pointwise(self.join[len(scales) - 1], scales.pop())
            size = (finer.shape[2], finer.shape[3])
            above = F.interpolate(out, size=size, mode="bilinear", align_corners=False)
            out = finer + above if torch.is_grad_enabled() else finer.add_(above)
            del finer, above
        return out

    def window(self, guidance: Tensor, window: Window) -> Tensor:
        """A window of the result of :meth:`forward`, from only the pixels that it depends on.

        Args:
            guidance: (B, channels, H, W), the whole image.
            window: window of the image in pixels.

        Returns:
            (B, width, window.height, window.width).
        """
        sizes = self.sizes((guidance.shape[2], guidance.shape[3]))
        levels = plan(sizes, window)
        around = widened(levels[0].seen, 1, sizes[0])
        scale = torch.sin(_convolve(self.entry, cut(guidance, around), around, levels[0].seen))
        parts = [scale]
        for number, (finer, level) in enumerate(pairwise(levels)):
            rows, columns = (
                pooled(length, cells, torch.arange(*span, device="cpu"))
                for length, cells, span in zip(
                    sizes[number], sizes[number + 1], spans_of(level.read), strict=True
                )
            )
            halved = resample(scale, rows, columns, (finer.seen.top, finer.seen.left))
            correction = self.coarser[number]
            if isinstance(correction, _Correction):
                scale = correction.window(halved, level.read, level.seen)
            else:
                scale = cut(halved, inside(level.seen, level.read))
            parts.append(scale)
        out = None
        for number in reversed(range(len(levels))):
            level = levels[number]
            own = pointwise(self.join[number], cut(parts.pop(), inside(level.out, level.seen)))
            if out is not None:
                rows, columns = (
                    bilinear(cells, length, torch.arange(*span, device="cpu"))
                    for cells, length, span in zip(
                        sizes[number + 1], sizes[number], spans_of(level.out), strict=True
                    )
                )
                above = levels[number + 1].out
                own = own + resample(out, rows, columns, (above.top, above.left))
            out = own
        assert out is not None
        return out

    def parameters_in_order(self) -> list[Tensor]:
        """Parameters in the order of the compiled encoder (:mod:`upfeat.backends.cpu.pyramid`)."""
        layers: list[nn.Module] = [self.entry]
        for correction in self.coarser:
            if isinstance(correction, _Correction):
                layers += [correction.hidden, correction.last]
        return [one for layer in (*layers, *self.join) for one in (layer.weight, layer.bias)]  # pyright: ignore[reportReturnType]

    def sizes(self, size: Size) -> list[Size]:
        """(height, width) of every scale of an image of this ``size``, finest first."""
        sizes = [size]
        while len(sizes) < len(self.join) and min(sizes[-1]) >= 2:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        return sizes

    @property
    def period(self) -> int:
        """Side in pixels of the coarsest cells; parts that begin at multiples share the cells."""
        return 1 << (len(self.join) - 1)

    @property
    def halo(self) -> int:
        """Most pixels beyond its own, to each side, that a query depends on."""
        side, period = 64 * self.period, self.period
        reach = 0
        for pixel in range(side // 2, side // 2 + period):
            seen = plan(self.sizes((side, side)), Window(pixel, pixel, 1, 1))[0].seen
            reach = max(reach, pixel - seen.top, seen.bottom - 1 - pixel)
        # 1 is for the 3×3 window of the first layer. The period is for sides that are odd at some
        # scale, whose cells are wider and overlap by a pixel of the finer scale.
        return reach + 1 + period


class Level(NamedTuple):
    """The windows of one scale that a window of queries depends on."""

    out: Window
    """Window of the sum of this and all coarser scales, which is added to the finer scale."""
    seen: Window
    """Window of the scale itself."""
    read: Window
    """Window of the mean of the finer scale: one cell more on every side, for a 3×3 convolution."""


def plan(sizes: list[Size], window: Window) -> list[Level]:
    """Windows of each scale that a window of queries depends on, finest first.

    Args:
        sizes: (height, width) of all scales, finest first.
        window: window of the finest scale.
    """
    rows, columns = (
        _plan_axis([size[axis] for size in sizes], *span)
        for axis, span in enumerate(spans_of(window))
    )
    return [
        Level(*(window_of(row, column) for row, column in zip(down, across, strict=True)))
        for down, across in zip(rows, columns, strict=True)
    ]


_Span = tuple[int, int]


def _plan_axis(lengths: list[int], start: int, stop: int) -> list[tuple[_Span, _Span, _Span]]:
    """Plan along one axis: the spans ``out``, ``seen`` and ``read`` of every scale."""
    outs = [(start, stop)]
    for fine, coarse in pairwise(lengths):
        low, high = (
            max(((2 * place + 1) * coarse - fine) // (2 * fine), 0)
            for place in (outs[-1][0], outs[-1][1] - 1)
        )
        outs.append((low, min(high + 2, coarse)))
    found: list[tuple[_Span, _Span, _Span]] = []
    for number in reversed(range(len(lengths))):
        seen = outs[number]
        if found:
            fine, coarse, (low, high) = lengths[number], lengths[number + 1], found[0][2]
            seen = min(seen[0], low * fine // coarse), max(seen[1], -(-high * fine // coarse))
        read = max(seen[0] - 1, 0), min(seen[1] + 1, lengths[number])
        found.insert(0, (outs[number], seen, read))
    return found


def spans_of(window: Window) -> tuple[_Span, _Span]:
    """Start and stop of a window's rows, and of its columns."""
    return (window.top, window.bottom), (window.left, window.right)


def window_of(rows: _Span, columns: _Span) -> Window:
    """Inverse of :func:`spans_of`: the window with these rows and columns."""
    return Window(rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])


def own_cells(window: Window, size: Size, grid_size: Size) -> Window:
    """Cells of a grid that contain the pixels of a window of an output of ``size``."""
    rows, columns = (
        [(2 * pixel + 1) * cells // (2 * length) for pixel in (start, stop - 1)]
        for (start, stop), cells, length in zip(spans_of(window), grid_size, size, strict=True)
    )
    return window_of((rows[0], rows[1] + 1), (columns[0], columns[1] + 1))


class _Correction(nn.Module):
    """Residual block: a scale plus its learned correction; initially the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = _window_of_three(width, width)
        self.last = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, (B, width, h, w) -> (B, width, h, w)."""
        return x + pointwise(self.last, F.gelu(self.hidden(x)))

    def window(self, x: Tensor, around: Window, window: Window) -> Tensor:
        """The result of :meth:`forward` in a window, from values ``x`` of the window ``around``."""
        hidden = _convolve(self.hidden, x, around, window)
        return cut(x, inside(window, around)) + pointwise(self.last, F.gelu(hidden))


def _convolve(layer: nn.Conv2d, x: Tensor, around: Window, window: Window) -> Tensor:
    """Apply a 3×3 convolution in a window, to values ``x`` of the window ``around``.

    ``around`` is one pixel wider on every side, except where the map ends; there the edge is
    replicated.
    """
    (top, bottom), (left, right) = spans_of(window)
    (above, below), (before, after) = spans_of(around)
    sides = (left == before, right == after, top == above, bottom == below)
    padded = F.pad(x, [int(side) for side in sides], mode="replicate")
    padded = channels_last(padded)
    return F.conv2d(padded, layer.weight, layer.bias)


def _window_of_three(before: int, after: int) -> nn.Conv2d:
    """Make a 3×3 convolution for channels-last maps, which is twice as fast on a CPU."""
    layer = nn.Conv2d(before, after, 3, padding=1, padding_mode="replicate")
    return layer.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 1×1 convolution to a channels-last map, as a matrix product.

    On a CPU the product is several times as fast as PyTorch's convolution.
    """
    assert isinstance(layer, nn.Conv2d)
    out = F.linear(x.permute(0, 2, 3, 1), layer.weight.flatten(1), layer.bias)
    return out.permute(0, 3, 1, 2)


def _halve(x: Tensor) -> Tensor:
    """Mean over 2×2 cells; an odd side is rounded up, with wider cells that overlap."""
    height, width = x.shape[-2:]
    if height % 2 == 0 and width % 2 == 0:
        return F.avg_pool2d(x, 2)  # equals adaptive pooling here, and is twice as fast
    return pool_to(x, (-(-height // 2), -(-width // 2)))


def unit(x: Tensor, *, over: bool = False) -> Tensor:
    """Scale the vectors over channels to unit length; vectors of 0 stay 0.

    Args:
        x: (B, D, H, W); with channels last this is several times as fast on a CPU.
        over: allow the result to be written over ``x`` when autograd is off.

    Returns:
        (B, D, H, W).
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    length = length.clamp(min=torch.finfo(x.dtype).tiny)
    return x.div_(length) if over and not torch.is_grad_enabled() else x / length
