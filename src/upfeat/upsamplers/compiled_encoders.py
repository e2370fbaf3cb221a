"""The published image encoders through the compiled CPU library, where no gradient is asked for.

The same layers as in :mod:`upfeat.upsamplers.residual_encoder`, in two buffers: every layer reads
one and writes over the other, and the norms are scales and shifts by the time pixels are read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upfeat.backends.cpu.encoder import Before, Sums, apply, layer, pool
from upfeat.backends.cpu.library import unavailable_reason
from upfeat.transforms import is_transforming
from upfeat.types import Size
from upfeat.upsamplers.residual_encoder import GROUPS, NormBlock, ResidualEncoder


def can_run(module: nn.Module, *tensors: Tensor) -> bool:
    """Return whether compiled layers may stand in for a module's: on a CPU, without gradients."""
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
    """The means of an encoder's output over the cells of a grid, as :meth:`ResidualEncoder.pooled`.

    Args:
        encoder: with a first convolution.
        image: (B, inputs, H, W), in the type that maps are to be stored in.
        size: of the grid; that of the image for every pixel.
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
    """The layers behind the first convolution, pooled to a grid.

    Args:
        encoder: the encoder.
        x: (B, width, H, W), the first convolution's output; written over.
        sums: of it.
        size: of the grid.
        spare: another map of that shape, which may be written over; ``None`` for a new one.
        groups: of the sums to return; 0 for none.

    Returns:
        (B, width, *size), and its sums.
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
    """A block's second convolution, written over the block's input."""
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
    found = sums.norm(norm.weight, norm.bias, norm.eps)
    return Before(scale=found.scale, shift=found.shift, silu=True)


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
) -> tuple[Tensor, Sums | None, Tensor]:
    """Queries and image keys of AnyUp and JAFAR.

    Args:
        encoder: of the image.
        query_encoder: of what it gives, rotated.
        key_encoder: likewise.
        angles: of the image's rows (H, width) and columns (W, width).
        image: (B, 3, H, W) float32.
        grid_size: of the keys.
        output_size: of the queries.
        groups: of the queries' sums; 0 for none.

    Returns:
        Queries (B, width, *output_size), their sums, and keys (B, width, *grid_size).
    """
    entries = [each.entry for each in (encoder, query_encoder, key_encoder)]
    assert all(isinstance(each, nn.Conv2d) for each in entries)
    weights: list[Tensor] = [each.weight for each in entries]  # pyright: ignore
    size = (image.shape[2], image.shape[3])
    # Three maps at a time: pages that are new take as long as a layer.
    encoded, sums = layer(image, weights[0], entries[0].bias, groups=GROUPS)  # pyright: ignore
    spare = torch.empty_like(encoded)
    assert sums is not None
    encoded, _ = finish(encoder, encoded, sums, size, spare=spare)
    rotated = Before(rotate=angles, pair=encoded.shape[1] // 2)
    queries, sums = layer(encoded, weights[1], before=rotated, groups=GROUPS)
    keys, key_sums = layer(encoded, weights[2], before=rotated, groups=GROUPS, out=spare)
    assert sums is not None
    assert key_sums is not None
    keys, _ = finish(key_encoder, keys, key_sums, grid_size, spare=encoded)
    queries, after = finish(query_encoder, queries, sums, output_size, spare=encoded, groups=groups)
    return queries, after, keys


def project_queries(
    queries: Tensor, sums: Sums | None, blend: nn.Conv2d, norm: nn.RMSNorm, linear: nn.Linear
) -> Tensor:
    """Queries through the 3×3 convolution, to unit scale, and mapped to what heads compare.

    Args:
        queries: (B, width, H, W).
        sums: of the queries where a group norm without weights comes first; or else ``None``.
        blend: the convolution, with zeros at the borders.
        norm: of each pixel.
        linear: the map.
    """
    before = None if sums is None else sums.norm(None, None, 1e-5)
    blended, _ = layer(queries, blend.weight, before=before or Before(), reflect=False)
    epsilon = norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps
    # The norm's weights may as well be the map's: the scale of a pixel is one number.
    weight = linear.weight.float() * norm.weight.float()
    return layer(blended, weight, linear.bias, before=Before(unit=epsilon), out=blended)[0]


def rotate(x: Tensor, angles: tuple[Tensor, Tensor], pair: int) -> Tensor:
    """Rotate channel i against i + pair in blocks of 2·pair by place; written over ``x``."""
    return apply(x, Before(rotate=angles, pair=pair))


__all__ = ["can_run", "encode", "finish", "image_queries", "pool", "project_queries", "rotate"]
