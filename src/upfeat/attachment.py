"""Insertion of an upsampler behind a module inside a network, and its removal."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.bounds import whole
from upfeat.normalization import IMAGENET, Normalization, check_normalization
from upfeat.registry import unknown_name
from upfeat.types import Size
from upfeat.upsamplers import Upsampler
from upfeat.upsamplers.pretrained import require_upsampler

Guidance = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]
"""Function from a network's positional and keyword arguments to the image, (B, 3, H, W)."""


def attach(
    network: nn.Module,
    layer: str | nn.Module,
    upsampler: Upsampler,
    *,
    stride: int = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    head: str | nn.Module | None = None,
    early: str | nn.Module | None = None,
    guidance: Guidance | None = None,
) -> Attachment:
    """Upsample the output of a module inside a network, guided by the network's own input image.

    Nothing is retrained or copied: hooks upsample the output, until :meth:`Attachment.remove`.
    Gradients flow to the network and to the upsampler.

    Args:
        network: the network, called with a normalised image (B, 3, H, W).
        layer: the module whose output is upsampled, or its name in ``network.named_modules()``,
            such as "layer4". The module must return features (B, C, h, w).
        upsampler: any upsampler; its ``embed_dim``, unless ``None``, must equal the layer's
            channels.
        stride: image pixels per cell of the upsampled output.
        mean: mean of each channel with which the network's images are normalised, RGB in [0, 1];
            ``None`` for ImageNet's.
        std: standard deviation of each channel of the images; ``None`` for ImageNet's.
        head: the module behind the layer, or its name, to adapt it to the finer grid: its
            convolutions of 3×3 and wider are dilated by the ratio of the grids, and the factor of
            its ``nn.Upsample`` is divided by that ratio. 1×1 and linear layers, norms and global
            pooling need no change. ``None`` to leave every module as it is.
        early: an earlier module of the network, or its name, whose output (B, D, h', w'), on a
            finer grid, the upsampler gets as well: for upsamplers with ``takes_hidden``, such as
            the detail upsampler, and necessary for those trained on early layers. ``None`` for
            none. A displacement that such an upsampler was trained with is not corrected: the
            network gets its image as it is.
        guidance: function that returns the image from the network's arguments; ``None`` for the
            first four-dimensional floating-point tensor.

    Returns:
        The attachment. Its ``remove()``, or the end of a ``with`` statement, takes the upsampler
        out of the network.

    Raises:
        TypeError: ``upsampler`` is not an upsampler, or ``guidance`` not a function.
        ValueError: there is no such layer (close names are suggested), the layer or the head has an
            upsampler already, an argument is out of range, or ``early`` is missing or of no use to
            the upsampler. When the network is called: there is no image among the arguments, the
            layer returns no features, or the early layer no map before it.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.Conv2d(8, 5, 1))
        >>> from upfeat import NeighbourhoodUpsampler
        >>> with attach(network, "0", NeighbourhoodUpsampler(), stride=4):
        ...     network(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 5, 16, 24])
        >>> network(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 5, 4, 6])
    """
    if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        network = network.module  # hooks must run in each replica, on its part of the batch
    if not isinstance(network, nn.Module):
        raise TypeError(f"network is of type {type(network).__name__}; give a module")
    require_upsampler(upsampler)
    if early is None and upsampler.wants_hidden:
        raise ValueError(
            f"upsampler={upsampler.name!r} was trained on early layers; name the layer by early=, "
            "or give another upsampler, such as detail"
        )
    if early is not None and not upsampler.takes_hidden:
        raise ValueError(
            f"early={early if isinstance(early, str) else type(early).__name__}: "
            f"{upsampler.name} makes no use of early layers; leave it out, or take detail"
        )
    stride = whole("stride", stride)
    if guidance is not None and not callable(guidance):
        raise TypeError(f"guidance is of type {type(guidance).__name__}; give a function")
    normalization = IMAGENET
    if mean is not None or std is not None:
        normalization = check_normalization(mean, std)
    layer = _module(network, layer, "layer")
    head = None if head is None else _module(network, head, "head")
    _refuse_attached(layer, head)
    return Attachment(
        network,
        layer,
        upsampler,
        stride=stride,
        normalization=normalization,
        head=head,
        early=None if early is None else _module(network, early, "early"),
        guidance=guidance,
    )


