"""Tables of one axis for the GPU kernels, and the kernels' block sizes.

Every operator is the same sum, once bicubic interpolation and borders are folded into the weights::

    out[b, c, y, x] = Σ_ij  window[b, i, j, y, x] · source[b, c, start_y[y] + i, start_x[x] + j]

An operator is therefore defined by a pair of :class:`Axis` tables: the start of each output
coordinate's window on the source, and the coefficients that distribute its taps over the window.
Source positions outside the map count as zero; folding never gives them weight. This module does
not import Triton.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from upfeat.geometry import reflect

CUBIC = -0.75  # PyTorch's bicubic convolution coefficient


@dataclass(frozen=True, eq=False)
class Axis:
    """The windows of ``target`` outputs along one axis of ``source`` positions.

    Attributes:
        source: number of positions to read from.
        target: number of outputs.
        window: number of positions in every window.
        factor: 1 or 2 if ``start[y] == y // factor + origin`` for all outputs y; 0 otherwise.
        origin: start of the first window; see ``factor``.
        start: (target,) int32, the first position of each output's window, non-decreasing; may be
            negative, and windows may end past the last position.
        begin: (source,) int32, the first output whose window contains the position.
        end: (source,) int32, one past the last output whose window contains the position.
        coefficients: (target, taps, window) float32, the coefficient of each tap at each position
            of the window; ``None`` if taps and positions are identical.
    """

    source: int
    target: int
    window: int
    factor: int
    origin: int
    start: Tensor
    begin: Tensor
    end: Tensor
    coefficients: Tensor | None


@lru_cache(maxsize=512)
def reach(axis: Axis, outputs: int) -> int:
    """Largest number of source positions that a tile of ``outputs`` outputs reads."""
    first = axis.start[::outputs]
    last = torch.cat([axis.start[outputs - 1 :: outputs], axis.start[-1:]])[: len(first)]
    return int((last - first).max()) + axis.window


@lru_cache(maxsize=512)
def audience(axis: Axis, positions: int) -> int:
    """Largest number of outputs that read from a tile of ``positions`` source positions."""
    first = axis.begin[::positions]
    last = torch.cat([axis.end[positions - 1 :: positions], axis.end[-1:]])[: len(first)]
    return max(int((last - first).max()), 1)


@lru_cache(maxsize=128)
def on_device(axis: Axis, device: torch.device) -> Axis:
    """Return the tables on ``device``; cached, since each copy would wait for the device."""
    table = axis.coefficients
    return replace(
        axis,
        start=axis.start.to(device),
        begin=axis.begin.to(device),
        end=axis.end.to(device),
        coefficients=None if table is None else table.to(device),
    )


@lru_cache(maxsize=128)
def plain_axis(target: int, radius: int) -> Axis:
    """Make windows on an axis that is already padded: output y reads positions y … y + 2r."""
    start = torch.arange(target, dtype=torch.int32)
    return _axis(target + 2 * radius, target, start, 2 * radius + 1, None)


@lru_cache(maxsize=128)
def bicubic_axis(source: int, target: int, radius: int) -> Axis:
    """Make windows whose taps read a bicubic resize (``align_corners=False``), reflect-padded.

    Positions are computed as integer multiples of 1 / (2 · ``target``), so that no rounding moves a
    window.
    """
    outputs = torch.arange(target)[:, None]
    taps = torch.arange(-radius, radius + 1)[None, :]
    rows = reflect(outputs + taps, target)  # (target, K)
    numerator = (2 * rows + 1) * source - target
    base = numerator.div(2 * target, rounding_mode="floor")
    offset = (numerator - base * 2 * target).double() / (2 * target)
    first = ((2 * (outputs - radius) + 1) * source - target).div(2 * target, rounding_mode="floor")
    positions = (base[..., None] + torch.arange(-1, 3)).clamp(0, source - 1)  # (target, K, 4)
    return _spread(source, target, first - 1, positions, _cubic(offset))


@lru_cache(maxsize=128)
def replicated_axis(
    source: int,
    target: int,
    radius: int,
    length: int | None = None,
    first: int = 0,
    cells: int | None = None,
    skip: int = 0,
) -> Axis:
    """Make windows of the 2r+1 cells around the cell of each output, with edges replicated.

    The ``target`` outputs start at number ``first`` of ``length`` in all; the ``source`` cells
    start at number ``skip`` of ``cells`` in all.
    """
    length, cells = length or target, cells or source
    outputs = torch.arange(first, first + target)[:, None]
    cell = ((2 * outputs + 1) * cells).div(2 * length, rounding_mode="floor") - skip
    positions = (cell + torch.arange(-radius, radius + 1)).clamp(0, source - 1)[..., None]
    ones = torch.ones(target, 2 * radius + 1, 1, dtype=torch.float64)
    return _spread(source, target, cell - radius, positions, ones)


def _spread(source: int, target: int, first: Tensor, positions: Tensor, values: Tensor) -> Axis:
    """Convert (target, K, n) ``values`` at source ``positions`` to windows from ``first`` on."""
    place = positions - first[..., None]  # (target, K, n), never negative
    window = int(place.max()) + 1
    table = torch.zeros(*place.shape[:2], window, dtype=torch.float64)
    table.scatter_add_(2, place, values)
    used = table.ne(0).flatten(0, 1).any(0).nonzero().flatten()
    low, high = int(used[0]), int(used[-1]) + 1  # outside, all coefficients are 0
    start = (first[:, 0] + low).to(torch.int32)
    return _axis(source, target, start, high - low, table[..., low:high].float().contiguous())


def _axis(source: int, target: int, start: Tensor, window: int, table: Tensor | None) -> Axis:
    origin = int(start[0])
    outputs = torch.arange(target)
    factor = next((f for f in (2, 1) if torch.equal(start.long(), outputs // f + origin)), 0)
    positions = torch.arange(source, dtype=torch.int32)
    begin = torch.searchsorted(start, positions - window, right=True).to(torch.int32)
    end = torch.searchsorted(start, positions, right=True).to(torch.int32)
    return Axis(source, target, window, factor, origin, start, begin, end, table)


def _cubic(offset: Tensor) -> Tensor:
    """The four bicubic coefficients at an offset in [0, 1), (...) -> (..., 4)."""

    def near(x: Tensor) -> Tensor:
        return ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC

    return torch.stack([far(offset + 1), near(offset), near(1 - offset), far(2 - offset)], dim=-1)


@dataclass(frozen=True)
class Blocks:
    """Division of one kernel into programs. Sizes are powers of two, or 0 if the kernel has none.

    Attributes:
        rows: tile height in outputs, in 2×2 groups of outputs, or in source positions.
        columns: tile width, in the units of ``rows``.
        channels: largest number of channels that a program processes at a time; see :func:`blocks`.
        inner: number of terms in one step of the sum.
        warps: warps per program.
        stages: software pipelining depth.
    """

    rows: int
    columns: int
    channels: int
    inner: int
    warps: int
    stages: int


# Keys are (kernel, compute capability or 0 for any, kind). The sizes were chosen by the compiled
# code (no entry spills registers on 8.0 or 9.0), by loads per multiply-add, and by the number of
# values that neighbouring tiles both read.
BLOCKS: dict[tuple[str, int, str], Blocks] = {
    ("fold", 0, ""): Blocks(1, 128, 0, 0, 4, 1),
    ("unfold", 0, ""): Blocks(1, 64, 0, 0, 4, 1),
    ("gather_groups", 0, "planar"): Blocks(2, 32, 32, 0, 4, 1),
    ("gather_groups", 0, "channels_last"): Blocks(4, 8, 64, 0, 8, 1),
    ("scatter_groups", 0, "planar"): Blocks(2, 32, 32, 0, 4, 1),
    ("scatter_groups", 0, "channels_last"): Blocks(4, 8, 64, 0, 8, 1),
    ("gather_tiles", 0, "half"): Blocks(8, 16, 128, 32, 8, 3),
    ("gather_tiles", 0, "single"): Blocks(8, 8, 64, 16, 8, 2),
    ("scatter_tiles", 0, "half"): Blocks(8, 8, 128, 32, 8, 3),
    ("scatter_tiles", 0, "single"): Blocks(8, 8, 64, 16, 8, 2),
    ("outer_tiles", 0, "half"): Blocks(8, 16, 32, 64, 8, 2),
    ("outer_tiles", 0, "single"): Blocks(8, 8, 16, 64, 8, 1),
    ("range_forward", 0, ""): Blocks(2, 64, 0, 0, 4, 1),
    ("range_backward", 0, ""): Blocks(2, 32, 0, 0, 4, 1),
}
FEWEST_CHANNELS = 16  # the least that tl.dot accepts


def blocks(kernel: str, capability: int, kind: str = "", channels: int = 1024) -> Blocks:
    """Return the entry for a kernel, with fewer channels if there are fewer.

    An entry for this compute capability is preferred. ``kind`` is "half" or "single" precision for
    *tiles* kernels; for *groups* kernels it is the memory format, "planar" or "channels_last".
    """
    found = BLOCKS.get((kernel, capability, kind)) or BLOCKS[kernel, 0, kind]
    fitting = max(power_of_two(channels), FEWEST_CHANNELS)
    return replace(found, channels=min(found.channels, fitting))


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n`` and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
