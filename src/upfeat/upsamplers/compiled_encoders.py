"""The published image encoders in the compiled CPU library, for use without gradients.

The layers are those of :mod:`upfeat.upsamplers.residual_encoder`. They share two buffers: every
layer reads one and overwrites the other. Each layer also sums its output for the group norm that
follows, so that the next layer applies the norm as a scale and a shift of the pixels it reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from upfeat.backends.cpu.encoder import Before, Sums, apply, layer, pool, turns
from upfeat.backends.cpu.library import unavailable_reason
from upfeat.transforms import is_transforming
from upfeat.types import Size
from upfeat.upsamplers.residual_encoder import GROUPS, NormBlock, ResidualEncoder


def can_run(module: nn.Module, *tensors: Tensor) -> bool:
    """Return whether compiled layers can replace those of a module: on a CPU, without gradients."""
    if torch.compiler.is_compiling() or is_transforming() or unavailable_reason() is not None:
        return False
    everything = (*tensors, *module.parameters())
    if torch.is_grad_enabled() and any(each.requires_grad for each in everything):
        return False
    return all(
        type(each) in (Tensor, nn.Parameter)
        and each.device.type == "cpu"
        and each.dtype != torch.float64
        for each in everything
    )


def encode(
    encoder: ResidualEncoder, image: Tensor, size: Size, *, out: Tensor | None = None
) -> Tensor:
    """Average an encoder's output over the cells of a grid, as :meth:`ResidualEncoder.pooled` does.

    Args:
        encoder: an encoder that has a first convolution.
        image: (B, inputs, H, W), in the dtype in which maps are stored.
        size: (height, width) of the grid; the image's size for no averaging.
        out: (B, width, *size) to write to; ``None`` for a new tensor.
    """
    entry = encoder.entry
    assert isinstance(entry, nn.Conv2d)
    x, sums = layer(image, entry.weight, entry.bias, groups=GROUPS)
    assert sums is not None
    found, _ = finish(encoder, x, sums, size)
    return found if out is None else out.copy_(found)


def finish(
    encoder: ResidualEncoder,
    x: Tensor,
    sums: Sums,
    size: Size,
    *,
    spare: Tensor | None = None,
    groups: int = 0,
) -> tuple[Tensor, Sums | None]:
    """Apply all layers after the first convolution, and average over the cells of a grid.

    Args:
        encoder: the encoder.
        x: (B, width, H, W), output of the first convolution; it is overwritten.
        sums: sums of ``x`` for a group norm.
        size: (height, width) of the grid.
        spare: another tensor of the shape of ``x``, which is overwritten; ``None`` for a new one.
        groups: number of groups of the returned sums; 0 for no sums.

    Returns:
        (B, width, *size), and its sums for a group norm or ``None``.
    """
    *blocks, last = encoder.blocks
    for block in blocks:
        spare, inner = _hidden(block, x, sums, spare)
        x, after = _last(block, spare, inner, x, GROUPS)
        assert after is not None
        sums = after
    spare, inner = _hidden(last, x, sums, spare)
    shape = (x.shape[2], x.shape[3])
    if size == shape:
        return _last(last, spare, inner, x, groups)
    if size[0] * size[1] >= shape[0] * shape[1] or last.conv2.kernel_size != (1, 1):
        x, _ = _last(last, spare, inner, x, 0)
        x = pool(x, size)
        return x, _sums_of(x, groups) if groups else None
    residual = pool(x, size) if last.residual else None
    small = pool(spare, size, _activated(last.norm2, inner))
    return layer(small, last.conv2.weight, last.conv2.bias, residual=residual, groups=groups)


def _hidden(block: NormBlock, x: Tensor, sums: Sums, spare: Tensor | None) -> tuple[Tensor, Sums]:
    conv = block.conv1
    before = _activated(block.norm1, sums)
    y, after = layer(x, conv.weight, conv.bias, before=before, groups=GROUPS, out=spare)
    assert after is not None
    return y, after


def _last(
    block: NormBlock, y: Tensor, sums: Sums, x: Tensor, groups: int
) -> tuple[Tensor, Sums | None]:
    """Apply a block's second convolution to ``y``, and write over the block's input ``x``."""
    conv = block.conv2
    return layer(
        y,
        conv.weight,
        conv.bias,
        before=_activated(block.norm2, sums),
        residual=x if block.residual else None,
        groups=groups,
        out=x,
    )


def _activated(norm: nn.GroupNorm, sums: Sums) -> Before:
    return sums.norm(norm.weight, norm.bias, norm.eps, silu=True)


def _sums_of(x: Tensor, groups: int) -> Sums:
    values = [
        each.sum((2, 3), dtype=torch.float64).unflatten(1, (groups, -1)).sum(2)
        for each in (x, x.square())
    ]
    count = x.shape[1] // groups * x.shape[2] * x.shape[3]
    return Sums(torch.stack(values, dim=2), count, x.shape[1])


def image_queries(
    encoder: ResidualEncoder,
    query_encoder: ResidualEncoder,
    key_encoder: ResidualEncoder,
    angles: tuple[Tensor, Tensor],
    image: Tensor,
    grid_size: Size,
    output_size: Size,
    *,
    groups: int = 0,
    room: Tensor | None = None,
) -> tuple[Tensor, Sums | None, Tensor, Tensor | None]:
    """Compute the queries and image keys of AnyUp and JAFAR.

    Args:
        encoder: encoder of the image.
        query_encoder: encoder of the rotated output of ``encoder``, for the queries.
        key_encoder: encoder of the rotated output of ``encoder``, for the keys.
        angles: rotary angles of the image's rows (H, width) and columns (W, width), in radians.
        image: (B, 3, H, W) float32.
        grid_size: (h, w) of the keys.
        output_size: (height, width) of the queries.
        groups: number of groups of the queries' sums; 0 for no sums.
        room: dense float32 tensor whose memory is used for buffers if it is large enough.

    Returns:
        Queries (B, width, *output_size), their sums, keys (B, width, *grid_size), and a tensor of
        the queries' shape that may be overwritten, or ``None`` if there is none.
    """
    entries = [each.entry for each in (encoder, query_encoder, key_encoder)]
    assert all(isinstance(each, nn.Conv2d) for each in entries)
    weights: list[Tensor] = [each.weight for each in entries]  # pyright: ignore
    size = (image.shape[2], image.shape[3])
    # Three buffers are reused throughout, since pages of new memory take time to obtain. Two of
    # them may be parts of `room`; the third one holds the queries in the end.
    spare, encoded = _buffers(room, (len(image), weights[0].shape[0], *size))
    encoded, sums = layer(
        image,
        weights[0],
        entries[0].bias,  # pyright: ignore
        groups=GROUPS,
        out=encoded,
    )
    assert sums is not None
    encoded, _ = finish(encoder, encoded, sums, size, spare=spare)
    rotated = Before(rotate=turns(angles), pair=encoded.shape[1] // 2)
    queries, sums = layer(encoded, weights[1], before=rotated, groups=GROUPS)
    keys, key_sums = layer(encoded, weights[2], before=rotated, groups=GROUPS, out=spare)
    assert sums is not None
    assert key_sums is not None
    keys, _ = finish(key_encoder, keys, key_sums, grid_size, spare=encoded)
    queries, after = finish(query_encoder, queries, sums, output_size, spare=encoded, groups=groups)
    return queries, after, keys, encoded if encoded.shape == queries.shape else None


def _buffers(room: Tensor | None, shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Make two channels-last float32 tensors (B, C, H, W), in the memory of ``room`` if it fits."""
    count = math.prod(shape)
    if room is None or room.numel() < 2 * count:
        room = torch.empty(2 * count, dtype=torch.float32, device="cpu")
    batch, channels, height, width = shape
    parts = room.view(-1)[: 2 * count].view(2, batch, height, width, channels)
    return [part.permute(0, 3, 1, 2) for part in parts]


