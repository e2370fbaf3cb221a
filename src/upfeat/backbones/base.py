"""Base class of all backbones: networks from images to features on a coarse grid."""

from __future__ import annotations

import copy
import inspect
from abc import ABCMeta, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.bounds import flag, instance, shown, whole
from upfeat.images import read_image
from upfeat.machine import check_fits
from upfeat.normalization import IMAGENET, Normalization, check_normalization
from upfeat.operator_checks import check_image, whole_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from upfeat.images import ImageLike

IMAGENET_MEAN, IMAGENET_STD = IMAGENET


class _Initialised(ABCMeta):
    """Class of backbone classes: one whose ``__init__`` forgets its base's is told when made."""

    if not TYPE_CHECKING:  # which knows a class's arguments and instances by its __init__

        def __call__(cls, *args: Any, **options: Any) -> Any:
            made = super().__call__(*args, **options)
            if "_normalization" not in vars(made):
                raise ValueError(
                    f"{cls.__name__}.__init__ does not call super().__init__(name=…, embed_dim=…, "
                    "stride=…); call it there first"
                )
            return made

    @property
    def __signature__(cls) -> inspect.Signature:
        """Arguments of ``__init__``, as help() and editors show them."""
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=[*signature.parameters.values()][1:])


class Backbone(nn.Module, metaclass=_Initialised):
    """A vision model that turns a normalised image into features on a coarse grid.

    Attributes:
        name: name of the backbone in provenance and messages.
        embed_dim: number C of feature channels.
        stride: image pixels per feature cell, on both axes.
        in_channels: number of bands of an input image, 3 for RGB.
        mean: mean of each band that :meth:`preprocess` subtracts, RGB in [0, 1].
        std: standard deviation of each band that :meth:`preprocess` divides by.
        interpolation: filter by which :meth:`preprocess` resizes, "bicubic" or "bilinear".
        displacement: pixels by which features are displaced right of and below their cells, which
            :meth:`forward` corrects; 0 unless set by :meth:`aligned`.
    """

    displacement: int = 0

    if TYPE_CHECKING:  # nn.Module declares the result of every call as Any

        def __call__(self, x: Tensor) -> Tensor:
            """See :meth:`forward`."""
            ...

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
        """Record the properties of the backbone; arguments as the class's attributes.

        Raises:
            ValueError: ``embed_dim``, ``stride`` or ``in_channels`` is not a whole number of at
                least 1, or ``mean`` or ``std`` does not have one value for each band.
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
            self.register_buffer(
                label, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False
            )

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation that images are normalised by, as Python numbers."""
        return self._normalization

    @property
    def dtype(self) -> torch.dtype:
        """Type of the first floating-point parameter; float32 if there is none."""
        floating = (one.dtype for one in self.parameters() if one.is_floating_point())
        return next(floating, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """Move or cast the module as ``nn.Module`` does, but keep mean and std in float32."""
        super()._apply(fn, recurse)
        for label, values in self._normalization._asdict().items():
            here = getattr(self, label)
            if here.dtype != torch.float32:
                exact = torch.tensor(values, dtype=torch.float32, device=here.device)[:, None, None]
                self.register_buffer(label, exact, persistent=False)
        return self

    @abstractmethod
    def extract(self, x: Tensor) -> Tensor:
        """Compute features of images whose sides are multiples of the stride.

        Subclasses implement this method; callers use :meth:`forward`.

        Args:
            x: (B, 3, H, W), normalised, in the model's dtype.

        Returns:
            (B, C, H/stride, W/stride).
        """

    def forward(self, x: Tensor) -> Tensor:
        """Compute features.

        Args:
            x: (B, 3, H, W), normalised, of any floating-point dtype. An image whose sides are not
                multiples of the stride is first resized to the nearest multiples, so that the grid
                covers the image exactly.

        Returns:
            (B, C, h, w), with (h, w) from :meth:`grid_size`, in the dtype of ``x``.

        Raises:
            TypeError: x is no tensor, or :meth:`extract` returned none.
            ValueError: x is not (B, 3, H, W), a side is shorter than the stride, or :meth:`extract`
                returned features of another shape than ``embed_dim`` and ``stride`` say.
        """
        ready = self._ready(x)
        return self._checked(self.extract(ready), ready).to(x.dtype)

    def with_hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute features and, in the same pass, activations of an early layer.

        Args:
            x: as in :meth:`forward`.

        Returns:
            The features that :meth:`forward` returns; and the early layer's activations, (B, D,
            h', w') on a finer grid, in the dtype of ``x``, or ``None`` if the backbone has none.

        Raises:
            ValueError: x is not (B, 3, H, W), or a side is shorter than the stride.
        """
        ready = self._ready(x)
        features, hidden = self.extract_with_hidden(ready)
        features = self._checked(features, ready)
        return features.to(x.dtype), None if hidden is None else hidden.to(x.dtype)

    def hidden(self, x: Tensor) -> Tensor | None:
        """Return only the early layer's activations that :meth:`with_hidden` returns."""
        return self.with_hidden(x)[1]

    def extract_with_hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute features as :meth:`extract` does, and activations of an early layer.

        Subclasses with an early layer on a finer grid override this method, which returns ``None``
        in place of the activations.
        """
        return self.extract(x), None

    @property
    def step(self) -> int:
        """Period in cells: parts of an image that begin and end at multiples of it are seen alike.

        More than 1 for backbones with layers on a grid coarser than that of the features, whose
        cells a part that begins elsewhere would place differently.
        """
        return 1

    @property
    def origin(self) -> Backbone:
        """The backbone whose features these are, or estimate: this one, or the innermost one.

        Wrappers that pass an image through a backbone several times, or that add early layers of
        another network, do not change what its features mean: heads trained on them fit.
        """
        return self

    def aligned(self, displacement: int) -> Backbone:
        """Return this backbone with a displacement of its features corrected; it shares weights.

        The cells of a network whose stride-2 convolutions pad one side more than the other do not
        lie where the image is divided into squares: features of the EfficientNet-Lites are those of
        a place 2 pixels further right and down. Such a displacement blurs what is upsampled by the
        image's edges. :func:`upfeat.backbones.estimate_displacement` measures it without labels.

        Args:
            displacement: pixels by which the image is moved right and down before the network sees
                it, its borders mirrored; negative: left and up; less than the stride. 0: the
                network as it is.

        Raises:
            ValueError: ``displacement`` is no whole number in that range.
        """
        displacement = whole("displacement", displacement, 1 - self.stride, self.stride - 1)
        other = copy.copy(self)
        other.displacement = displacement
        return other

    def _ready(self, x: Tensor) -> Tensor:
        """Check an image, resize its sides to multiples of the stride and cast it for the model.

        An image is also moved by the :attr:`displacement`.

        Raises:
            TypeError: x is no tensor.
            ValueError: x is not a dense floating-point tensor (B, 3, H, W), or is too small.
        """
        check_image(x, self.in_channels)
        if not x.is_floating_point() or x.layout is not torch.strided:
            kind = x.layout if x.layout is not torch.strided else x.dtype
            raise ValueError(f"x is {kind}; give the normalised image, as preprocess returns it")
        given, size = x, self.grid_aligned((x.shape[2], x.shape[3]))
        if size != (x.shape[2], x.shape[3]):
            x = x.float() if x.dtype.itemsize < 4 else x
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        # A copy: networks may overwrite their input, which is the caller's and the guidance.
        return self.place(x.to(self.dtype, copy=x is given))

    def _checked(self, features: Tensor, x: Tensor) -> Tensor:
        """Return the features that :meth:`extract` made from an image, after a check of them.

        Raises:
            TypeError: they are no tensor.
            ValueError: they have another shape, device or kind of numbers.
        """
        if torch.compiler.is_compiling():  # comparisons would fix the sizes of the graph
            return features
        if not isinstance(features, Tensor):
            raise TypeError(
                f"{self.name}: extract returned a {type(features).__name__}; return a tensor "
                "(B, C, h, w)"
            )
        expected = (len(x), self.embed_dim, *self.grid_size((x.shape[2], x.shape[3])))
        if tuple(features.shape) != expected:
            raise ValueError(
                f"{self.name}: extract returned {tuple(features.shape)} for images "
                f"{tuple(x.shape)}, where embed_dim={self.embed_dim} and stride={self.stride} make "
                f"{expected}; correct these, or what it returns"
            )
        if features.device != x.device or not features.is_floating_point():
            raise ValueError(
                f"{self.name}: extract returned {features.dtype} on {features.device} for images "
                f"of {x.dtype} on {x.device}; return floating numbers on their device"
            )
        return features

    def place(self, x: Tensor) -> Tensor:
        """Move an image by the displacement; wrappers leave that to the backbone that they wrap."""
        return _moved(x, self.displacement)

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid (h, w) of an image: its rounded sides divided by the stride.

        Models for one image size have another grid; see :class:`WrappedBackbone`.

        Args:
            size: (height, width) of the image, pixels.

        Raises:
            ValueError: a side is shorter than the stride.
        """
        height, width = self.grid_aligned(size)
        return height // self.stride, width // self.stride

    def grid_aligned(self, size: tuple[int, int]) -> tuple[int, int]:
        """Round both sides of an image to the nearest multiples of the stride.

        Args:
            size: (height, width) of the image, pixels.

        Raises:
            ValueError: a side is shorter than the stride, or the size is not two whole numbers.
        """
        height, width = whole_numbers("size", size, 2)
        if min(height, width) < self.stride:
            raise ValueError(
                f"the image is {height}×{width} pixels (height×width); both sides must be at "
                f"least the stride of {self.name}, {self.stride}: enlarge it, or give a size"
            )
        height, width = (round(side / self.stride) * self.stride for side in (height, width))
        return height, width

    def preprocess(
        self, image: ImageLike, size: int | None = None, *, align: bool = False, **reading: Any
    ) -> Tensor:
        """Read and normalise an image.

        Args:
            image: a path, PIL image, NumPy array or tensor of any mode; see
                :func:`upfeat.images.read_image`. Photographs are turned upright by their EXIF
                orientation.
            size: length of the shorter side after resizing, pixels; ``None`` keeps the image's
                size, so that points and crops of the features are in the image's pixels.
            align: round both sides to multiples of the stride, so that every feature cell covers
                the same whole number of pixels.
            **reading: options of :func:`upfeat.images.read_image`: ``bands``, ``alpha``,
                ``max_value``, ``mask``, ``nodata``, ``max_pixels``.

        Returns:
            (1, 3, H, W) float32 on the backbone's device.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the image cannot be read, has another number of bands than the backbone,
                would have a side shorter than the stride, or would not fit into memory.
        """
        pixels = read_image(image, channels=self.in_channels, **reading)  # (3, H, W) in [0, 1]
        if len(pixels) != self.in_channels:
            raise ValueError(
                f"bands={shown(reading.get('bands'))} are {len(pixels)}; {self.name} takes "
                f"{self.in_channels}: give as many"
            )
        own = pixels.shape[1], pixels.shape[2]
        target = self._target_size(own, size, align)
        pixels = pixels.to(self.mean.device)[None]
        if target != own:
            check_fits("image", own, size, 8 * self.in_channels, device=pixels.device)
            pixels = F.interpolate(
                pixels, size=target, mode=self.interpolation, align_corners=False, antialias=True
            ).clamp(0, 1)
        return pixels.sub_(self.mean).div_(self.std)

    def denormalize(self, x: Tensor) -> Tensor:
        """Undo the normalisation: (B, 3, H, W) -> (B, 3, H, W), RGB clamped to [0, 1].

        Raises:
            TypeError: x is no tensor.
        """
        instance("x", x, Tensor, "give the normalised image, as preprocess(…) returns it")
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
        return aligned if flag("align", align) else own


