"""Interface of feature maps that are computed only where they are requested."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from upfeat.bounds import LARGEST, flag, whole
from upfeat.linear import unit_vectors
from upfeat.types import Size, Window
from upfeat.upsamplers.checks import check_finite

__all__ = [
    "FeatureMap",
]

_STRIP = 32
"""Number of rows whose features are computed at once."""


class FeatureMap(ABC):
    """Features (B, C, H, W), computed only where they are requested.

    Attributes:
        shape: (B, C, H, W) of the whole map.
    """

    shape: torch.Size

    @abstractmethod
    def full(self, dtype: torch.dtype | None = None) -> Tensor:
        """Compute the whole map, (B, C, H, W), in ``dtype``; ``None`` for the features' own."""

    @abstractmethod
    def crop(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Compute a window of the map, (B, C, height, width)."""

    @abstractmethod
    def at(self, points: Tensor) -> Tensor:
        """Compute features, (N, C), at points (N, 2), rows (y, x) in pixels."""

    @abstractmethod
    def project(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply a linear head (K, C), (K,) at every pixel, (B, K, H, W), without the C channels."""

    def similarity(self, target: Tensor, *, cosine: bool = True) -> Tensor:
        """Compare every pixel with a vector, or with the feature at a point.

        Args:
            target: a point (y, x) in pixels, (2,); a vector, (C,); or several vectors, (K, C), such
                as embeddings of texts. If C = 2, (2,) is a vector.
            cosine: divide by the lengths of both vectors. For the lengths of the map's features all
                channels are computed, one strip of rows at a time; the inner product alone needs
                one channel per target.

        Returns:
            (B, K, H, W), K = 1 for one target.

        Raises:
            ValueError: ``target`` has another shape, or is a point outside the map.
        """
        channels = self.shape[1]
        check_tensor("target", target)
        several = target.dim() == 2 and len(target) > 0 and target.shape[1] == channels
        if not several and (target.dim() != 1 or target.numel() not in (2, channels)):
            raise ValueError(
                f"target must be a point (2,), a vector ({channels},) or vectors (K, {channels}), "
                f"not {tuple(target.shape)}"
            )
        if not several:
            point = target.numel() != channels
            target = self.at(target[None].float()) if point else target[None]
        check_finite("target", target, "check where it comes from")
        if not flag("cosine", cosine):
            return self.project(target)
        lengths = self._lengths()
        # Bounded by the least number of the type, since features may have any unit.
        return self.project(unit_vectors(target)) / lengths.clamp(
            min=torch.finfo(lengths.dtype).tiny
        )

    def _lengths(self) -> Tensor:
        """Euclidean length of every pixel's features, (B, 1, H, W), a strip at a time."""
        height, width = self.shape[2:]
        lengths = []
        for top in range(0, height, _STRIP):
            strip = self.crop(top, 0, min(_STRIP, height - top), width)
            lengths.append(torch.linalg.vector_norm(strip, dim=1, keepdim=True))
        return torch.cat(lengths, dim=2)


def interpolate(maps: Tensor, points: Tensor) -> Tensor:
    """Interpolate maps (C, h, w) bilinearly at points (N, 2), rows (y, x): (N, C)."""
    low = points.floor()
    part = (points - low).to(maps.dtype).to(maps.device)
    y, x = low.long().to(maps.device).unbind(1)
    below, right = (y + 1).clamp(max=maps.shape[1] - 1), (x + 1).clamp(max=maps.shape[2] - 1)
    upper = torch.lerp(maps[:, y, x], maps[:, y, right], part[:, 1])
    lower = torch.lerp(maps[:, below, x], maps[:, below, right], part[:, 1])
    return torch.lerp(upper, lower, part[:, 0]).T


def check_window(size: Size, top: int, left: int, height: int, width: int) -> Window:
    """Check that a window is inside a map of the given size.

    Raises:
        ValueError: the window is not inside the map, or its sides are not whole numbers.
    """
    sides = {"top": top, "left": left, "height": height, "width": width}
    window = Window(*(whole(name, side, -LARGEST) for name, side in sides.items()))
    inside = min(window.top, window.left) >= 0 and min(window.height, window.width) >= 1
    if not inside or window.bottom > size[0] or window.right > size[1]:
        raise ValueError(
            f"crop(top={top}, left={left}, height={height}, width={width}) does not lie in "
            f"the map of {size[0]}×{size[1]}"
        )
    return window


def check_tensor(label: str, value: Tensor) -> None:
    """Check that a value is a dense tensor that has values.

    Raises:
        TypeError: the value is not a tensor; for a module the message names its ``weight``.
        ValueError: the tensor is sparse, or on the meta device.
    """
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        fix = "give its .weight and .bias" if hasattr(value, "weight") else "give a tensor"
        raise TypeError(f"{label} is of type {kind}; {fix}")
    if value.layout is not torch.strided:
        raise ValueError(f"{label} is {value.layout}; give a dense one, as .to_dense() does")
    if value.is_meta:
        raise ValueError(f"{label} is on meta, where tensors have no values")


def check_head(weight: Tensor, bias: Tensor | None, channels: int) -> None:
    """Check that a linear head has as many input channels as a map, and finite values.

    Raises:
        TypeError: ``weight`` or ``bias`` is not a tensor.
        ValueError: a shape is wrong, or a value is NaN or infinite.
    """
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
    if weight.dim() != 2 or weight.shape[1] != channels:
        raise ValueError(
            f"weight must be (K, {channels}) for these features, not {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), not {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_finite(name, tensor, "check how the head was fitted")


def check_points(points: Tensor) -> None:
    """Check the shape and type of points.

    Raises:
        TypeError: ``points`` is not a tensor.
        ValueError: ``points`` is not (N, 2), or is complex or bool.
    """
    check_tensor("points", points)
    if points.dim() != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be (N, 2), rows (y, x), not {tuple(points.shape)}")
    if points.is_complex() or points.dtype is torch.bool:
        raise ValueError(f"points is {points.dtype}; give numbers of pixels")


def check_missing(missing: Tensor, shape: torch.Size) -> Tensor:
    """Expand a mask of pixels without data to (B, 1, H, W), for a map of ``shape`` (B, C, H, W).

    Raises:
        TypeError: ``missing`` is not a tensor.
        ValueError: ``missing`` is not bool, or does not broadcast to (B, 1, H, W).
    """
    check_tensor("missing", missing)
    batch, _, *size = shape
    try:
        if missing.dtype is torch.bool:
            return missing.expand(batch, 1, *size)
    except RuntimeError:
        pass
    raise ValueError(
        f"missing is {missing.dtype} of {tuple(missing.shape)}; it must be bool and broadcast "
        f"to {(batch, 1, *size)}"
    )


def blank(out: Tensor, missing: Tensor) -> Tensor:
    """Set pixels without data to 0; in place unless autograd records."""
    watched = torch.is_grad_enabled() and out.requires_grad
    return out.masked_fill(missing, 0) if watched else out.masked_fill_(missing, 0)
