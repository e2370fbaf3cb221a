"""Division of a raster into tiles as large as a memory budget allows."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upfeat.backbones import Backbone
from upfeat.machine import status
from upfeat.model import FeatUp
from upfeat.mosaic import receptive_halo
from upfeat.raster.outputs import Output
from upfeat.tiling import Size

DEFAULT_BUDGET = 4 * 10**9
"""Bytes."""
MASK_HALO = 4
"""Masked cells so near to valid ones take their features; those farther away are 0."""

_TILES = (2048, 1536, 1024, 768, 512, 384, 256, 192, 128)
"""Sides tried, pixels, largest first."""
_WINDOW = 512
"""Side of the windows of a backbone with global attention, pixels."""
_UPSAMPLER_BYTES = 600
"""Of an upsampler, for each pixel of a tile: image, queries and temporaries."""
_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class Plan:
    """Division of a raster; all sides in cells.

    Attributes:
        grid: (h, w) of all coarse features; whole steps, beyond the raster if need be.
        tile: side of a tile that is written.
        halo: cells around it that the upsampler reads.
        step: tiles read from multiples of it.
        backbone_tile: side of a tile that goes through the backbone.
        backbone_halo: cells around that; ``None`` for overlapping windows.
    """

    grid: Size
    tile: int
    halo: int
    step: int
    backbone_tile: int
    backbone_halo: int | None


def parse_memory(text: str | int) -> int:
    """Read an amount of memory.

    Args:
        text: bytes, or a number with a unit: "2GB", "500 MB", "1.5GiB".

    Returns:
        Bytes.

    Raises:
        ValueError: it is no such amount.

    Example:
        >>> parse_memory("1.5 GB")
        1500000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", str(text).lower())
    if match is None:
        raise ValueError(f'max_memory="{text}" must be an amount such as "2GB" or "500MiB"')
    amount = int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS.get(match[2], 0))
    if amount < 1:
        raise ValueError(f'max_memory="{text}" must be above 0')
    return amount


def make_plan(
    size: Size,
    model: FeatUp,
    what: Output,
    *,
    max_memory: int = DEFAULT_BUDGET,
    tile: int | None = None,
) -> Plan:
    """Choose tiles for a raster.

    Args:
        size: (height, width) of the raster, pixels.
        model: backbone and upsampler.
        what: is written.
        max_memory: bytes that the process may hold, with what it holds already.
        tile: side of a tile, pixels; ``None`` for the largest that the budget allows.

    Raises:
        ValueError: the upsampler looks at the whole image, or no tile is small enough; the
            smallest budget that can work is named.
    """
    stride, reach = model.backbone.stride, model.upsampler.reach
    if reach is None:
        raise ValueError(
            f"{model.upsampler.name} looks at the whole image and cannot work in tiles; choose an "
            "upsampler that does not, such as detail"
        )
    step = model.upsampler.step
    height, width = (step * -(-side // (stride * step)) for side in size)
    halo = receptive_halo(model.backbone)
    resident = status("VmRSS") or 0
    activations = activation_bytes(model.backbone)
    needed = math.inf
    for side in _TILES if tile is None else (tile,):
        cells = step * max(1, side // (stride * step))
        through = cells if halo is not None else max(_WINDOW // stride, 1)
        plan = Plan((height, width), cells, reach + MASK_HALO, step, through, halo)
        needed = resident + _needed(plan, model, what, activations)
        if needed <= max_memory or tile is not None:
            return plan
    raise ValueError(
        f"max_memory={max_memory / 1e9:.2f}GB is too little for a raster of {size[0]}×{size[1]} "
        f"pixels; the smallest that can work is about {needed / 1e9 + 0.05:.1f}GB"
    )


def _needed(plan: Plan, model: FeatUp, what: Output, activations: float) -> float:
    """Bytes that a plan needs beyond what the process holds already."""
    stride, channels = model.backbone.stride, model.embed_dim
    outer = min(plan.tile + 2 * (plan.halo + plan.step), max(plan.grid))
    seen = min(plan.backbone_tile + 2 * (plan.backbone_halo or 0), max(plan.grid))
    rows = (outer + plan.backbone_tile) * plan.grid[1] * channels * 4
    backbone = (seen * stride) ** 2 * activations
    upsampler = (outer * stride) ** 2 * _UPSAMPLER_BYTES
    # One tile is being written while the next is computed, in float32 and as it is stored.
    written = (plan.tile * stride) ** 2 * what.count * (4 + 3 * what.dtype.itemsize)
    return rows + max(backbone, upsampler + written)


@torch.no_grad()
def activation_bytes(backbone: Backbone) -> float:
    """Measure the memory that a backbone's activations take, bytes for each pixel of its input.

    It is that of the largest input and output of any of its modules, with half as much again for
    what else is alive; functions without modules are taken for a network of 64 channels.
    """
    largest = 0

    def record(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        held = [one for one in (*inputs, output) if isinstance(one, Tensor)]
        largest = max(largest, sum(one.numel() * one.element_size() for one in held))

    handles = [module.register_forward_hook(record) for module in backbone.modules()]
    side = 8 * backbone.stride
    try:
        backbone(torch.zeros(1, 3, side, side, device=backbone.mean.device))
    except (RuntimeError, ValueError):
        largest = 0
    finally:
        for handle in handles:
            handle.remove()
    return 1.5 * max(largest / side**2, 64 * 4)