def project_queries(
    queries: Tensor,
    sums: Sums | None,
    blend: nn.Conv2d,
    norm: nn.RMSNorm,
    linear: nn.Linear,
    *,
    spare: Tensor | None = None,
) -> Tensor:
    """Apply the 3×3 convolution, the RMS norm and the linear map to queries, in place.

    Args:
        queries: (B, width, H, W), overwritten.
        sums: sums of the queries if a group norm without weights comes first; otherwise ``None``.
        blend: the 3×3 convolution, zero-padded.
        norm: the RMS norm over the channels of each pixel.
        linear: the linear map to the vectors that attention heads compare.
        spare: another tensor of the shape of ``queries``, which is overwritten; ``None`` for a new
            one.
    """
    before = None if sums is None else sums.norm(None, None, 1e-5)
    blended, _ = layer(queries, blend.weight, before=before or Before(), reflect=False, out=spare)
    return _project(blended, norm, linear, out=queries)


def feature_keys(
    encoder: ResidualEncoder,
    aggregation: ResidualEncoder,
    norm: nn.RMSNorm,
    linear: nn.Linear,
    patterns: Tensor,
    mean: float,
    image_keys: Tensor,
) -> Tensor:
    """Compute AnyUp's keys from the image and the features.

    Args:
        encoder: encoder of the features' patterns, without a first convolution.
        aggregation: encoder of the image's keys and the encoded patterns, one after the other.
        norm: the RMS norm over the channels of each cell.
        linear: the linear map to the vectors that attention heads compare.
        patterns: (B, width, h, w), channels last, less ``mean``; it is overwritten.
        mean: number to add to the encoded patterns.
        image_keys: (B, width, h, w).
    """
    size = (patterns.shape[2], patterns.shape[3])
    seen, _ = finish(encoder, patterns, _sums_of(patterns, GROUPS), size)
    both = torch.cat([image_keys, seen.add_(mean)], dim=1).contiguous(
        memory_format=torch.channels_last
    )
    keys = encode(aggregation, both, size)
    return _project(keys, norm, linear, out=keys)


def _project(x: Tensor, norm: nn.RMSNorm, linear: nn.Linear, *, out: Tensor) -> Tensor:
    """Apply an RMS norm over channels and a linear map to ``x``."""
    epsilon = norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps
    # The norm's weights can be folded into the map, as a pixel's scale is a single number.
    weight = linear.weight.float() * norm.weight.float()
    return layer(x, weight, linear.bias, before=Before(unit=epsilon), out=out)[0]


def rotate(x: Tensor, angles: tuple[Tensor, Tensor], pair: int) -> Tensor:
    """Rotate channels i and i + ``pair`` of each block of 2·``pair``, by position, in place.

    Args:
        x: (B, D, H, W); it is overwritten.
        angles: angles of the rows (H, D) and of the columns (W, D), in radians.
        pair: distance of the two channels of a pair.
    """
    return apply(x, Before(rotate=turns(angles), pair=pair))


__all__ = [
    "can_run",
    "encode",
    "feature_keys",
    "finish",
    "image_queries",
    "pool",
    "project_queries",
    "rotate",
]
