"""NAF: pixels attend to 9×9 cells by the image alone; each head has its own block of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backends.cpu import attention as cpu
from upfeat.backends.cpu.library import DTYPES
from upfeat.bounds import whole
from upfeat.types import Size
from upfeat.upsamplers import compiled_encoders
from upfeat.upsamplers.attention import (
    AttentionKernels,
    AttentionUpsampler,
    shifted_window,
)
from upfeat.upsamplers.base import UPSAMPLERS
from upfeat.upsamplers.checks import check_buffer, check_inputs
from upfeat.upsamplers.published import in_own_precision
from upfeat.upsamplers.residual_encoder import ResidualEncoder, mean_over_cells, rotate_pairs

_MOST_PIXELS = 4
"""Largest ratio of the image's side to the output's; larger images are shrunk, as published."""
_LARGE = 2**24
"""Size of an output, in numbers, from which it is filled head by head, to save memory."""


@UPSAMPLERS.register
class NAF(AttentionUpsampler):
    """Local attention: queries from the image, rotated by position; keys are means of queries.

    The weights depend on the image alone, and the heads divide the channels among them: with four
    heads, the first quarter of the features is upsampled with the first head's weights, and so on.
    At the border the window is shifted inwards and keeps its number of cells (NATTEN's rule); on an
    axis with fewer cells than the window, pixels attend to all of them. A pixel's cell is the cell
    that contains its centre, for any sizes; published code, which uses NATTEN, rounds the ratio of
    the sizes down, and agrees if the ratio is a whole number.

    Source: Chambon et al., NAF: Zero-Shot Feature Upsampling via Neighborhood Attention Filtering,
    2025.
    """

    name = "naf"
    published_by = "valeoai/NAF"
    # The output is linear in the features, but other maps may not replace them: which head's
    # weights apply to a channel depends on the channel's place among the features.
    linear = False
    magnitudes: ClassVar[Mapping[str, tuple[float, float]]] = {"periods": (1e-6, 1e6)}

    def __init__(
        self,
        *,
        width: int = 256,
        heads: int = 4,
        window_side: int = 9,
        backend: str = "auto",
    ) -> None:
        """Make an untrained upsampler; :func:`upfeat.load_upsampler` reads published weights.

        Args:
            width: number of channels of queries and keys; each encoder computes half of them.
            heads: number of attention heads.
            window_side: side of the attention window in cells, odd.
            backend: backend of the attention operator; see :mod:`upfeat.functional`.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(width=width, heads=heads, backend=backend)
        width, heads = self.width, self.heads
        if width % 16:
            raise ValueError(f"width={width} must be a multiple of 16")
        self.window_side = whole("window_side", window_side, 1, 63)
        if self.window_side % 2 == 0:
            raise ValueError(f"window_side={window_side} must be odd")
        # With 1×1 convolutions the first encoder reads a pixel's own colour, with 3×3 ones the
        # second reads the pixel's surroundings.
        self.colours = ResidualEncoder(3, width // 2, bias=True, residual=False)
        self.surroundings = ResidualEncoder(
            3, width // 2, entry_size=3, kernel_size=3, bias=True, residual=False
        )
        angles = width // heads // 4
        periods = 100.0 ** (torch.arange(angles) / angles)
        self.register_buffer("periods", periods)
        self.periods: Tensor

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        return {"width": self.width, "heads": self.heads, "window_side": self.window_side}

    @in_own_precision
    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> AttentionKernels:
        """See :meth:`Upsampler.prepare`; the features are ignored."""
        if self.heads % 2 == 0 and self.compiled(guidance):
            image = self._image(guidance, output_size)
            queries, keys = self._compiled(image, grid_size, output_size)
        else:
            image = _shrink(self.exact(guidance), output_size)
            codes = [
                encoder.pooled(image, output_size) for encoder in (self.colours, self.surroundings)
            ]
            queries = torch.cat(codes, dim=1).unflatten(1, (self.heads, -1))
            rows, columns = self._angles(output_size, queries)
            angles = rows[:, None] + columns  # (H, W, D/heads)
            queries = rotate_pairs(queries, angles.permute(2, 0, 1)).flatten(1, 2)
            keys = mean_over_cells(queries, grid_size)
        return AttentionKernels(
            queries,
            keys,
            shifted_window(grid_size[0], output_size[0], self.window_side),
            shifted_window(grid_size[1], output_size[1], self.window_side),
            heads=self.heads,
            split=True,
            backend=self.backend,
        )

    def forward(
        self,
        features: Tensor,
        guidance: Tensor,
        output_size: Size | None = None,
        *,
        hidden: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`AttentionUpsampler.forward`.

        On a CPU, a large output is filled by heads, to limit the memory needed in addition to the
        output: only half of the queries exist at a time, and fewer as the output fills up.
        """
        if hidden is not None or not self._runs_by_heads(features, guidance, output_size, out):
            return super().forward(features, guidance, output_size, hidden=hidden, out=out)
        size = check_inputs(features, guidance, output_size)
        expected = (*features.shape[:2], *size)
        if out is None:
            out = features.new_empty(expected)
        else:
            check_buffer(out, expected, features, guidance)
        image = self._image(guidance, size)
        grid = (features.shape[2], features.shape[3])
        for index, (values, part) in enumerate(
            zip(features.chunk(2, dim=1), out.chunk(2, dim=1), strict=True)
        ):
            queries = self._codes(image, index, size)
            keys = compiled_encoders.pool(queries, grid).to(queries.dtype)
            # In the second half, most of the output is already in memory; copies of each head's
            # queries can be freed as soon as that head is done.
            waiting = [queries] if index == 0 else _copies(queries, self.heads // 2)
            del queries
            self._fill(waiting, keys, values, part)
        return out

    def _fill(self, waiting: list[Tensor], keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Apply the attention of some heads to their channels, freeing queries after use.

        Args:
            waiting: queries, in one or more tensors; each is removed when it is used.
            keys: (B, width/2, h, w).
            values: (B, C/2, h, w), the heads' channels of the features.
            out: (B, C/2, H, W), the part of the output to write.
        """
        parts, size = len(waiting), (out.shape[2], out.shape[3])
        grid = (keys.shape[2], keys.shape[3])
        rows, columns = (
            shifted_window(*each, self.window_side) for each in zip(grid, size, strict=True)
        )
        depth = self.width // self.heads
        heads = keys.shape[1] // depth // parts
        blocks = [values.shape[1] // parts // heads] * heads
        for key, value, to in zip(*(x.chunk(parts, 1) for x in (keys, values, out)), strict=True):
            query = waiting.pop(0)
            cpu.window_attention(
                query, key, value, rows, columns, heads, depth**-0.5, blocks, out=to
            )

    def _runs_by_heads(
        self, features: Tensor, guidance: Tensor, output_size: Size | None, out: Tensor | None
    ) -> bool:
        if not isinstance(features, Tensor) or not isinstance(guidance, Tensor):
            return False
        if features.dim() != 4 or guidance.dim() != 4 or not self.compiled(features, guidance):
            return False
        if self.heads % 2 or features.shape[1] % self.heads or features.dtype not in DTYPES:
            return False
        if out is not None and (
            out.device.type != "cpu" or out.dtype not in DTYPES or out.requires_grad
        ):
            return False
        sides = guidance.shape[2:] if output_size is None else output_size
        if not isinstance(sides, tuple | list) or [type(each) for each in sides] != [int, int]:
            return False
        return features.shape[0] * features.shape[1] * sides[0] * sides[1] >= _LARGE

    def _compiled(self, image: Tensor, grid_size: Size, output_size: Size) -> tuple[Tensor, Tensor]:
        queries = image.new_empty(len(image), *output_size, self.width).permute(0, 3, 1, 2)
        for index, part in enumerate(queries.chunk(2, dim=1)):
            part.copy_(self._codes(image, index, output_size))
        return queries, compiled_encoders.pool(queries, grid_size).to(queries.dtype)

    def _codes(self, image: Tensor, index: int, output_size: Size) -> Tensor:
        """Compute half the heads' queries, with encoder ``index`` (0 or 1), (B, width/2, H, W)."""
        encoder = (self.colours, self.surroundings)[index]
        queries = compiled_encoders.encode(encoder, image, output_size).to(image.dtype)
        angles = self._angles(output_size, image.new_empty(0, dtype=torch.float32))
        rows, columns = (each.repeat(1, self.heads // 2) for each in angles)
        return compiled_encoders.rotate(queries, (rows, columns), self.width // self.heads // 2)

    def _image(self, guidance: Tensor, output_size: Size) -> Tensor:
        """Return the image in the size and dtype that the compiled encoders read."""
        image = _shrink(self.exact(guidance), output_size)
        return image.half() if guidance.dtype == torch.float16 else image

    def _angles(self, size: Size, like: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary angles of a head's channels: rows (H, D/heads) and columns (W, D/heads)."""
        frequencies = 2 * torch.pi / self.periods.to(like.dtype)
        rows, columns = (
            ((torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) / side * 2 - 1)[
                :, None
            ]
            * frequencies
            for side in size
        )
        still = torch.zeros_like(rows[:1])
        rows = torch.cat([rows, still.expand_as(rows)], dim=1).repeat(1, 2)
        columns = torch.cat([still.expand_as(columns), columns], dim=1).repeat(1, 2)
        return rows, columns


def _copies(queries: Tensor, count: int) -> list[Tensor]:
    return [each.clone() for each in queries.chunk(count, dim=1)]


def _shrink(image: Tensor, output_size: Size) -> Tensor:
    height, width = image.shape[2:]
    if height <= _MOST_PIXELS * output_size[0] and width <= _MOST_PIXELS * output_size[1]:
        return image
    most = _MOST_PIXELS * min(output_size)
    size = (min(height, most), min(width, most))
    if image.device.type != "cpu":
        return F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    # In float64, as PyTorch's float32 coordinates are wrong in the sixth digit.
    exact = F.interpolate(image.double(), size=size, mode="bilinear", align_corners=False)
    return exact.to(image.dtype)
