"""The stacked joint bilateral upsampler with learned range and spatial kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat import functional
from upfeat.backends import dispatch
from upfeat.bounds import MOST_CHANNELS, whole
from upfeat.geometry import reflected_range
from upfeat.normalization import IMAGENET
from upfeat.resampling import bicubic, pool_to, pooled, resample
from upfeat.upsamplers.bands import three_bands
from upfeat.upsamplers.base import UPSAMPLERS, Size, Upsampler, Window
from upfeat.upsamplers.checks import check_precision, check_preparation
from upfeat.upsamplers.maps import is_recorded
from upfeat.upsamplers.pointwise import PointwiseNetwork, can_run_in_runs

KEY_CHANNELS = 32
"""Number of channels D of the learned range kernel's keys."""

FIXUP_SCALE = 0.1
"""Factor of the outputs of the fix-up network and of the channel mix before they are added."""


class JBUStage(nn.Module):
    """Filters for one step of joint bilateral upsampling, computed from the guidance alone.

    Source: FeatUp, section 3.2; the fix-up network is in the published code only.
    """

    def __init__(self, radius: int = 3) -> None:
        """Make a stage with initial (untrained) weights.

        Args:
            radius: r ≥ 1; windows are (2r+1)² pixels.
        """
        super().__init__()
        self.radius = radius
        self.backend = "auto"
        taps = (2 * radius + 1) ** 2
        self.range_temperature = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        self.range_proj = PointwiseNetwork(3, KEY_CHANNELS)
        self.fixup_proj = PointwiseNetwork(taps + 3, taps)

    def temperature(self) -> Tensor:
        """Scalar τ by which the keys' inner products are multiplied."""
        return self.range_temperature.exp().clamp(1e-4, 1e4)

    def forward(self, guidance: Tensor) -> Tensor:
        """Make the filters.

        Args:
            guidance: (B, 3, H, W) at the stage's output size.

        Returns:
            (B, (2r+1)², H, W): normalised bilateral weights plus a learned correction that may be
            negative and is not normalised again.
        """
        in_runs = can_run_in_runs(guidance) and self._compiled(guidance)
        # Keys, (B, 32, H, W)
        keys = self.range_proj.in_runs(guidance) if in_runs else self.range_proj(guidance)
        weights = functional.bilateral_weights(
            keys, self.temperature(), self.sigma_spatial, radius=self.radius, backend=self.backend
        )
        if in_runs:
            return self.fixup_proj.in_runs(weights, guidance, share=FIXUP_SCALE, residual=True)
        fixup = self.fixup_proj(torch.cat([weights, guidance.to(weights.dtype)], dim=1))
        return weights + FIXUP_SCALE * fixup

    def upsample(self, features: Tensor, guidance: Tensor) -> Tensor:
        """Upsample features to the guidance's size; in one operator if no gradients are needed.

        Args:
            features: (B, C, h, w).
            guidance: (B, 3, H, W).

        Returns:
            (B, C, H, W).
        """
        if self._can_fuse(features, guidance):
            parameters = self._parameters_in_order()
            return dispatch.call("jbu_stage", self.backend, features, guidance, parameters)
        weights = self(guidance).to(features.dtype)
        return functional.joint_bilateral_upsample(features, weights, backend=self.backend)

    def _compiled(self, guidance: Tensor) -> bool:
        """Return whether the compiled operators run."""
        if self.backend not in ("auto", "cpu") or guidance.device.type != "cpu":
            return False
        return dispatch.reason_against("bilateral_weights", "cpu", guidance) is None

    def _can_fuse(self, features: Tensor, guidance: Tensor) -> bool:
        """Return whether the compiled stage, which has no dropout and no gradients, can run."""
        if self.training or self.backend not in ("auto", "cpu"):
            return False
        if is_recorded(features, guidance, *self.parameters()):
            return False
        if torch.is_autocast_enabled(features.device.type) or features.dtype != guidance.dtype:
            return False
        return dispatch.reason_against("jbu_stage", "cpu", features, guidance) is None

    def _parameters_in_order(self) -> list[Tensor]:
        """Parameters in the order of the compiled stage."""
        first, second = self.range_proj[0], self.range_proj[3]
        hidden, last = self.fixup_proj[0], self.fixup_proj[3]
        return [
            *(first.weight, first.bias, second.weight, second.bias),
            *(self.temperature(), self.sigma_spatial),
            *(hidden.weight, hidden.bias, last.weight, last.bias),
        ]  # pyright: ignore[reportReturnType]


