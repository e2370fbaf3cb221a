"""Wrapper that makes a backbone from any module or function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upfeat.backbones import probing, sizes
from upfeat.backbones.base import Backbone
from upfeat.backbones.held import (
    COLOURS,
    first_tensor,
    held_modules,
    input_channels,
    plain_name,
    refuse_meta,
    settle_mode,
)
from upfeat.backbones.inside import LayerFeatures, outputs_inside
from upfeat.backbones.outputs import LAYOUTS, Layer, NothingToPick, missing_layer
from upfeat.backbones.settings import Settings, settings_of
from upfeat.bounds import shown, whole
from upfeat.types import Size

_LOG = logging.getLogger("upfeat.backbones")

_FAILURES = ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError
"""Errors of modules that do not take an image of some size; ``ValueError`` explains itself."""


class WrappedBackbone(Backbone):
    """A backbone made from any module or function that computes features of images.

    The module may return (B, C, h, w), (B, h, w, C), tokens (B, N, C) with or without class and
    register tokens, or a list, tuple or dictionary of these. The layout of its output, the number
    of channels, the pixels per cell and the image sizes that it takes are measured on blank images.

    The module, or every module that a function uses, is put in eval mode and stays in it, so that
    batch statistics and dropout are fixed. Parameters keep their ``requires_grad``.
    """

    def __init__(
        self,
        module: Callable[[Tensor], Any],
        *,
        name: str | None = None,
        embed_dim: int | None = None,
        stride: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        layer: Layer | Sequence[Layer] | None = None,
        layout: str | None = None,
        prefix_tokens: int | None = None,
        in_channels: int | None = None,
        input_size: int | None = None,
        probe_size: int | None = None,
        fit: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Wrap a module or function.

        Args:
            module: function from a normalised image (B, 3, H, W) to features.
            name: name of the backbone in provenance and messages; ``None`` for the name of the
                class or function.
            embed_dim: number of channels; ``None`` to measure it.
            stride: pixels per cell; ``None`` to measure it.
            mean: mean that the module expects images to be normalised by, RGB in [0, 1]; ``None``
                to read it from a configuration inside the module, or failing that, ImageNet's (no
                normalisation for images of other than three bands).
            std: standard deviation that the module expects images to be normalised by; ``None``
                as for ``mean``.
            layer: number or key of one of several outputs; for a module with one output, the name
                of a module inside, such as ``"layer4"``. The outputs of a list of layers are
                concatenated.
            layout: ``"NCHW"``, ``"NHWC"`` or ``"tokens"``; ``None`` to infer it from shapes.
            prefix_tokens: number of class and register tokens before the cells' tokens; ``None`` to
                infer it.
            in_channels: bands of the images that the module takes; ``None`` for the input channels
                of its first convolution, or 3 without one, or if it does not take such images.
            input_size: side of the images that the module was made for, pixels; ``None`` to try
                common sizes.
            probe_size: side of the blank images, pixels; an alias of ``input_size``.
            fit: treatment of images by a module that takes one size only: ``"tile"`` (the default)
                covers larger images with overlapping windows of that size and enlarges smaller
                images; ``"resize"`` resizes every image to it.
            settings: image settings that a library's reader supplies; ``None`` to read them from
                the modules inside.

        Raises:
            TypeError: ``module`` cannot be called, for example a name.
            ValueError: the module's output is no feature map, its stride is no whole number, or it
                takes none of the sizes tried; the message names the fix.
        """
        if not callable(module):
            raise TypeError(
                f"module is of type {type(module).__name__}; give a module or a function, or a "
                "name to load_backbone()"
            )
        if layout is not None and layout not in LAYOUTS:
            raise ValueError(f"layout={shown(layout)} must be one of {', '.join(LAYOUTS)}")
        if fit is not None and fit not in sizes.FITS:
            raise ValueError(f"fit={shown(fit)} must be one of {', '.join(sizes.FITS)}")
        if name is not None and not isinstance(name, str):
            raise ValueError(f"name={shown(name)} must be a text")
        embed_dim = whole("embed_dim", embed_dim, optional=True)
        stride = whole("stride", stride, optional=True)
        in_channels = whole("in_channels", in_channels, 1, 1 << 12, optional=True)
        input_size = whole("input_size", input_size, 1, 1 << 14, optional=True)
        probe_size = whole("probe_size", probe_size, 1, 1 << 14, optional=True)
        prefix_tokens = whole("prefix_tokens", prefix_tokens, 0, optional=True)
        module_name = getattr(module, "__name__", None) or plain_name(module)
        held = held_modules(module)
        refuse_meta(module_name, [module, *held])
        settle_mode(module_name, module, held)
        settings = settings or settings_of(module if isinstance(module, nn.Module) else held)
        layers = as_list(layer)
        if isinstance(module, nn.Module) and layers and _names_inside(module, layers):
            module = LayerFeatures(module, [str(one) for one in layers])
            layers = list(range(len(layers))) if len(layers) > 1 else None
        question = probing.Question(
            module,
            name or module_name,
            first_tensor(module, held),
            layers=layers,
            layout=layout,
            prefix_tokens=settings.prefix_tokens if prefix_tokens is None else prefix_tokens,
            stride=stride,
            sizes=_sizes(input_size or probe_size, settings),
            channels=in_channels or input_channels([module, *held]),
        )
        try:
            question, answer = _probe(question, certain=in_channels is not None)
        except NothingToPick as error:
            raise _no_such_module(question.name, module, layers) or error from None
        if embed_dim not in (None, answer.embed_dim):
            raise ValueError(
                f"{question.name}: embed_dim={embed_dim} was given, but its features have "
                f"{answer.embed_dim} channels; leave it out"
            )
        settings = settings.for_channels(question.channels)
        super().__init__(
            name=name or module_name,
            embed_dim=answer.embed_dim,
            stride=stride or answer.stride,
            mean=settings.mean if mean is None else mean,
            std=settings.std if std is None else std,
            interpolation=settings.interpolation,
            in_channels=question.channels,
        )
        self.module = module
        self.held = nn.ModuleList([] if isinstance(module, nn.Module) else held)
        self.answer, self.layers = answer, layers
        self.fit = _choose_fit(self.name, fit, answer)
        self._earlier: str | None = None
        if not isinstance(module, nn.Module):
            self._check_independence()

    @property
    def input_size(self) -> Size | None:
        """Only image size, (height, width) in pixels, that the model takes; ``None`` for any."""
        return self.answer.size if self.fit in ("tile", "resize") else None

    @property
    def step(self) -> int:
        """See :attr:`Backbone.step`."""
        return max(self.answer.multiple // self.stride, 1)

    def train(self, mode: bool = True) -> WrappedBackbone:
        """Set the mode of this wrapper; the wrapped module stays in eval mode."""
        super().train(mode)
        for module in (self.module, self.held):
            if isinstance(module, nn.Module):
                module.eval()
        return self

    def grid_size(self, size: Size) -> Size:
        """See :meth:`Backbone.grid_size`."""
        aligned = self.grid_aligned(size)
        if self.fit == "resize":
            aligned = self.answer.size
        elif self.fit == "tile":
            aligned = sizes.tiled_size(aligned, self.answer.size, self.stride)
        return aligned[0] // self.stride, aligned[1] // self.stride

    def extract(self, x: Tensor) -> Tensor:
        """See :meth:`Backbone.extract`.

        Raises:
            ValueError: the module fails on an image of this size.
        """
        try:
            return self._extract_fitted(x)
        except _FAILURES as error:
            if isinstance(error, torch.OutOfMemoryError) or torch.compiler.is_compiling():
                raise
            reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
            raise ValueError(
                f"{self.name} fails on an image of {x.shape[2]}×{x.shape[3]}, {x.dtype} "
                f'({type(error).__name__}: {reason}); if it takes some sizes only, give fit="tile"'
            ) from error

    def extract_with_hidden(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Backbone.extract_with_hidden`.

        The early layer is a module that returns a map (B, D, 2h, 2w) where the features are
        (B, C, h, w), typically a stage of a convolutional network: of all such modules the least
        nested, and of these the last. The first call searches for it. A model that returns tokens,
        or whose images are padded, tiled or resized, has no early layer.
        """
        plain = self.fit == "interpolate" and not self.answer.padding
        if not isinstance(self.module, nn.Module) or not plain:
            return self.extract(x), None
        if x.shape[2] % self.answer.multiple or x.shape[3] % self.answer.multiple:
            return self.extract(x), None
        names = None if self._earlier is None else [self._earlier]
        features, maps = outputs_inside(self.module, lambda: self.extract(x), names)
        finer = (2 * features.shape[2], 2 * features.shape[3])
        fitting = [name for name, one in maps.items() if tuple(one.shape[2:]) == finer]
        if not fitting:
            return features, None
        depth = min(name.count(".") for name in fitting)
        self._earlier = [name for name in fitting if name.count(".") == depth][-1]
        return features, maps[self._earlier]

    def _extract_fitted(self, x: Tensor) -> Tensor:
        """Compute features of an image of any size, tiled or resized for the model if need be."""
        if self.fit == "resize":
            return self._extract(sizes.resize(x, self.answer.size))
        if self.fit == "tile":
            window = self.answer.size
            image = (x.shape[2], x.shape[3])
            x = sizes.resize(x, sizes.tiled_size(image, window, self.stride))
            return sizes.tiles(self._extract, x, window, self.stride)
        return self._extract(x)

    def _extract(self, x: Tensor) -> Tensor:
        """Compute features of an image of a size that the model takes, after padding."""
        answer, stride = self.answer, self.stride
        height, width = x.shape[2], x.shape[3]
        if answer.padding:
            before, after = answer.padding // 2, answer.padding - answer.padding // 2
            x = F.pad(x, (before, after, before, after), mode="replicate")
        down, across = -height % answer.multiple, -width % answer.multiple
        if down or across:
            x = F.pad(x, (0, across, 0, down), mode="replicate")
        question = probing.Question(self.module, self.name, x, layers=self.layers)
        features = probing.read(question, answer.layouts, x)
        features = features[:, :, : features.shape[2] - down // stride]
        features = features[:, :, :, : features.shape[3] - across // stride]
        expected = (self.embed_dim, height // stride, width // stride)
        if tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"{self.name} returned {tuple(features.shape[1:])} for an image of "
                f"{height}×{width}, not {expected}; check its embed_dim and stride"
            )
        return features

    @torch.no_grad()
    def _check_independence(self) -> None:
        """Warn if a function's features of an image depend on its batch or on chance."""
        height, width = self.answer.size
        draw = torch.Generator().manual_seed(0)
        like = first_tensor(self.module, list(self.held))
        size = (2, self.in_channels, height, width)
        pair = torch.rand(size, generator=draw, device="cpu").sub_(0.5).mul_(4).to(like)
        pair[1] *= 3
        with torch.random.fork_rng(devices=[]):
            alone, again = self._extract(pair[:1]), self._extract(pair[:1])
            try:
                together = self._extract(pair)[:1]
            except Exception:  # the function takes one image at a time
                together = alone
        scale = float(alone.abs().max()) or 1.0
        for other, reason in ((again, "two calls differ"), (together, "they depend on the batch")):
            error = float((other - alone).abs().max()) / scale
            if error > max(1e-3, 8 * torch.finfo(alone.dtype).eps):
                _LOG.warning(
                    "%s: features of one image are not always the same (%s, by %.0f %%): a module "
                    "inside is in train mode; call its eval()",
                    *(self.name, reason, 100 * error),
                )
                return


def as_list(layer: Layer | Sequence[Layer] | None) -> list[Layer] | None:
    """Return one layer or several as a list; ``None``, for the last layer, stays ``None``.

    Raises:
        ValueError: the list is empty, or contains something other than numbers and names.
    """
    layer = _plain(layer)
    if isinstance(layer, Sequence) and not isinstance(layer, (str, bytes)):
        layer = [_plain(one) for one in layer]
    if layer is None or isinstance(layer, (int, str)):
        return None if layer is None else [layer]
    one_each = isinstance(layer, Sequence) and all(isinstance(one, (int, str)) for one in layer)
    if not one_each or isinstance(layer, bytes):
        raise ValueError(f"layer={shown(layer)} must be a number or a name, or a list of them")
    if not len(layer):
        raise ValueError("layer=[] is empty; give numbers or names, or None for the last")
    return list(layer)


def _plain(layer: Any) -> Any:
    """Return numbers and arrays of NumPy as Python's."""
    return layer.tolist() if hasattr(layer, "tolist") else layer


def _choose_fit(name: str, fit: str | None, answer: probing.Answer) -> str:
    """Choose the treatment of images of other sizes; warn if the model takes one size only."""
    if answer.any_size and fit in (None, "interpolate"):
        return "interpolate"
    if fit == "interpolate":
        raise ValueError(
            f'{name} takes images of {answer.size[0]}×{answer.size[1]} only: fit="interpolate" is '
            'not possible; give fit="tile" or fit="resize"'
        )
    chosen = fit or "tile"
    if answer.size[0] % answer.stride:
        raise ValueError(
            f"{name} takes images of {answer.size[0]}×{answer.size[1]} only, which its stride "
            f"{answer.stride} does not divide; give an input_size= that it divides"
        )
    if not answer.any_size:
        how = {"tile": "is covered by overlapping tiles", "resize": "is resized to that"}[chosen]
        other = "resize" if chosen == "tile" else "tile"
        _LOG.warning(
            '%s takes images of %d×%d only: any other %s (fit="%s"; fit="%s" is the other way)',
            *(name, *answer.size, how, chosen, other),
        )
    return chosen


def _probe(question: probing.Question, *, certain: bool) -> tuple[probing.Question, probing.Answer]:
    """Probe a module, with 3 bands too if the number of bands is not certain and does not fit.

    A module may rearrange the image, blocks of pixels to channels, before its first convolution.
    """
    try:
        return question, probing.probe(question)
    except ValueError:
        if certain or question.channels == COLOURS:
            raise
        colours = replace(question, channels=COLOURS)
        try:
            return colours, probing.probe(colours)
        except ValueError:
            pass
        raise


def _no_such_module(name: str, module: object, layers: Sequence[Layer] | None) -> ValueError | None:
    """Return the error for a layer whose name is no module inside; ``None`` without such a name."""
    names = [one for one, _ in module.named_modules()] if isinstance(module, nn.Module) else []
    wrong = next((one for one in layers or () if isinstance(one, str) and one not in names), None)
    return None if wrong is None else ValueError(f"{name}: {missing_layer(wrong, names[1:])}")


def _names_inside(module: nn.Module, layers: Sequence[Layer]) -> bool:
    names = dict(module.named_modules())
    return all(isinstance(layer, str) and layer in names for layer in layers)


def _sizes(given: int | None, settings: Settings) -> list[Size]:
    """List the sizes to try first: the given size and the configured size, cut to whole patches."""
    own = settings.input_size
    if own is not None:
        own = max(own - own % settings.patch_size, settings.patch_size)
    return [(side, side) for side in (given, own) if side]