class Attachment:
    """An upsampler in a network, as :func:`attach` returns it.

    Calls of the network may be nested and come from several threads; each call has its own image.

    Attributes:
        network: the network.
        layer: the module whose output is upsampled.
        upsampler: the upsampler, whose parameters are not in ``network.parameters()``.
        attached: whether the upsampler is still in the network.
    """

    def __init__(
        self,
        network: nn.Module,
        layer: nn.Module,
        upsampler: Upsampler,
        *,
        stride: int,
        normalization: Normalization,
        head: nn.Module | None,
        guidance: Guidance | None,
        early: nn.Module | None = None,
    ) -> None:
        """Register the hooks; see :func:`attach`."""
        self.network, self.layer, self.upsampler = network, layer, upsampler
        self.stride, self.normalization = stride, normalization
        self._guidance = guidance or _first_image
        # By thread: images of the calls in progress, their early layers' outputs, and ratio of the
        # last finer grid to its coarse grid.
        self._images: dict[int, list[Tensor | None]] = {}
        self._layers: dict[int, list[Tensor | None]] = {}
        self._ratios: dict[int, Size] = {}
        self._lock = _Lock()
        self._changed: list[tuple[nn.Module, type[nn.Module]]] = []
        self._handles = [
            network.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            layer.register_forward_hook(self._upsample),
            network.register_forward_hook(self._leave, always_call=True),
        ]
        self.early = early
        if early is not None:
            self._handles.append(early.register_forward_hook(self._keep))
        if head is not None:
            self._widen(head)
        self.attached = True

    def remove(self) -> None:
        """Take the upsampler out and restore the network; a second call has no effect."""
        for handle in self._handles:
            handle.remove()
        for module, kind in self._changed:
            module.__class__ = kind
            del module._attachment
        self._handles, self._changed, self.attached = [], [], False

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"stride {self.stride}" if self.attached else "removed"
        name = next(
            (name for name, module in self.network.named_modules() if module is self.layer), "?"
        )
        return f"Attachment({self.upsampler.name} behind {name or 'the network'}, {state})"

    def ratio(self) -> Size:
        """Ratio (rows, columns) of the layer's last upsampled grid to its own, in this thread."""
        return self._ratios.get(_thread(), (1, 1))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls = self._images.setdefault(_thread(), [])
        calls.append(None)  # before the image is found: ``_leave`` pops an entry even on failure
        self._layers.setdefault(_thread(), []).append(None)
        image = self._guidance(args, kwargs)
        if not isinstance(image, Tensor) or image.dim() != 4 or not image.is_floating_point():
            is_tensor = isinstance(image, Tensor)
            found = f"{image.dtype} {tuple(image.shape)}" if is_tensor else type(image).__name__
            raise ValueError(f"guidance returned {found}; return the image (B, 3, H, W)")
        calls[-1] = image

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        thread = _thread()
        images = self._images.get(thread)
        if images:
            images.pop()
            self._layers[thread].pop()
        if not images:
            self._images.pop(thread, None)
            self._layers.pop(thread, None)
            self._ratios.pop(thread, None)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Keep the early layer's output for the layer that is upsampled in the same call."""
        calls = self._layers.get(_thread())
        if calls and isinstance(output, Tensor):
            calls[-1] = output

    def _upsample(self, module: nn.Module, args: tuple[Any, ...], features: object) -> object:
        thread = _thread()
        images = self._images.get(thread)
        image = images[-1] if images else None
        if image is None:  # the layer is called directly, not by the network
            return features
        if not isinstance(features, Tensor) or features.dim() != 4:
            is_tensor = isinstance(features, Tensor)
            found = tuple(features.shape) if is_tensor else f"a {type(features).__name__}"
            raise ValueError(
                f"the layer to upsample behind returned {found}, not features (B, C, h, w); choose "
                "a layer that does, or one that the tokens are reshaped by"
            )
        image = self.upsampler.guidance_from(image, self)
        size = -(-image.shape[2] // self.stride), -(-image.shape[3] // self.stride)
        rows, columns = (max(round(size[axis] / features.shape[2 + axis]), 1) for axis in (0, 1))
        self._ratios[thread] = rows, columns
        hidden = self._layers[thread][-1]
        if self.early is not None and (hidden is None or hidden.dim() != 4):
            kind = "no map" if hidden is None else f"{tuple(hidden.shape)}"
            raise ValueError(
                f"the early layer returned {kind} before the layer to upsample behind, not "
                "(B, D, h', w'); choose a module that runs before it, on a finer grid"
            )
        return self._apply(features, image, size, hidden)

    def _apply(self, features: Tensor, image: Tensor, size: Size, hidden: Tensor | None) -> Tensor:
        """Upsample in the precision of the upsampler's weights, on the features' device."""
        weight = next(self.upsampler.parameters(), features)
        inputs = features.to(weight.dtype), image.to(features.device, weight.dtype), size
        seen = {} if hidden is None else {"hidden": hidden.to(inputs[0])}
        if weight.device == features.device:
            return self.upsampler(*inputs, **seen).to(features.dtype)
        # A replica on another device gets copies of the weights; gradients flow to the originals.
        weights = (*self.upsampler.named_parameters(), *self.upsampler.named_buffers())
        moved = {name: value.to(features.device) for name, value in weights}
        with self._lock:  # functional_call replaces the module's own weights during the call
            out = torch.func.functional_call(self.upsampler, moved, inputs, seen)
        return out.to(features.dtype)

    def _widen(self, head: nn.Module) -> None:
        unchanged = []
        for name, module in head.named_modules():
            kind = _kind_on_a_finer_grid(module)
            if kind is not None:
                self._changed.append((module, type(module)))
                module.__class__ = kind
                module._attachment = self  # pyright: ignore[reportArgumentType]
            elif _depends_on_the_grid(module):
                unchanged.append(name or type(module).__name__)
        if unchanged:
            warnings.warn(
                f"head: {', '.join(unchanged)} cannot be carried over to a finer grid and see "
                "less of the image there",
                stacklevel=4,
            )


class _Lock:
    """Lock that can be copied and pickled with a network; the copy is a new lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


class _DilatedConv2d(nn.Conv2d):
    """Convolution dilated so that its taps are as far apart in the image as on the coarse grid."""

    _attachment: Attachment

    def forward(self, input: Tensor) -> Tensor:
        ratio = self._attachment.ratio()
        if ratio == (1, 1):
            return super().forward(input)
        dilation = [own * times for own, times in zip(self.dilation, ratio, strict=True)]
        before, after = (
            [own * times for own, times in zip(side, ratio, strict=True)]
            for side in self._padding()
        )
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        if before != after or (mode != "constant" and any(before)):
            input = F.pad(input, (before[1], after[1], before[0], after[0]), mode=mode)
            before = [0, 0]
        return F.conv2d(input, self.weight, self.bias, 1, before, dilation, self.groups)

    def _padding(self) -> tuple[Sequence[int], Sequence[int]]:
        """Cells of the coarse grid by which the module pads (rows, columns), before and after."""
        if not isinstance(self.padding, str):
            return self.padding, self.padding
        if self.padding == "valid":
            return (0, 0), (0, 0)
        # An even kernel has no middle tap: "same" then pads one cell more after than before.
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        before = [both // 2 for both in total]
        return before, [both - one for both, one in zip(total, before, strict=True)]


class _SmallerUpsample(nn.Upsample):
    """Upsampling by the module's own factor divided by that of the attached upsampler."""

    _attachment: Attachment

    def forward(self, input: Tensor) -> Tensor:
        factor = self.scale_factor
        assert factor is not None
        factors = factor if isinstance(factor, tuple) else (factor, factor)
        sides = zip(input.shape[2:], factors, self._attachment.ratio(), strict=True)
        size = [max(round(side * factor / ratio), 1) for side, factor, ratio in sides]
        return F.interpolate(input, size=size, mode=self.mode, align_corners=self.align_corners)


def _kind_on_a_finer_grid(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that replaces a module on a finer grid; ``None`` for none."""
    if type(module) is nn.Conv2d and max(module.kernel_size) > 1 and max(module.stride) == 1:
        return _DilatedConv2d
    if type(module) is nn.Upsample and module.scale_factor is not None:
        return _SmallerUpsample
    return None


def _depends_on_the_grid(module: nn.Module) -> bool:
    """Return whether a module's receptive field in the image changes with the grid."""
    pools = nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.ConvTranspose2d, nn.Unfold, nn.PixelShuffle
    if isinstance(module, nn.Conv2d):
        return max(module.kernel_size) > 1 or max(module.stride) > 1
    return isinstance(module, pools)


def _thread() -> int:
    """Identifier of the calling thread; 0 for every thread while a graph is compiled."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _module(network: nn.Module, module: str | nn.Module, label: str) -> nn.Module:
    """Return the module with the given name, or the given module if it is in the network."""
    known = dict(network.named_modules())
    if isinstance(module, str):
        if module not in known:
            raise ValueError(unknown_name(label, module, [name for name in known if name]))
        return known[module]
    if not isinstance(module, nn.Module):
        raise TypeError(f"{label} is of type {type(module).__name__}; give a module or its name")
    if not any(module is other for other in known.values()):
        raise ValueError(f"{label} is a {type(module).__name__} that is not in the network")
    return module


def _refuse_attached(layer: nn.Module, head: nn.Module | None) -> None:
    """Refuse a layer that is upsampled already, and a head that is adapted to another's grid."""
    hooks = [getattr(hook, "__self__", None) for hook in layer._forward_hooks.values()]
    there = [one for one in hooks if isinstance(one, Attachment) and one.layer is layer]
    for module in () if head is None else head.modules():
        there += [module._attachment] if hasattr(module, "_attachment") else []
    if there:
        raise ValueError(f"there is an {there[0]} already; call its remove() first")


def _first_image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
            return value
    raise ValueError(
        "the network was called without an image (B, 3, H, W); say by guidance= how to get it from "
        "the arguments"
    )