class JBUKernels:
    """The filters of all stages for one guidance; each stage's are computed when it runs."""

    def __init__(
        self, stages: nn.ModuleList, guidance: Tensor, grid_size: Size, sizes: list[Size]
    ) -> None:
        """Keep the stages, the guidance (B, 3, H, W), the grid and every stage's output size."""
        self.stages, self.grid_size, self.output_size = stages, grid_size, sizes[-1]
        self.guidance = guidance
        self.sizes = sizes

    def __call__(self, features: Tensor) -> Tensor:
        """Upsample features, (B, C, h, w) -> (B, C, H, W)."""
        # All pooling first: PyTorch's threads spin for a while afterwards, and would slow down the
        # threads of the compiled stages.
        pooled = [pool_to(self.guidance, size) for size in self.sizes]
        for stage, guidance in zip(self.stages, pooled, strict=True):
            assert isinstance(stage, JBUStage)
            features = stage.upsample(features, guidance)
        return features

    def crop(self, features: Tensor, window: Window) -> Tensor:
        """See :meth:`Kernels.crop`; each stage computes only the pixels that the next one reads."""
        return self._crop(features, window, len(self.sizes) - 1)

    def _crop(self, features: Tensor, window: Window, index: int) -> Tensor:
        """A window of the output of stage ``index``; of the features if ``index`` is −1."""
        if index < 0:
            return features[:, :, window.top : window.bottom, window.left : window.right]
        stage, size = self.stages[index], self.sizes[index]
        assert isinstance(stage, JBUStage)
        before = self.sizes[index - 1] if index else (features.shape[2], features.shape[3])
        radius = stage.radius
        rows = reflected_range(
            window.top - radius, window.bottom + radius, size[0], features.device
        )
        columns = reflected_range(
            window.left - radius, window.right + radius, size[1], features.device
        )
        above, beside = (
            pooled(length, target, places.cpu())
            for length, target, places in zip(
                self.guidance.shape[2:], size, (rows, columns), strict=True
            )
        )
        guidance = resample(self.guidance, above, beside)
        # The patch has a margin of the radius, so that its inner pixels have their true neighbours.
        weights = stage(guidance)[:, :, radius : radius + window.height]
        weights = weights[..., radius : radius + window.width].to(features.dtype)
        down, across = (
            bicubic(length, target, places.cpu())
            for length, target, places in zip(before, size, (rows, columns), strict=True)
        )
        read = Window(down.first, across.first, down.stop - down.first, across.stop - across.first)
        source = self._crop(features, read, index - 1)
        padded = resample(source, down, across, (read.top, read.left))
        return functional.adaptive_conv2d(padded, weights.contiguous(), backend=stage.backend)


