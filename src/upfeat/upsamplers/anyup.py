"""AnyUp: pixels attend to cells within a tenth of the image; keys use any backbone's features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backends.cpu.encoder import match_patterns
from upfeat.bounds import number, whole
from upfeat.linear import unit_vectors
from upfeat.types import Size
from upfeat.upsamplers import compiled_encoders
from upfeat.upsamplers.attention import AttentionKernels, relative_window
from upfeat.upsamplers.base import UPSAMPLERS
from upfeat.upsamplers.jafar import EncodedAttention, ImageQueries, Projection
from upfeat.upsamplers.published import in_own_precision
from upfeat.upsamplers.residual_encoder import ResidualEncoder


class FeatureBasis(nn.Module):
    """Map features with any number of channels C to one channel for each of K learned patterns.

    Each channel is correlated with every pattern, a small window of weights. A softmax over
    patterns is then averaged over channels. The published code reads the C·K responses of a cell,
    which are ordered channel by channel, as K rows of C: row i contains the responses i·C to
    i·C + C − 1, whatever their pattern, and the softmax runs down the columns. That order is kept,
    because the published weights were trained with it.
    """

    def __init__(self, width: int, side: int) -> None:
        """Make random patterns.

        Args:
            width: number of patterns K.
            side: side of each pattern in cells, odd.
        """
        super().__init__()
        self.basis = nn.Parameter(torch.randn(width, 1, side, side))

    def forward(self, features: Tensor) -> Tensor:
        """Map features to patterns less :attr:`mean`, (B, C, h, w) -> (B, width, h, w), any C."""
        batch, channels, height, width = features.shape
        patterns, _, side, _ = self.basis.shape
        responses = F.conv2d(
            features.reshape(-1, 1, height, width),
            self.basis.to(features.dtype),
            padding=side // 2,
        )  # (B·C, K, h, w)
        inside = features.new_ones(1, 1, height, width)
        window = features.new_ones(1, 1, side, side)
        responses = responses / F.conv2d(inside, window, padding=side // 2)
        rows = responses.reshape(batch, patterns, channels, height, width)
        return (rows.softmax(1) - self.mean).mean(2)

    @property
    def mean(self) -> float:
        """Mean over patterns, which :meth:`forward` leaves out."""
        return 1 / len(self.basis)


@UPSAMPLERS.register
class AnyUp(EncodedAttention):
    """Local attention: queries from the image, keys from the image and any backbone's features.

    Pixel p attends to all cells touched by a rectangle around it, which extends ``window_ratio`` of
    the image to each side. The heads' weights are averaged; they are positive and sum to 1, so the
    output stays within the range of the features. The weights depend on the features; for given
    weights, the output is linear in the features that they are applied to.

    Source: Wimmer et al., AnyUp: Universal Feature Upsampling, 2025.
    """

    name = "anyup"
    published_by = "wimmerth/anyup"
    needs_features = True

    def __init__(
        self,
        *,
        width: int = 128,
        heads: int = 4,
        window_ratio: float = 0.1,
        basis_side: int = 5,
        backend: str = "auto",
    ) -> None:
        """Make an untrained upsampler; :func:`upfeat.load_upsampler` reads published weights.

        Args:
            width: number of channels of queries and keys.
            heads: number of attention heads.
            window_ratio: distance to which a pixel attends on each side, as a fraction of the
                image, up to 1.
            basis_side: side of the patterns that features are correlated with, in cells, odd.
            backend: backend of the attention operator; see :mod:`upfeat.functional`.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__(width=width, heads=heads, backend=backend)
        width = self.width
        self.window_ratio = number("window_ratio", window_ratio, 0, 1, above=True)
        self.basis_side = whole("basis_side", basis_side, 1, 31)
        if self.basis_side % 2 == 0:
            raise ValueError(f"basis_side={basis_side} must be odd")
        self.image = ImageQueries(width)
        self.features_encoder = ResidualEncoder(None, width)
        self.features_encoder[0] = FeatureBasis(width, self.basis_side)
        self.aggregation = ResidualEncoder(2 * width, width, entry_size=3)
        self.projection = Projection(width)

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        return {
            "width": self.width,
            "heads": self.heads,
            "window_ratio": self.window_ratio,
            "basis_side": self.basis_side,
        }

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
            ValueError: ``features`` is ``None``.
        """
        assert features is not None
        guidance, features = self.exact(guidance, features), self.exact(features, guidance)
        compiled = room is not None or self.compiled(guidance, features)
        queries, keys = self.image(
            guidance, grid_size, output_size, self.projection, compiled=compiled, room=room
        )
        seen = unit_vectors(features)
        basis = self.features_encoder[0]
        assert isinstance(basis, FeatureBasis)
        if compiled:
            keys = compiled_encoders.feature_keys(
                self.features_encoder,
                self.aggregation,
                self.projection.norm_key,
                self.projection.key,
                match_patterns(seen, basis.basis),
                basis.mean,
                keys,
            )
        else:
            seen = self.features_encoder(seen) + basis.mean
            keys = self.projection.keys(self.aggregation(torch.cat([keys, seen], dim=1)))
        return AttentionKernels(
            queries,
            keys,
            relative_window(grid_size[0], output_size[0], self.window_ratio),
            relative_window(grid_size[1], output_size[1], self.window_ratio),
            heads=self.heads,
            backend=self.backend,
        )
