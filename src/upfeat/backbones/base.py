"""The contract of a backbone: an image in, a grid of features out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.bounds import shown, whole
from upfeat.images import read_image
from upfeat.normalization import IMAGENET, Normalization, check_normalization

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from upfeat.images import ImageLike

IMAGENET_MEAN, IMAGENET_STD = IMAGENET


class Backbone(nn.Module, ABC):
    """A vision model that turns a normalised image into features on a coarse grid.

    Attributes:
        name: what provenance calls it.
        embed_dim: number C of feature channels.
        stride: image pixels per feature cell, on both axes.
        in_channels: bands of the images it takes, 3 for RGB.
        mean: per-channel mean that :meth:`preprocess` subtracts, RGB in [0, 1].
        std: per-channel standard deviation that it divides by.
        interpolation: filter by which :meth:`preprocess` resizes, "bicubic" or "bilinear".
    """

    def __init__(
        self,
        *,
        name: str,
        embed_dim: int,
        stride: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        interpolation: str = "bicubic",
        in_channels: int = 3,
    ) -> None:
        """Record what callers may rely on.

        Raises:
            ValueError: a number is no whole one of at least 1, or mean and std do not have a value
                for each channel.
        """
        super().__init__()
        embed_dim, stride = whole("embed_dim", embed_dim), whole("stride", stride)
        in_channels = whole("in_channels", in_channels)
        self._normalization = check_normalization(mean, std, in_channels)
        self.name = name
        self.in_channels = in_channels
        self.embed_dim = embed_dim
        self.stride = stride
        self.interpolation = interpolation
        self.mean: Tensor
        self.std: Tensor
        for label, values in self._normalization._asdict().items():
            self.register_buffer(label, torch.tensor(values)[:, None, None], persistent=False)

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation of its images, as numbers."""
        return self._normalization

    @property
    def dtype(self) -> torch.dtype:
        """Type that the model computes in; float32 where it has no parameters."""
        floating = (one.dtype for one in self.parameters() if one.is_floating_point())
        return next(floating, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """Move or cast, as PyTorch asks; mean and std keep their precision."""
        super()._apply(fn, recurse)
        for label, values in self._normalization._asdict().items():
            here = getattr(self, label)
            if here.dtype != torch.float32:
                exact = torch.tensor(values, device=here.device)[:, None, None]
                self.register_buffer(label, exact, persistent=False)
        return self

    @abstractmethod
    def extract(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), sides whole multiples of the stride -> (B, C, H/stride, W/stride)."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute features.

        Args:
            x: (B, 3, H, W) normalised image. Sides that are not whole multiples of the stride are
                resized to the nearest ones first, so that the grid covers the image exactly. It
                may be in another precision than the model, which is given it in its own.

        Returns:
            (B, C, h, w), h and w as :meth:`grid_size` says, of the dtype of ``x``.

        Raises:
            ValueError: x is not (B, 3, H, W), or a side is shorter than the stride.
        """
        return self.extract(self._ready(x)).to(x.dtype)

    def with_hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute features and, in the same pass, those of earlier layers.

        Args:
            x: as in :meth:`forward`.

        Returns:
            What :meth:`forward` returns; and (B, D, h', w'), a finer grid of the same image, of
            the dtype of ``x``, or ``None`` where the backbone gives none.

        Raises:
            ValueError: likewise.
        """
        features, hidden = self.extract_with_hidden(self._ready(x))
        return features.to(x.dtype), None if hidden is None else hidden.to(x.dtype)

    def hidden(self, x: Tensor) -> Tensor | None:
        """Features of earlier layers, on a finer grid; see :meth:`with_hidden`."""
        return self.with_hidden(x)[1]

    def extract_with_hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Extract features, and those of earlier layers on a finer grid; here ``None``.

        A subclass overrides it that has such layers; ``x`` is as in :meth:`extract`.
        """
        return self.extract(x), None

    def _ready(self, x: Tensor) -> Tensor:
        """The image as :meth:`extract` takes it.

        Raises:
            TypeError: it is no tensor.
            ValueError: it is not (B, 3, H, W) normalised.
        """
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x is of type {type(x).__name__}; give the normalised image, as preprocess(…) "
                "returns it for a path, an array or a picture"
            )
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (B, {self.in_channels}, H, W), not {tuple(x.shape)}")
        if not x.is_floating_point() or x.layout is not torch.strided:
            kind = x.layout if x.layout is not torch.strided else x.dtype
            raise ValueError(f"x is {kind}; give the normalised image, as preprocess returns it")
        size = self.grid_aligned((x.shape[2], x.shape[3]))
        if size != (x.shape[2], x.shape[3]):
            x = x.float() if x.dtype.itemsize < 4 else x
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        return x.to(self.dtype)

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid of the features of an image: its rounded sides over the stride.

        Another only for models of one image size, see :class:`WrappedBackbone`.

        Args:
            size: (height, width), pixels.

        Raises:
            ValueError: a side is shorter than the stride.
        """
        height, width = self.grid_aligned(size)
        return height // self.stride, width // self.stride

    def grid_aligned(self, size: tuple[int, int]) -> tuple[int, int]:
        """Round both sides to the nearest whole multiples of the stride.

        Args:
            size: (height, width), pixels.

        Raises:
            ValueError: a side is shorter than the stride.
        """
        if min(size) < self.stride:
            raise ValueError(
                f"the image is {size[0]}×{size[1]} pixels (height×width); both sides must be at "
                f"least the stride of {self.name}, {self.stride}: enlarge it, or give a size"
            )
        height, width = (round(side / self.stride) * self.stride for side in size)
        return height, width

    def preprocess(
        self, image: ImageLike, size: int | None = None, *, align: bool = False, **reading: Any
    ) -> Tensor:
        """Read and normalise an image.

        Args:
            image: a path, PIL image, NumPy array or tensor, as :func:`upfeat.images.read_image`
                takes them: any mode, upright by its EXIF orientation.
            size: length of the shorter side, pixels; ``None`` keeps the image's own size, so that
                points and crops of the features are in the image's pixels.
            align: round both sides to whole multiples of the stride, so that every feature cell
                covers the same whole number of pixels.
            **reading: options of :func:`upfeat.images.read_image`: ``bands``, ``alpha``,
                ``max_value``, ``mask``, ``nodata``, ``max_pixels``.

        Returns:
            (1, 3, H, W) float32 on the backbone's device.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be read, or a side would be shorter than the stride.
        """
        pixels = read_image(image, channels=self.in_channels, **reading)  # (3, H, W) in [0, 1]
        if len(pixels) != self.in_channels:
            raise ValueError(
                f"bands={shown(reading.get('bands'))} are {len(pixels)}; {self.name} takes "
                f"{self.in_channels}: give as many"
            )
        target = self._target_size((pixels.shape[1], pixels.shape[2]), size, align)
        pixels = pixels.to(self.mean.device)[None]
        if target != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(
                pixels, size=target, mode=self.interpolation, align_corners=False, antialias=True
            ).clamp(0, 1)
        return pixels.sub_(self.mean).div_(self.std)

    def denormalize(self, x: Tensor) -> Tensor:
        """Undo the normalisation: (B, 3, H, W) -> the same, RGB in [0, 1]."""
        return (x * self.std + self.mean).clamp(0, 1)

    def _target_size(self, own: tuple[int, int], size: int | None, align: bool) -> tuple[int, int]:
        if size is not None:
            try:
                scale = whole("size", size, self.stride) / min(own)
            except ValueError as error:
                stride = f"the stride of {self.name} is {self.stride} pixels"
                raise ValueError(f"{error}; {stride}") from None
            own = (max(round(own[0] * scale), 1), max(round(own[1] * scale), 1))
        aligned = self.grid_aligned(own)
        return aligned if align else own
