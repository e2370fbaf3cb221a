"""The encoder of the neighbourhood upsampler in the compiled CPU library: inference only."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backends.cpu.arguments import check_image, reason_against
from upfeat.backends.cpu.library import Pyramid, call

_WIDTH = 32
"""Numbers of channels are padded with zeros to a multiple of this."""


def can_run_pyramid_queries(guidance: Tensor, *_: object) -> str | None:
    """Return why :func:`pyramid_queries` cannot run on these arguments, or ``None``."""
    return reason_against(guidance=guidance)


def pyramid_queries(
    guidance: Tensor, parameters: Sequence[Tensor], window: Sequence[int], unit: bool
) -> Tensor:
    """Compute the queries in a window of an image, without gradients.

    Args:
        guidance: (B, G, H, W), any strides.
        parameters: weights, each followed by its bias: of the first layer, (D, G, 3, 3); of the
            correction of each coarser scale, (D, D, 3, 3) and (D, D), unless there are no
            corrections; of the join of each scale, (D, D). Matrices may have trailing axes of size
            1. See :class:`upfeat.upsamplers.encoder.PyramidEncoder`.
        window: (top, left, height, width), within the image.
        unit: whether to scale the vectors to unit length.

    Returns:
        (B, D, height, width), channels last, of the guidance's dtype.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_image("guidance", guidance, 0)
    encoder = _encoder(guidance.shape[1], [one.detach().float().cpu() for one in parameters])
    top, left, height, width = (int(one) for one in window)
    shape = guidance.shape[0], len(parameters[1]), height, width
    if min(top, left) < 0 or top + height > guidance.shape[2] or left + width > guidance.shape[3]:
        raise ValueError(f"window={tuple(window)} does not lie in {tuple(guidance.shape[2:])}")
    out = torch.empty(
        shape, dtype=guidance.dtype, device=guidance.device, memory_format=torch.channels_last
    )
    if out.numel():
        call("upfeat_pyramid", guidance, encoder, out, top, left, int(unit))
    return out


def can_run_pyramid_means(guidance: Tensor, *_: object) -> str | None:
    """Return why :func:`pyramid_means` cannot run on these arguments, or ``None``."""
    return reason_against(guidance=guidance)


def pyramid_means(
    guidance: Tensor, parameters: Sequence[Tensor], grid_size: Sequence[int], cells: Sequence[int]
) -> Tensor:
    """Average the unit queries of each cell's pixels, without gradients or a map of queries.

    Args:
        guidance: (B, G, H, W), any strides.
        parameters: as in :func:`pyramid_queries`.
        grid_size: (h, w) of a grid that covers the image; where h and w do not divide the image's
            sides, cells overlap.
        cells: (top, left, height, width), a window of the grid.

    Returns:
        (B, D, height, width), of the guidance's dtype.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_image("guidance", guidance, 0)
    encoder = _encoder(guidance.shape[1], [one.detach().float().cpu() for one in parameters])
    top, left, height, width = (int(one) for one in cells)
    if min(top, left) < 0 or top + height > grid_size[0] or left + width > grid_size[1]:
        raise ValueError(f"cells={tuple(cells)} do not lie in {tuple(grid_size)}")
    out = guidance.new_empty((guidance.shape[0], len(parameters[1]), height, width))
    if out.numel():
        call("upfeat_pyramid_means", guidance, encoder, out, *map(int, grid_size), top, left)
    return out


def _encoder(channels: int, parameters: list[Tensor]) -> Pyramid:
    width = len(parameters[1])
    if tuple(parameters[0].shape) != (width, channels, 3, 3):
        raise ValueError(
            f"entry has shape {tuple(parameters[0].shape)}; it must be {(width, channels, 3, 3)}"
        )
    joined, pairs = _joined(parameters), list(zip(parameters[::2], parameters[1::2], strict=True))
    hidden, last = pairs[1:-joined:2], pairs[2:-joined:2]
    full = -(-width // _WIDTH) * _WIDTH
    arrays = {
        "entry_w": _window(parameters[0], channels, full),
        "entry_b": _padded(parameters[1], full),
        **_stack("hidden", hidden, full),
        **_stack("last", last, full),
        **_stack("join", pairs[-joined:], full),
    }
    encoder = Pyramid(
        **{name: value.data_ptr() for name, value in arrays.items()}, width=full, levels=joined
    )
    encoder.keep = arrays  # the structure contains addresses alone, which own no memory
    return encoder


def _joined(parameters: list[Tensor]) -> int:
    """Number of scales of an encoder, from the shapes of its parameters."""
    corrections = sum(one.dim() == 4 and one.shape[-1] == 3 for one in parameters[2:])
    return corrections + 1 if corrections else len(parameters) // 2 - 1


def _stack(name: str, layers: list[tuple[Tensor, Tensor]], full: int) -> dict[str, Tensor]:
    if not layers:
        return {}
    make = _window if layers[0][0].shape[-1] == 3 and layers[0][0].dim() == 4 else _matrix
    return {
        f"{name}_w": torch.stack([make(weight, full, full) for weight, _ in layers]),
        f"{name}_b": torch.stack([_padded(bias, full) for _, bias in layers]),
    }


def _window(weight: Tensor, inputs: int, full: int) -> Tensor:
    """Transpose and zero-pad a 3×3 kernel, (D, C, 3, 3) -> (3, 3, inputs, full)."""
    grown = F.pad(weight, (0, 0, 0, 0, 0, inputs - weight.shape[1], 0, full - weight.shape[0]))
    return grown.permute(2, 3, 1, 0).contiguous()


def _matrix(weight: Tensor, inputs: int, full: int) -> Tensor:
    """Transpose and zero-pad a matrix, (D, C) -> (inputs, full)."""
    weight = weight.flatten(1)
    grown = F.pad(weight, (0, inputs - weight.shape[1], 0, full - weight.shape[0]))
    return grown.T.contiguous()


def _padded(bias: Tensor, full: int) -> Tensor:
    return F.pad(bias, (0, full - len(bias))).contiguous()