def require_colours(backbone: Backbone, work: str) -> None:
    """Check that a backbone takes photographs in RGB, for work that gives it no other images.

    Raises:
        ValueError: it takes another number of bands.
    """
    if backbone.in_channels != 3:
        raise ValueError(
            f"backbone={backbone.name} takes images of {backbone.in_channels} bands, and {work} "
            "uses photographs in RGB; give a function of (B, 3, H, W) around it"
        )


def _moved(x: Tensor, displacement: int) -> Tensor:
    """Move an image right and down by so many pixels, mirroring its border."""
    if displacement == 0:
        return x
    if torch.compiler.is_dynamo_compiling():  # its code for padding fails for unknown sizes
        rows, columns = (_reflected(side, displacement, x.device) for side in x.shape[2:])
        return x[:, :, rows[:, None], columns]
    before, after = max(displacement, 0), max(-displacement, 0)
    x = F.pad(x, (before, after, before, after), mode="reflect")
    return x[..., after : x.shape[2] - before, after : x.shape[3] - before]


def _reflected(length: int, displacement: int, device: torch.device) -> Tensor:
    """Positions that a side's values are moved from, reflected at its ends, (length,)."""
    positions = torch.arange(length, device=device) - displacement
    return (length - 1) - (length - 1 - positions.abs()).abs()
