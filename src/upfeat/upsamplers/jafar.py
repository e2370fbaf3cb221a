"""JAFAR: every pixel attends to all cells; keys depend on the features, values are the features."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backends.cpu import attention as cpu
from upfeat.bounds import MOST_CHANNELS, whole
from upfeat.linear import unit_vectors
from upfeat.types import Size
from upfeat.upsamplers import compiled_encoders
from upfeat.upsamplers.attention import (
    AttentionKernels,
    AttentionUpsampler,
    whole_window,
)
from upfeat.upsamplers.base import UPSAMPLERS
from upfeat.upsamplers.checks import check_inputs
from upfeat.upsamplers.published import in_own_precision
from upfeat.upsamplers.residual_encoder import (
    GROUPS,
    ResidualEncoder,
    convolve,
    group_norm,
    rotate_pairs,
)


class ImageQueries(nn.Module):
    """Encoders common to AnyUp and JAFAR: from an image to queries and keys, with rotary codes."""

    def __init__(self, width: int) -> None:
        """Make the encoders with initial weights.

        Args:
            width: number of channels of all layers.
        """
        super().__init__()
        self.image_encoder = ResidualEncoder(3, width)
        self.query_encoder = ResidualEncoder(width, width)
        self.key_encoder = ResidualEncoder(width, width)
        self.frequencies = nn.Parameter(torch.zeros(2, width))
        # A geometric series of angles for each axis: rows rotate the first half of the channels,
        # columns the second.
        series = 2 * torch.pi * 100.0 ** torch.linspace(0, -1, width // 4)
        with torch.no_grad():
            self.frequencies[0, : width // 2] = series.repeat(2)
            self.frequencies[1, width // 2 :] = series.repeat(2)

    def forward(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        projection: Projection,
        *,
        normed: bool = False,
        compiled: bool = False,
        room: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute projected queries, and keys that depend on the image alone.

        Args:
            guidance: (B, 3, H, W).
            grid_size: (h, w).
            output_size: (height, width).
            projection: projection of the queries; the keys are not projected.
            normed: whether to apply a group norm without weights before the projection.
            compiled: whether the compiled library runs the encoders.
            room: dense float32 tensor that may be overwritten, for buffers of the compiled library.

        Returns:
            Queries (B, width, *output_size) and keys (B, width, *grid_size).
        """
        if compiled:
            return self._compiled(guidance, grid_size, output_size, projection, normed, room)
        encoded = self.image_encoder(guidance)
        rows, columns = self._angles(encoded)
        angles = rows[:, None] + columns  # (H, W, width)
        encoded = rotate_pairs(encoded, angles.permute(2, 0, 1))
        queries = self.query_encoder.pooled(encoded, output_size)
        keys = self.key_encoder.pooled(encoded, grid_size)
        if normed:
            queries = group_norm(queries, GROUPS)
        return projection.queries(queries), keys

    def _compiled(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        projection: Projection,
        normed: bool,
        room: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        queries, sums, keys, spare = compiled_encoders.image_queries(
            self.image_encoder,
            self.query_encoder,
            self.key_encoder,
            self._angles(guidance),
            guidance,
            grid_size,
            output_size,
            groups=GROUPS if normed else 0,
            room=room,
        )
        queries = compiled_encoders.project_queries(
            queries, sums, projection.blend, projection.norm_query, projection.query, spare=spare
        )
        return queries, keys

    def _angles(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Angles from 0 up of rows (H, width) and columns (W, width); a pixel's are their sum."""
        frequencies = self.frequencies.to(like.dtype)
        rows, columns = (
            torch.linspace(0, 1, side, dtype=like.dtype, device=like.device)[:, None] * each
            for side, each in zip(like.shape[2:], frequencies, strict=True)
        )
        return rows, columns


class Projection(nn.Module):
    """Projection of queries (3×3 convolution, RMS norm, linear map) and of keys (norm, map)."""

    def __init__(self, width: int) -> None:
        """Make the layers with PyTorch's initial weights.

        Args:
            width: number of channels of queries and keys.
        """
        super().__init__()
        self.blend = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_query = nn.RMSNorm(width)
        self.norm_key = nn.RMSNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)

    def queries(self, x: Tensor) -> Tensor:
        """Project queries, (B, width, H, W) -> (B, width, H, W)."""
        return _compare(self.norm_query, self.query, convolve(self.blend, x))

    def keys(self, x: Tensor) -> Tensor:
        """Project keys, (B, width, h, w) -> (B, width, h, w)."""
        return _compare(self.norm_key, self.key, x)


def _compare(norm: nn.RMSNorm, layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply an RMS norm and a linear map over channels to ``x``, (B, width, H, W), in its dtype."""
    x = x.permute(0, 2, 3, 1)
    x = F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype)).permute(0, 3, 1, 2)


class EncodedAttention(AttentionUpsampler):
    """Common base of AnyUp and JAFAR: one set of weights for all channels, from large encoders."""

    @abstractmethod
    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
        *,
        room: Tensor | None = None,
    ) -> AttentionKernels:
        """See :meth:`Upsampler.prepare`; features are required.

        Args:
            guidance: as in :meth:`Upsampler.prepare`.
            grid_size: as in :meth:`Upsampler.prepare`.
            output_size: as in :meth:`Upsampler.prepare`.
            features: as in :meth:`Upsampler.prepare`.
            room: dense float32 tensor that may be overwritten, for buffers of the compiled
                library, which the caller knows to be usable; ``None`` for none.

        Raises:
            ValueError: ``features`` is ``None`` or unsuitable.
        """

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

        The compiled library computes the encoders in the memory of the output, before the output.
        """
        if hidden is not None or out is not None or not self._fills(features, guidance):
            return super().forward(features, guidance, output_size, hidden=hidden, out=out)
        size = check_inputs(features, guidance, output_size)
        out = features.new_empty(*features.shape[:2], *size)
        grid = (features.shape[2], features.shape[3])
        kernels = self.prepare(guidance, grid, size, features, room=out)
        return cpu.window_attention(
            kernels.queries,
            kernels.keys,
            features,
            kernels.rows,
            kernels.columns,
            self.heads,
            (self.width // self.heads) ** -0.5,
            [features.shape[1]],
            out=out,
        )

    def _fills(self, features: Tensor, guidance: Tensor) -> bool:
        """Return whether :meth:`forward` may use the output's memory for the encoders."""
        return all(
            isinstance(each, Tensor) and each.dim() == 4 and each.dtype == torch.float32
            for each in (features, guidance)
        ) and (features.is_contiguous() and self.compiled(features, guidance))


@UPSAMPLERS.register
class JAFAR(EncodedAttention):
    """Global attention: queries from the image, keys from the image and modulated by the features.

    The heads' weights are averaged; they are positive and sum to 1, so the output stays within the
    range of the features. The weights depend on the features; for given weights, the output is
    linear in the features that they are applied to. An instance serves one backbone, as an encoder
    with ``embed_dim`` input channels reads the features for the keys.

    Source: Couairon et al., JAFAR: Jack up Any Feature at Any Resolution, 2025.
    """

    name = "jafar"
    published_by = "PaulCouairon/JAFAR"
    needs_features = True

    def __init__(
        self, embed_dim: int, *, width: int = 128, heads: int = 4, backend: str = "auto"
    ) -> None:
        """Make an untrained upsampler; :func:`upfeat.load_upsampler` reads published weights.

        Args:
            embed_dim: number C of feature channels.
            width: number of channels of queries and keys.
            heads: number of attention heads.
            backend: backend of the attention operator; see :mod:`upfeat.functional`.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(width=width, heads=heads, backend=backend)
        embed_dim, width = whole("embed_dim", embed_dim, 1, MOST_CHANNELS), self.width
        self.embed_dim = embed_dim
        self.image = ImageQueries(width)
        self.features_encoder = ResidualEncoder(embed_dim, width)
        self.gamma = nn.Conv2d(width, width, 1, bias=False)
        self.beta = nn.Conv2d(width, width, 1, bias=False)
        self.projection = Projection(width)

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        return {"embed_dim": self.embed_dim, "width": self.width, "heads": self.heads}

    @in_own_precision
    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
        *,
        room: Tensor | None = None,
    ) -> AttentionKernels:
        """See :meth:`EncodedAttention.prepare`.

        Raises:
            ValueError: ``features`` is ``None``, or has another number of channels.
        """
        assert features is not None
        guidance, features = self.exact(guidance, features), self.exact(features, guidance)
        queries, keys = self.image(
            guidance,
            grid_size,
            output_size,
            self.projection,
            normed=True,
            compiled=room is not None or self.compiled(guidance, features),
            room=room,
        )
        seen = self.features_encoder(unit_vectors(features))
        keys = convolve(self.gamma, seen) * group_norm(keys, GROUPS) + convolve(self.beta, seen)
        keys = self.projection.keys(keys)
        return AttentionKernels(
            queries,
            keys,
            whole_window(grid_size[0], output_size[0]),
            whole_window(grid_size[1], output_size[1]),
            heads=self.heads,
            backend=self.backend,
        )
