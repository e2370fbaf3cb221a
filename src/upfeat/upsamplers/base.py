"""The contract of upsamplers: linear in the features, with weights from the image alone.

up(F) = K(g)·M(F) + o, where K(g) are per-pixel weights made from the guidance g, M a map of the
channels of one cell, and o a constant per channel. So M runs on the coarse grid, a linear head
applied to the coarse features gives what it would give after upsampling, and K(g) serves every
backbone, layer and block of channels that goes with one image.

An upsampler may add what the image alone says, D(g), a few maps on a coarse grid times a basis of
channels. A head then applies to the basis, so all of the above still holds; :meth:`through` is the
one place that knows.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, overload

import torch
from torch import Tensor, nn
from torch._C._functorch import (  # pyright: ignore[reportMissingImports]
    is_functorch_wrapped_tensor,
)

from upfeat.backends import dispatch
from upfeat.bounds import shown
from upfeat.normalization import Colour, Normalization, Normalized
from upfeat.registry import Registry
from upfeat.storage import write_bytes, write_tensors
from upfeat.tensor_checks import check_values
from upfeat.types import Size, Window
from upfeat.upsamplers.maps import Map, is_recorded
from upfeat.upsamplers.saved import CONFIG_FILE, WEIGHTS_FILE, load_pretrained

LONGEST_SIDE = 1 << 20
"""Pixels of an output's side, at most."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

AnyUpsampler = TypeVar("AnyUpsampler", bound="Upsampler")


