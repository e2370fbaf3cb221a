"""Speed of published upsamplers compared with plain implementations of them, within one run.

The plain implementation uses the same weights and follows the definition in PyTorch's operators:
planar 1×1 convolutions at the image's size, products of every query with every key, masks for the
cells that a pixel does not attend to, and weights of all heads that are stored and averaged. For
UPLiFT these are its layers one by one, and the neighbours of every cell stacked for all channels.
Research code is usually written in this way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.benchmark import FORMAT, machine, peak_memory
from upfeat.types import Size
from upfeat.upsamplers import (
    JAFAR,
    NAF,
    AnyUp,
    UPLiFT,
    Upsampler,
    create_upsampler,
    load_upsampler,
)
from upfeat.upsamplers.anyup import FeatureBasis
from upfeat.upsamplers.attention import AttentionUpsampler, relative_window
from upfeat.upsamplers.convolution_block import BatchNorm, ConvolutionBlock
from upfeat.upsamplers.published import PublishedUpsampler
from upfeat.upsamplers.residual_encoder import GROUPS, NormBlock, ResidualEncoder
from upfeat.upsamplers.uplift import NEIGHBOURS

SETTINGS = (("anyup", 16, 224), ("jafar", 16, 224), ("naf", 28, 448), ("uplift", 16, 224))
"""Name of each upsampler, and the sides of the grid (cells) and the image (pixels) to measure."""
CHANNELS = 384
"""Number of feature channels, for upsamplers that accept any number."""


@dataclass(frozen=True)
class Row:
    """Time and memory of one way of computing an upsampler's result."""

    name: str
    way: str
    """"ours", this library; "high", this library under
    ``torch.set_float32_matmul_precision("high")``; "plain", the plain implementation; or "floor",
    the encoders' convolutions alone, as matrix products."""
    grid: int
    size: int
    channels: int
    seconds: float | None
    """Median time in seconds; ``None`` if the way was skipped."""
    processor_seconds: float | None
    """Median processor time of all threads, which depends little on other work on the machine."""
    peak_bytes: int | None
    """Peak memory during one call less the memory in use before it; Linux only."""
    skipped: str | None = None
    """Reason for skipping the way."""