@UPSAMPLERS.register
class JBUStack(Upsampler):
    """Stack of joint bilateral upsamplers; each doubles the grid, guided by the image at its size.

    Each stage doubles the grid, but not beyond the output size, which the last stage reaches, so
    any stride, output size and aspect ratio are accepted; a 16-fold output is computed as in the
    published model. The final channel mix x + 0.1·(W·x + b) of features x is computed on the coarse
    grid, where it costs 256 times less for the same result.

    Source: FeatUp, section 3.2.
    """

    name = "jbu_stack"
    exact_parts = "channels"
    magnitudes: ClassVar[Mapping[str, tuple[float, float]]] = {"sigma_spatial": (1e-6, 1e6)}

    def __init__(
        self,
        embed_dim: int | None = None,
        *,
        radius: int = 3,
        n_stages: int = 4,
        backend: str = "auto",
    ) -> None:
        """Make a stack with initial (untrained) weights.

        Args:
            embed_dim: number of feature channels C of the channel mix; ``None`` for no mix and any
                C ("universal").
            radius: window radius r in pixels of a stage's output, from 1 to 16.
            n_stages: number of stages, from 1 to 16.
            backend: backend of the operators; see :mod:`upfeat.functional`.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__()
        embed_dim = whole("embed_dim", embed_dim, 1, MOST_CHANNELS, optional=True)
        n_stages = whole("n_stages", n_stages, 1, 16)
        self.embed_dim = embed_dim
        self.guidance_bands = None if embed_dim is None else 3
        self.radius = whole("radius", radius, 1, 16)
        self.stages = nn.ModuleList(JBUStage(self.radius) for _ in range(n_stages))
        self.set_backend(backend)
        self.channel_dropout = nn.Dropout2d(0.2)
        self.channel_mix = None if embed_dim is None else nn.Conv2d(embed_dim, embed_dim, 1)
        if self.channel_mix is not None:  # any other constant would be in a unit of its own
            assert self.channel_mix.bias is not None
            nn.init.zeros_(self.channel_mix.bias)

    def config(self) -> dict[str, Any]:
        """See :meth:`Upsampler.config`."""
        return {
            "embed_dim": self.embed_dim,
            "radius": self.radius,
            "n_stages": len(self.stages),
        }

    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> JBUKernels:
        """See :meth:`Upsampler.prepare`."""
        bands = self.guidance_bands
        grid_size, output_size = check_preparation(guidance, grid_size, output_size, bands=bands)
        check_precision("guidance", guidance, next(self.parameters()))
        sizes = stage_sizes(grid_size, output_size, len(self.stages))
        return JBUKernels(self.stages, three_bands(guidance), grid_size, sizes)

    @property
    def reach(self) -> int:
        """See :attr:`Upsampler.reach`."""
        # Every stage reads its radius on its output's grid, and for bicubic interpolation two cells
        # to each side on its input's. The grid doubles at each stage, but not beyond the output's,
        # which has at least 4 pixels per cell. The last 1 is for pooled guidance, whose cells
        # overlap.
        cells = 0.0
        for stage in range(1, len(self.stages) + 1):
            cells += self.radius / min(1 << stage, 4) + 2 / min(1 << (stage - 1), 4)
        return math.ceil(cells) + 1

    def mix(self, features: Tensor) -> Tensor:
        """Return x + 0.1·W·x for features x, (B, C, h, w); x itself without a channel mix.

        Raises:
            ValueError: C is not the stack's ``embed_dim``, or features and weights differ in dtype.
        """
        if self.channel_mix is None:
            return features
        if features.shape[1] != self.embed_dim:
            raise ValueError(
                f"features has {features.shape[1]} channels but this JBUStack mixes "
                f"{self.embed_dim}; build it with embed_dim={features.shape[1]}, or with "
                "embed_dim=None for any number"
            )
        check_precision("features", features, self.channel_mix.weight)
        # Dropout of whole channels commutes with upsampling, as the channel mix does.
        mixed = F.conv2d(self.channel_dropout(features), self.channel_mix.weight)
        return features + FIXUP_SCALE * mixed

    @property
    def offset(self) -> Tensor | None:
        """The constant 0.1·b of the channel mix, (C,); ``None`` without a channel mix."""
        if self.channel_mix is None:
            return None
        assert self.channel_mix.bias is not None
        return FIXUP_SCALE * self.channel_mix.bias

    @property
    def constants(self) -> list[Tensor]:
        """See :attr:`Upsampler.constants`."""
        bias = None if self.channel_mix is None else self.channel_mix.bias
        return [] if bias is None else [bias]

    @classmethod
    def from_featup(cls, path: str | Path) -> JBUStack:
        """Read a checkpoint published by FeatUp, or one in its layout; in eval mode.

        Nothing in the file is executed. Only the upsampler's tensors are used; other tensors in the
        file (downsampler, scale network, backbone, optimiser) are named in a log at INFO level.

        Args:
            path: the ``.ckpt`` file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a checkpoint of tensors, contains code, lacks tensors of a
                stack (all are named), or has tensors of other shapes.
        """
        from upfeat.upsamplers.featup_checkpoint import read_featup

        state, embed_dim = read_featup(path)
        with torch.random.fork_rng(devices=[]):
            stack = cls(embed_dim)
        try:
            stack.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        stack.mean, stack.std = IMAGENET  # every published stack was trained with it
        return stack.eval()


def stage_sizes(grid_size: Size, output_size: Size, n_stages: int) -> list[Size]:
    """Compute every stage's output size: doubled, up to the final size, which the last one gets.

    Args:
        grid_size: (h, w) of the features.
        output_size: (H, W), the final size.
        n_stages: number of stages, ≥ 1.

    Returns:
        ``n_stages`` sizes; from 14×14 to 224×224 in four stages: 28, 56, 112, 224.
    """
    doubled = [
        (
            min(grid_size[0] << stage, output_size[0]),
            min(grid_size[1] << stage, output_size[1]),
        )
        for stage in range(1, n_stages)
    ]
    return [*doubled, output_size]
