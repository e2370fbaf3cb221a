"""AnyUp: pixels attend to the cells a tenth of the image around; keys know any features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backends.cpu.encoder import match_patterns
from upfeat.bounds import number, whole
from upfeat.types import Size
from upfeat.upsamplers.attention import AttentionKernels, AttentionUpsampler, relative_window
from upfeat.upsamplers.base import UPSAMPLERS
from upfeat.upsamplers.jafar import ImageQueries, Projection
from upfeat.upsamplers.residual_encoder import ResidualEncoder


class FeatureBasis(nn.Module):
    """Features of any number of channels in terms of as many patterns as keys have channels.

    Each channel is correlated with every pattern of a small window. A softmax compares the
    patterns and the mean over channels is kept. Published weights were trained with the C·K
    responses of a cell, channel by channel, read as K rows of C: row i then holds those numbered
    i·C to i·C + C − 1, of which each column is compared. Kept as it is, since the weights are made
    for it.
    """

    def __init__(self, width: int, side: int) -> None:
        """Make random patterns.

        Args:
            width: how many.
            side: of their window, odd.
        """
        super().__init__()
        self.basis = nn.Parameter(torch.randn(width, 1, side, side))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, width, h, w), any C."""
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
        return rows.softmax(1).mean(2)


@UPSAMPLERS.register
class AnyUp(AttentionUpsampler):
    """Queries from the image; keys from it and from features of any backbone; a local window.

    Pixel p attends to the cells that a square of ``window_ratio`` of the image to each side
    touches. Weights are the mean of the heads', positive with sum 1: nothing leaves the range of
    the features. They depend on the features, and the output is linear in the values given them.

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
        """Make an untrained one; :func:`upfeat.load_upsampler` reads published weights.

        Args:
            width: channels of queries and keys.
            heads: of the attention.
            window_ratio: how far a pixel sees to each side, as a share of the image, to 1.
            basis_side: side of the patterns that features are compared with, odd.
            backend: of the attention's operator; see :mod:`upfeat.functional`.

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

    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> AttentionKernels:
        """See :meth:`Upsampler.prepare`; the features are needed.

        Raises:
            ValueError: there are no features.
        """
        if features is None:
            raise ValueError("features are missing: AnyUp's weights depend on them; pass features=")
        guidance, features = self.exact(guidance, features), self.exact(features, guidance)
        compiled = self.compiled(guidance, features)
        queries, keys = self.image(
            guidance, grid_size, output_size, self.projection, compiled=compiled
        )
        seen = F.normalize(features, dim=1)
        if compiled:
            basis = self.features_encoder[0]
            assert isinstance(basis, FeatureBasis)
            seen = match_patterns(seen, basis.basis)
        else:
            seen = self.features_encoder[0](seen)
        seen = self.features_encoder.blocks_of(seen)
        keys = self.projection.keys(self.aggregation(torch.cat([keys, seen], dim=1)))
        return AttentionKernels(
            queries,
            keys,
            relative_window(grid_size[0], output_size[0], self.window_ratio),
            relative_window(grid_size[1], output_size[1], self.window_ratio),
            heads=self.heads,
            backend=self.backend,
        )