class Kernels(Protocol):
    """Per-pixel upsampling weights of one guidance, ready for any features on its grid."""

    def __call__(self, features: Any) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W), any C; features as :meth:`Upsampler.settle` gives them."""
        ...

    def crop(self, features: Any, window: Window) -> Tensor:
        """The window of what :meth:`__call__` gives, computed alone.

        (B, C, h, w) -> (B, C, window.height, window.width).
        """
        ...


class Upsampler(nn.Module, ABC):
    """Features on a coarse grid and an image in, features at any size out.

    Subclasses give :meth:`prepare`, and :meth:`mix` and :attr:`offset` where they change channels.
    ``config()`` holds what the constructor needs; :meth:`save_pretrained` writes it down.
    """

    name: ClassVar[str]
    """The name by which ``upfeat.load(upsampler=…)`` finds the class."""
    linear: ClassVar[bool] = True
    """Whether anything may be upsampled in place of the features, such as a head's output."""
    unsaved: ClassVar[frozenset[str]] = frozenset({"backend", "start"})
    """Arguments of constructors that no file may give: where to compute, what else to read."""
    always_small: ClassVar[bool] = False
    """Whether no arguments make it larger than some hundred megabytes."""
    magnitudes: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Smallest and largest magnitude of parameters that make sense, by the last part of a name."""
    needs_features: ClassVar[bool] = False
    """Whether the weights depend on the features too, not on the image alone."""
    guidance_bands: int | None = 3
    """How many bands the guidance must have; ``None``: any number (:mod:`.bands` has the rule)."""
    backend: str = "auto"
    """The backend that every operator runs on; see :meth:`set_backend`."""
    mean: Colour | None = None
    """Mean that the guidance is normalised by, RGB in [0, 1]; ``None``: the backbone's own."""
    std: Colour | None = None
    """Standard deviation that it is normalised by, likewise."""
    published_by: ClassVar[str | None] = None
    """The repository that published the weights, where the package has none."""
    origin: str | None = None
    """What the file that it was loaded from turned out to be; ``None`` where there was none."""

    @property
    def reach(self) -> int | None:
        """Cells beyond its own that an output pixel depends on, at most; ``None``: the whole image.

        Through features and guidance alike, where both guidance and output have 4 or more pixels a
        cell. A window of a map (:meth:`render`) is that of the whole map anyway. A tile of an image
        with as many cells around it, upsampled as an image of its own, is the same as in the whole
        image if :attr:`step` divides its sides, those of the image, and the place where it begins.
        Guidance that is not three bands is first evened over the whole image.
        """
        return None

    @property
    def step(self) -> int:
        """Cells: tiles that begin and end at multiples of it can be images of their own.

        See :attr:`reach`.
        """
        return 1

    def set_backend(self, backend: str) -> None:
        """Choose the backend of every operator, for weights, sums, windows and training alike.

        Args:
            backend: "auto" takes the fastest that can run and says at DEBUG level which; any other
                is the only one that runs, or raises; see :mod:`upfeat.functional`.

        Raises:
            ValueError: there is no backend of that name, or it has none of these operators.
        """
        dispatch.check_name(backend)
        for module in self.modules():
            if hasattr(module, "backend"):
                module.backend = backend  # pyright: ignore[reportArgumentType]

    @property
    def normalization(self) -> Normalization | None:
        """Mean and std together; ``None`` for the backbone's own."""
        if self.mean is None or self.std is None:
            return None
        return Normalization(self.mean, self.std)

    def guidance_from(self, x: Tensor, source: Normalized) -> Tensor:
        """Bring an image from a backbone's normalisation into the upsampler's.

        Args:
            x: (B, 3, H, W), normalised for the backbone; of other numbers of bands as it is.
            source: the backbone.

        Returns:
            ``x`` itself where both agree; otherwise (B, 3, H, W) of its dtype.
        """
        own = self.normalization
        if own is None or x.shape[1] != 3:  # other bands are put on one footing by their values
            return x
        return source.normalization.convert(x, own)

    @abstractmethod
    def prepare(
        self,
        guidance: Tensor,
        grid_size: Size,
        output_size: Size,
        features: Tensor | None = None,
    ) -> Kernels:
        """Make the weights of one guidance.

        Args:
            guidance: (B, 3, H, W) normalised image, or of :attr:`guidance_bands`.
            grid_size: (h, w) of the features to come.
            output_size: (height, width) of the result.
            features: (B, C, h, w), the image's own; only upsamplers with :attr:`needs_features`
                look at them, and they need them.
        """

    def mix(self, features: Tensor) -> Tensor:
        """The map of each cell's channels, (B, C, h, w) -> (B, C, h, w). Here the identity."""
        return features

    @property
    def offset(self) -> Tensor | None:
        """Constant added to every output pixel, (C,), or ``None``."""
        return None

    def forward(
        self, features: Tensor, guidance: Tensor, output_size: Size | None = None
    ) -> Tensor:
        """Upsample features.

        Args:
            features: (B, C, h, w).
            guidance: (B, 3, H, W), the image that the features came from, normalised by
                :attr:`mean` and :attr:`std`; :class:`upfeat.FeatUp` brings it there by itself.
                Where :attr:`guidance_bands` is ``None``, any number of bands, in any units.
            output_size: (height, width) of the result in pixels; ``None`` for the guidance's.

        Returns:
            (B, C, *output_size).

        Raises:
            ValueError: shapes or batch sizes disagree, or the features hold NaN or infinity.
        """
        size = check_inputs(features, guidance, output_size, self.guidance_bands)
        grid = (features.shape[2], features.shape[3])
        kernels = self.prepare(guidance, grid, size, features)
        return self.render(kernels, self.mix(features))

    def render(
        self,
        kernels: Kernels,
        mixed: Tensor | Map,
        *,
        head: Tensor | slice | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """Upsampled features, or a linear head of them, at every pixel or in a window.

        Args:
            kernels: of the image, from :meth:`prepare`.
            mixed: (B, C, h, w), the coarse features after :meth:`mix`.
            head: (K, C), applied before upsampling with the same result; or a range of channels;
                ``None`` for all channels as they are.
            window: of the output; ``None`` for all of it.

        Returns:
            (B, K or C, height, width).
        """
        out = self.through(kernels, mixed, head=head, window=window)
        offset = self.offset
        if offset is None:
            return out
        if isinstance(head, slice):
            offset = offset[head]
        elif head is not None:
            offset = head @ offset
        return add_offset(out, offset)

    def through(
        self,
        kernels: Kernels,
        mixed: Tensor | Map,
        *,
        head: Tensor | slice | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """As :meth:`render`, without the constant; ``head`` may be (B, K, C) too."""
        coarse = apply_head(mixed, head)
        return kernels(coarse) if window is None else kernels.crop(coarse, window)

    def settle(self, kernels: Kernels, mixed: Tensor) -> tuple[Kernels, Tensor | Map]:
        """Precompute everything that does not depend on the window.

        Args:
            kernels: of the image, from :meth:`prepare`.
            mixed: (B, C, h, w), the coarse features after :meth:`mix`.

        Returns:
            Kernels and features of which :meth:`render` gives the same, with any head and window.
            Here those that were given.
        """
        return kernels, mixed

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this upsampler, as JSON values."""
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, made if need be.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a weight is NaN or infinite.
        """
        folder = Path(folder)
        state = {key: value.contiguous() for key, value in self.state_dict().items()}
        check_values(f"{folder}: not written", state, magnitudes=self.magnitudes)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS_FILE, state, {"upsampler": self.name})
        config = {"upsampler": self.name, **self.config()}
        if self.mean is not None and self.std is not None:
            config |= {"mean": list(self.mean), "std": list(self.std)}
        write_bytes(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls: type[AnyUpsampler], folder: str | Path) -> AnyUpsampler:
        """Rebuild an upsampler that :meth:`save_pretrained` wrote; in eval mode.

        Args:
            folder: a local folder with ``config.json`` and ``model.safetensors``, or the name of
                a model repository on the Hugging Face hub (needs ``huggingface_hub``).

        Raises:
            FileNotFoundError: the folder, or one of its two files, is not there.
            ValueError: it holds another upsampler, arguments out of range, or tensors that do not
                fit or are not finite.
        """
        return load_pretrained(cls, folder, UPSAMPLERS)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Every way of loading weights comes by here, before any of them is changed.
        own = {name: one for name, one in state_dict.items() if name.startswith(prefix)}
        check_values(f"weights of {type(self).__name__}", own, magnitudes=self.magnitudes)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


UPSAMPLERS = Registry[type[Upsampler]]("upsampler")
"""Classes by name; one registers where it is defined, by ``@UPSAMPLERS.register``."""


@overload
def apply_head(features: Tensor, head: Tensor | slice | None) -> Tensor: ...
@overload
def apply_head(features: Tensor | Map, head: Tensor | slice | None) -> Tensor | Map: ...
def apply_head(features: Tensor | Map, head: Tensor | slice | None) -> Tensor | Map:
    """Apply a linear head, or choose channels, at every cell.

    Args:
        features: (B, C, h, w).
        head: (K, C), one for each image (B, K, C), a range of channels, or ``None`` for nothing.

    Returns:
        (B, K, h, w).
    """
    if head is None:
        return features
    if not isinstance(features, Tensor):
        return Headed(features, head)
    if isinstance(head, slice):
        return features[:, head].contiguous()
    # On a CPU a matrix product is faster than a 1×1 convolution.
    return (head @ features.flatten(2)).unflatten(2, features.shape[2:])


class Headed:
    """A map after a head."""

    def __init__(self, source: Map, head: Tensor | slice, bias: Tensor | None = None) -> None:
        """Keep them; see :func:`apply_head`. The bias is (K,) or (B, K)."""
        self.source, self.head, self.bias = source, head, bias
        self.size = source.size
        self.recorded = source.recorded or (isinstance(head, Tensor) and is_recorded(head))

    def at(self, window: Window) -> Tensor:
        """See :meth:`Map.at`."""
        out = apply_head(self.source.at(window), self.head)
        return out if self.bias is None else out + self.bias[..., None, None]


def cells_of_pixels(pixels: int) -> int:
    """Cells that so many pixels touch at most, where cells are 4 or more pixels wide."""
    return -(-pixels // 4)


def check_inputs(
    features: Tensor, guidance: Tensor, output_size: Size | None, bands: int | None = 3
) -> Size:
    """Check an upsampler's arguments, with its ``guidance_bands``; return the output size.

    Raises:
        ValueError: as :meth:`Upsampler.forward`.
    """
    for label, tensor in (("features", features), ("guidance", guidance)):
        if tensor.dim() != 4 or 0 in tensor.shape[1:]:
            raise ValueError(
                f"{label} must be (B, channels, height, width), none of the last three 0, "
                f"not {tuple(tensor.shape)}"
            )
    if bands not in (None, guidance.shape[1]):
        raise ValueError(
            f"guidance has {guidance.shape[1]} channels; give the normalised RGB image ({bands}), "
            'or use an upsampler that takes any bands, as "detail_universal"'
        )
    if features.shape[0] != guidance.shape[0]:
        raise ValueError(
            f"features has batch size {features.shape[0]} and guidance {guidance.shape[0]}; "
            "give one image per feature map, or expand() the smaller"
        )
    if features.device != guidance.device:
        raise ValueError(
            f"features is on {features.device} and guidance on {guidance.device}; "
            "move one with .to()"
        )
    check_finite("features", features, "check the backbone's input and its precision")
    check_finite("guidance", guidance, "check the image")
    if output_size is None:
        return guidance.shape[2], guidance.shape[3]
    return check_output_size(output_size)


def check_finite(label: str, tensor: Tensor, fix: str) -> None:
    """Refuse NaN where it enters: it would spread over a window at every later stage.

    One pass over the inputs, which are small beside the output. Left out where a value must not
    steer the program: in a graph being compiled and under ``torch.func`` transforms.

    Raises:
        ValueError: a value is NaN or infinite, or of a type that is not computed with.
    """
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{label} is {tensor.dtype}; give floating numbers, as .float() does")
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(tensor):
        return
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{label} holds NaN or infinity; {fix} (float16 overflows at 65504: use bfloat16 or "
            "float32)"
        )


def check_output_size(output_size: Size) -> Size:
    """Check that ``output_size`` is two whole numbers of at least 1.

    Raises:
        ValueError: it is not.
    """
    try:
        height, width = (int(side) for side in output_size)
        valid = (height, width) == tuple(output_size) and min(height, width) >= 1
        valid = valid and not any(isinstance(side, bool | str) for side in output_size)
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise ValueError(
            f"output_size={shown(output_size)} must be (height, width), two whole numbers of "
            "pixels of at least 1"
        )
    if max(height, width) > LONGEST_SIDE:  # pyright: ignore[reportPossiblyUnboundVariable]
        raise ValueError(
            f"output_size={shown(output_size)} has a side of more than {LONGEST_SIDE} pixels; "
            "render parts of it"
        )
    return height, width  # pyright: ignore[reportPossiblyUnboundVariable]


def add_offset(out: Tensor, offset: Tensor) -> Tensor:
    """Add a constant per channel; in place when autograd does not watch (the output is large).

    Args:
        out: (B, C, H, W).
        offset: (C,).
    """
    shaped = offset[:, None, None]
    return out + shaped if torch.is_grad_enabled() and out.requires_grad else out.add_(shaped)