@torch.no_grad()
def run_rivals(
    files: tuple[Path, ...] = (),
    *,
    repeats: int = 5,
    memory_limit: int = 4 * 2**30,
    report: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measure published upsamplers, this package's default and bilinear interpolation.

    Calls of different ways alternate, so that other work on the machine affects all of them.

    Args:
        files: published checkpoints; an upsampler without one gets random weights of the published
            size, which take the same time.
        repeats: number of timed rounds, after one round to warm up.
        memory_limit: limit in bytes; a plain implementation that would need more is skipped.
        report: function that is called with a line of text for every round; ``None`` for none.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file contains none of the measured upsamplers.
    """
    loaded = [load_upsampler(path) for path in files]
    for path, each in zip(files, loaded, strict=True):
        if each.name not in {name for name, _, _ in SETTINGS}:
            raise ValueError(
                f"{path}: holds {each.name}; give checkpoints of AnyUp, JAFAR, NAF or UPLiFT"
            )
    rows = []
    for name, grid, size in SETTINGS:
        upsampler = next((each for each in loaded if each.name == name), None)
        rows += _measure(upsampler or _random(name), grid, size, repeats, memory_limit, report)
    return rows


def as_json(rows: list[Row]) -> dict[str, Any]:
    """Machine and rows as JSON values."""
    return {"format": FORMAT, "machine": machine(), "rows": [asdict(row) for row in rows]}


def _random(name: str) -> Upsampler:
    torch.manual_seed(0)
    make = {
        "anyup": AnyUp,
        "jafar": lambda: JAFAR(CHANNELS),
        "naf": NAF,
        "uplift": lambda: UPLiFT(CHANNELS),
    }
    return make[name]().eval().requires_grad_(False)


def _measure(
    upsampler: Upsampler,
    grid: int,
    size: int,
    repeats: int,
    memory_limit: int,
    report: Callable[[str], None] | None,
) -> list[Row]:
    assert isinstance(upsampler, PublishedUpsampler)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, size, size, generator=generator)
    channels = getattr(upsampler, "embed_dim", None) or CHANNELS
    features = torch.randn(1, channels, grid, grid, generator=generator)
    default = create_upsampler(None)
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: upsampler(features, image),
        "high": lambda: _less_precise(upsampler, features, image),
        "plain": lambda: plain(upsampler, features, image, (size, size)),
        "floor": lambda: floor(upsampler, size, grid),
        "detail": lambda: default(features, image),
        "bilinear": lambda: F.interpolate(features, size=(size, size), mode="bilinear"),
    }
    needed = _plain_memory(upsampler, size, grid, channels)
    skipped = {"plain": f"needs {needed / 2**30:.0f} GiB"} if needed > memory_limit else {}
    peaks = {way: peak_memory(call) for way, call in ways.items() if way not in skipped}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in peaks}
    for index in range(repeats):
        for way in times:
            start, used = time.perf_counter(), time.process_time()
            ways[way]()
            times[way].append((time.perf_counter() - start, time.process_time() - used))
        if report is not None:
            report(f"{upsampler.name}, round {index + 1} of {repeats}")

    def medians(pairs: list[tuple[float, float]] | None) -> tuple[float | None, float | None]:
        if pairs is None:
            return None, None
        wall, processor = (statistics.median(each) for each in zip(*pairs, strict=True))
        return wall, processor

    return [
        Row(
            way if way in ("detail", "bilinear") else upsampler.name,
            {"detail": "ours", "bilinear": "PyTorch"}.get(way, way),
            grid,
            size,
            channels,
            *medians(times.get(way)),
            peaks.get(way),
            skipped.get(way),
        )
        for way in ways
    ]


def _less_precise(upsampler: PublishedUpsampler, features: Tensor, image: Tensor) -> Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return upsampler(features, image)
    finally:
        torch.set_float32_matmul_precision(before)


def _plain_memory(upsampler: PublishedUpsampler, size: int, grid: int, channels: int) -> int:
    """Approximate memory of a plain implementation in bytes: its largest tensors."""
    if isinstance(upsampler, AttentionUpsampler):
        return 3 * 4 * upsampler.heads * size * size * grid * grid
    return 2 * 4 * channels * 17 * (16 * grid) ** 2


def floor(upsampler: PublishedUpsampler, size: int, grid: int) -> None:
    """Compute the encoders' multiplications and nothing else, as matrix products.

    Args:
        upsampler: AnyUp, JAFAR, NAF or UPLiFT.
        size: side of the image in pixels.
        grid: side of the grid in cells.
    """
    if isinstance(upsampler, UPLiFT):
        *blocks, last = upsampler.encoder
        pixels = (16 * grid) ** 2
        layers = [*((block, pixels) for block in blocks), (last, pixels // 4)]  # every second pixel
        for doubling in range(4):
            cells = (grid * 2**doubling) ** 2
            layers += [(upsampler.coarse_block, cells), (upsampler.fine_block, 4 * cells)]
    else:
        encoders = [module for module in upsampler.modules() if isinstance(module, ResidualEncoder)]
        if not isinstance(upsampler, NAF):
            encoders = encoders[:3]  # encoders of the image; the others run on the grid
        layers = [(encoder, size * size) for encoder in encoders]
    for module, pixels in layers:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                taps = layer.weight.permute(2, 3, 1, 0).flatten(0, 1)  # (taps, inputs, outputs)
                pixel = torch.ones(pixels, taps.shape[1])
                for tap in taps:
                    torch.mm(pixel, tap)


def plain(upsampler: Upsampler, features: Tensor, image: Tensor, size: Size) -> Tensor:
    """Upsample by the upsampler's definition, step by step, with all pairs of cells and pixels.

    Args:
        upsampler: AnyUp, JAFAR, NAF or UPLiFT.
        features: (B, C, h, w).
        image: (B, 3, H, W), normalised.
        size: (height, width) of the output.
    """
    if isinstance(upsampler, NAF):
        return _plain_naf(upsampler, features, image, size)
    if isinstance(upsampler, UPLiFT):
        return _plain_uplift(upsampler, features, image, size)
    assert isinstance(upsampler, AnyUp | JAFAR)
    grid, parts = (features.shape[2], features.shape[3]), upsampler.image
    encoded = _encode(parts.image_encoder, image)
    rows, columns = parts._angles(encoded)
    angles = (rows[:, None] + columns).permute(2, 0, 1)
    first, second = encoded.chunk(2, dim=1)
    encoded = encoded * angles.cos() + torch.cat([-second, first], dim=1) * angles.sin()
    queries = F.adaptive_avg_pool2d(_encode(parts.query_encoder, encoded), size)
    keys = F.adaptive_avg_pool2d(_encode(parts.key_encoder, encoded), grid)
    normed = F.normalize(features, dim=1)
    mask = None
    if isinstance(upsampler, JAFAR):
        known = _encode(upsampler.features_encoder, normed)
        gamma, beta = (F.conv2d(known, part.weight) for part in (upsampler.gamma, upsampler.beta))
        keys = gamma * F.group_norm(keys, GROUPS) + beta
        queries = F.group_norm(queries, GROUPS)
    else:
        basis = upsampler.features_encoder[0]
        assert isinstance(basis, FeatureBasis)
        known = _encode(upsampler.features_encoder, basis(normed) + basis.mean, entry=False)
        keys = _encode(upsampler.aggregation, torch.cat([keys, known], dim=1))
        mask = ~_seen(grid, size, upsampler.window_ratio)
    project = upsampler.projection
    queries = F.conv2d(queries, project.blend.weight, padding=1)
    query, key = (each.flatten(2).mT for each in (queries, keys))
    query, key = project.norm_query(query), project.norm_key(key)
    attention = _attention(upsampler)
    _, weights = attention(query, key, key, attn_mask=mask, average_attn_weights=True)
    return (weights @ features.flatten(2).mT).mT.unflatten(2, size)


def _attention(upsampler: AnyUp | JAFAR) -> nn.MultiheadAttention:
    """Make PyTorch's attention module with an upsampler's weights; its output values are unused."""
    width, project = upsampler.width, upsampler.projection
    own = project.query.weight
    attention = nn.MultiheadAttention(width, upsampler.heads, batch_first=True, dtype=own.dtype)
    attention.eval()
    weights = (own, project.key.weight, torch.eye(width, dtype=own.dtype))
    attention.in_proj_weight.data = torch.cat(weights)
    biases = (project.query.bias, project.key.bias, own.new_zeros(width))
    attention.in_proj_bias.data = torch.cat(biases)
    return attention.requires_grad_(False)


def _encode(encoder: ResidualEncoder, x: Tensor, *, entry: bool = True) -> Tensor:
    """Apply an encoder by planar convolutions."""
    if entry:
        x = _convolve(encoder[0], x)
    for block in encoder.blocks:
        y = _convolve(block.conv1, F.silu(block.norm1(x)))
        y = _convolve(block.conv2, F.silu(block.norm2(y)))
        x = x + y if _is_residual(block) else y
    return x


def _is_residual(block: NormBlock) -> bool:
    return block.residual


def _convolve(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    reach = layer.kernel_size[0] // 2
    if reach:
        x = F.pad(x, (reach,) * 4, mode="reflect")
    return F.conv2d(x, layer.weight, layer.bias)


def _seen(grid: Size, size: Size, ratio: float) -> Tensor:
    """Mask of the cells that each pixel attends to, (H·W, h·w)."""
    axes = []
    for cells, length in zip(grid, size, strict=True):
        first, stop = torch.tensor(relative_window(cells, length, ratio)).unflatten(0, (2, -1))
        cell = torch.arange(cells)
        axes.append((cell >= first[:, None]) & (cell < stop[:, None]))
    return (axes[0][:, None, :, None] & axes[1][None, :, None, :]).flatten(2).flatten(0, 1)


def _plain_naf(upsampler: NAF, features: Tensor, image: Tensor, size: Size) -> Tensor:
    codes = [_encode(part, image) for part in (upsampler.colours, upsampler.surroundings)]
    codes = F.adaptive_avg_pool2d(torch.cat(codes, dim=1), size)
    rows, columns = upsampler._angles(size, codes)
    angles = (rows[:, None] + columns).permute(2, 0, 1)
    out, side = [], upsampler.window_side
    grid = (features.shape[2], features.shape[3])
    seen = []
    for cells, length in zip(grid, size, strict=True):
        own = (torch.arange(length) * 2 + 1) * cells // (2 * length)
        first = (own - min(side, cells) // 2).clamp(0, cells - min(side, cells))[:, None]
        seen.append((torch.arange(cells) >= first) & (torch.arange(cells) < first + side))
    outside = ~(seen[0][:, None, :, None] & seen[1][None, :, None, :]).flatten(2).flatten(0, 1)
    for code, values in zip(
        codes.chunk(upsampler.heads, 1), features.chunk(upsampler.heads, 1), strict=True
    ):
        first, second = code.chunk(2, dim=1)
        query = code * angles.cos() + torch.cat([-second, first], dim=1) * angles.sin()
        key = F.adaptive_avg_pool2d(query, grid)
        logits = query.flatten(2).mT @ key.flatten(2) / len(angles) ** 0.5
        weights = logits.masked_fill(outside, -torch.inf).softmax(2)
        out.append((weights @ values.flatten(2).mT).mT.unflatten(2, size))
    return torch.cat(out, dim=1)


def _plain_uplift(upsampler: UPLiFT, features: Tensor, image: Tensor, size: Size) -> Tensor:
    grid = (features.shape[2], features.shape[3])
    target = (16 * grid[0], 16 * grid[1])
    x = F.interpolate(image, size=target, mode="bilinear", antialias=True)
    maps = [x]
    for block in upsampler.encoder:
        maps.append(_plain_block(block, maps[-1]))
    while features.shape[2] < size[0] or features.shape[3] < size[1]:
        if features.shape[2] == target[0]:
            break
        cells = (features.shape[2], features.shape[3])
        seen = F.interpolate(maps[-1], size=cells)
        x = _plain_block(upsampler.coarse_block, torch.cat([features, seen], dim=1))
        wider = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = upsampler.doubling(x) + wider
        seen = F.interpolate(maps[-2], size=(x.shape[2], x.shape[3]))
        x = _plain_block(upsampler.fine_block, torch.cat([x, seen], dim=1))
        weights = (upsampler.scores(x) + x[:, : upsampler.scores.out_channels]).softmax(1)
        padded = F.pad(features, (2, 2, 2, 2), mode="replicate")
        stacked = torch.stack(
            [
                padded[:, :, 2 + row : 2 + row + cells[0], 2 + column : 2 + column + cells[1]]
                for row, column in NEIGHBOURS
            ],
            dim=2,
        )
        # (B, C, 17, h, 1, w, 1) times (B, 1, 17, h, 2, w, 2)
        own = stacked.unsqueeze(4).unsqueeze(6)
        share = weights.unflatten(3, (cells[1], 2)).unflatten(2, (cells[0], 2)).unsqueeze(1)
        features = (own * share).sum(2).flatten(4, 5).flatten(2, 3)
    if tuple(features.shape[2:]) == size:
        return features
    return F.interpolate(features, size=size, mode="bilinear", antialias=True)


def _plain_block(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, ConvolutionBlock)
    y = x
    for convolution, norm in zip(block.convolutions, block.norms, strict=True):
        assert isinstance(norm, BatchNorm)
        y = convolution(y)
        moments = norm.running_mean, norm.running_var
        y = F.relu(F.batch_norm(y, *moments, norm.weight, norm.bias))
    y = block.mixture(y)
    shared = min(x.shape[1], y.shape[1])
    return torch.cat([y[:, :shared] + x[:, :shared], y[:, shared:]], dim=1)
