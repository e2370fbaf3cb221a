"""Any module or function as a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from upfeat.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone

_PROBE_SIZE = 224


class WrappedBackbone(Backbone):
    """A module or function that maps (B, 3, H, W) to (B, C, h, w), behind the backbone's contract.

    ``embed_dim`` and ``stride`` are read off a blank image where they are not given. A module is
    put in eval mode and stays in it, so that its batch statistics and dropout are fixed; its
    parameters keep their ``requires_grad``.
    """

    def __init__(
        self,
        module: Callable[[Tensor], Tensor],
        *,
        name: str | None = None,
        embed_dim: int | None = None,
        stride: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        in_channels: int | None = None,
        probe_size: int = _PROBE_SIZE,
    ) -> None:
        """Wrap ``module``.

        Args:
            module: maps a normalised image (B, 3, H, W) to features (B, C, h, w).
            name: what provenance calls it; ``None`` for the class's or function's name.
            embed_dim: number of channels; ``None`` to find out.
            stride: pixels per cell; ``None`` to find out.
            mean: normalisation that the module expects, RGB in [0, 1]; ``None`` for ImageNet's, or
                for none where the module does not take three channels.
            std: likewise.
            in_channels: bands of the images that the module takes; ``None`` for those of its first
                convolution, or 3.
            probe_size: side of the blank image, pixels.

        Raises:
            ValueError: the module does not return (B, C, h, w), or its stride is not one whole
                number.
        """
        module_name = getattr(module, "__name__", type(module).__name__)
        if isinstance(module, nn.Module):
            module.eval()
        channels = in_channels or _input_channels(module)
        if embed_dim is None or stride is None:
            found = _probe(module, module_name, probe_size, channels)
            embed_dim = embed_dim or found[0]
            stride = stride or found[1]
        rgb = channels == 3
        super().__init__(
            name=name or module_name,
            embed_dim=embed_dim,
            stride=stride,
            mean=mean or (IMAGENET_MEAN if rgb else (0.0,) * channels),
            std=std or (IMAGENET_STD if rgb else (1.0,) * channels),
            in_channels=channels,
        )
        self.module = module

    def train(self, mode: bool = True) -> WrappedBackbone:
        """Set the mode of this wrapper; the wrapped module stays in eval mode."""
        super().train(mode)
        if isinstance(self.module, nn.Module):
            self.module.eval()
        return self

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`."""
        features = _check_features(self.module(x), self.name)
        expected = (self.embed_dim, x.shape[2] // self.stride, x.shape[3] // self.stride)
        if tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"{self.name} returned {tuple(features.shape[1:])} for an image of "
                f"{x.shape[2]}×{x.shape[3]}, not {expected}; check its embed_dim and stride"
            )
        return features


def _input_channels(module: object) -> int:
    """The channels that a module's first convolution takes; 3 without one."""
    layers = module.modules() if isinstance(module, nn.Module) else ()
    return next((layer.in_channels for layer in layers if isinstance(layer, nn.Conv2d)), 3)


def _probe(
    module: Callable[[Tensor], Tensor], name: str, size: int, channels: int
) -> tuple[int, int]:
    """The module's ``embed_dim`` and ``stride``, from what it makes of a blank image."""
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    like = torch.empty(0) if parameter is None else parameter
    with torch.no_grad():
        blank = torch.zeros(1, channels, size, size, device=like.device, dtype=like.dtype)
        features = _check_features(module(blank), name)
    channels, height, width = features.shape[1:]
    if height != width or size % height:
        raise ValueError(
            f"{name} turns {size}×{size} pixels into {height}×{width} cells, which is no whole "
            "stride; give stride=, or a probe_size that it divides"
        )
    return channels, size // height


def _check_features(features: object, name: str) -> Tensor:
    if isinstance(features, Tensor) and features.dim() == 4:
        return features
    found = (
        f"a tensor of shape {tuple(features.shape)}"
        if isinstance(features, Tensor)
        else f"a {type(features).__name__}"
    )
    raise ValueError(
        f"{name} returned {found}, not features (B, C, h, w); wrap it in a function that picks the "
        "feature map, and for tokens drops the class token and reshapes to the grid"
    )
