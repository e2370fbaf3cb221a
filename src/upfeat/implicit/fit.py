"""Fits of implicit features to one image: the fast fit, in closed form, and the published fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upfeat import machine
from upfeat.alignment import align_for
from upfeat.backbones import Backbone, load_backbone
from upfeat.backbones.base import require_colours
from upfeat.bounds import check_callback
from upfeat.images import read_image
from upfeat.implicit.anchors import Fitted, fit_kernel
from upfeat.implicit.config import FitConfig
from upfeat.implicit.features import ImplicitFeatures, resize_image
from upfeat.implicit.observe import Observer, feature_basis, zoomed_jitters
from upfeat.implicit.one_pass import mean_upsampler, with_early_layers
from upfeat.implicit.published import create_network_fit, train_network
from upfeat.randomness import stream
from upfeat.registry import unknown_name
from upfeat.types import Size
from upfeat.views import sample_jitters, spread_jitters

if TYPE_CHECKING:
    from upfeat.images import ImageLike

_DEFAULT_SIZE = 224
_PCA_VIEWS = 50
_REPORT_EVERY = 50
_LEAST_VARIANCE = 1e-10
"""Variance of held-out features over their mean square below which they vary by rounding alone."""
_MOST_ERROR = 1e3
"""Held-out loss over the variance beyond which features that vary by rounding alone are refused: a
backbone whose features are truly constant is fitted to within rounding, and accepted."""

# Measured memory in bytes: per pixel of the image, and, in addition, per pixel and channel; per
# pair of anchors; and for an image of any size.
_FAST, _REFERENCE = 5200, 9000
_A_CHANNEL = 16
_A_PAIR = 60
_TABLES = 150 << 20


@dataclass(frozen=True)
class FitProgress:
    """Progress of a fit.

    Attributes:
        done: units of work done.
        total: units of work in all, at most.
        held_out: loss on held-out views relative to a constant map's; ``None`` until known.
        features: features fitted so far, where they are new, else ``None``.
    """

    done: int
    total: int
    held_out: float | None = None
    features: ImplicitFeatures | None = None


OnFit = Callable[[FitProgress], None]


def fit_implicit(
    image: ImageLike,
    backbone: str | Backbone | Callable[[Tensor], Tensor],
    config: FitConfig | None = None,
    *,
    on_step: OnFit | None = None,
    **settings: Any,
) -> ImplicitFeatures:
    """Fit a function of place and image content to a backbone's features of many views of an image.

    Args:
        image: a path, PIL image, array or tensor, as for :func:`upfeat.images.read_image`.
        backbone: a backbone, the name of a backbone, or a module or function to wrap as a backbone.
        config: settings of the fit; ``None`` for the fast preset.
        on_step: called with the progress of the fit.
        **settings: fields of :class:`FitConfig`, such as ``size=64``, that replace those of
            ``config``.

    Returns:
        The features; ``facts["held_out"]`` is the loss on the held-out views, which were never
        fitted, relative to the loss of a constant map.

    Raises:
        FileNotFoundError: there is no such image.
        TypeError: ``config`` is not a :class:`FitConfig`, or ``on_step`` no function.
        ValueError: the image cannot be read, is smaller than the backbone's stride or does not fit
            into memory, there is no such setting, the backbone gives NaN or infinity, or the views
            are too few to fit to.

    Source: FeatUp (Fu, Hamilton et al., ICLR 2024), section 3.3.
    """
    config = FitConfig() if config is None else config
    if not isinstance(config, FitConfig):
        raise TypeError(
            f"config is of type {type(config).__name__}; give a FitConfig, or its fields by name, "
            "as size=160"
        )
    config = _change(config, settings)
    check_callback("on_step", on_step)
    network = load_backbone(backbone)
    require_colours(network, "a fit")
    pixels = read_image(image)
    shorter = min(pixels.shape[1:])
    if config.size is None and shorter < network.stride:
        raise ValueError(
            f"image is {shorter} pixels on its shorter side, less than the stride of "
            f"{network.name} ({network.stride}); give a larger one, or size={network.stride}"
        )
    check_memory("image", (pixels.shape[1], pixels.shape[2]), network, config)
    size = default_size(shorter, network) if config.size is None else config.size
    shape = network.preprocess(pixels, size, align=True).shape[-2:]
    return fit_guidance(
        resize_image(pixels, (shape[0], shape[1])), network, config, on_step=on_step
    )


def default_size(shorter: int, backbone: Backbone) -> int:
    """Return the shorter side, pixels, at which to fit an image of shorter side ``shorter``."""
    return min(shorter, max(_DEFAULT_SIZE, backbone.stride))


def check_memory(label: object, own: Size, backbone: Backbone, config: FitConfig) -> None:
    """Refuse an image whose fit would not fit into memory.

    Args:
        label: name of the image, for error messages.
        own: (height, width) of the image, pixels.
        backbone: the backbone of the fit.
        config: settings of the fit.

    Raises:
        ValueError: memory does not suffice; the message names a size for which it does.
    """
    size = default_size(min(own), backbone) if config.size is None else config.size
    fast = config.preset == "fast"
    a_pixel = (_FAST if fast else _REFERENCE) + _A_CHANNEL * backbone.embed_dim
    fixed = _TABLES + (_A_PAIR * config.anchors**2 if fast else 0)
    if not fast:  # the coordinates of all views, float32, twice while they are joined
        width = min(config.components, backbone.embed_dim)
        a_pixel += 8 * config.n_views * width / backbone.stride**2
    if fast and config.anchors > FitConfig.anchors:
        label = f"{label}, anchors={config.anchors}"
    machine.check_fits(label, own, size, a_pixel, fixed=fixed)


def _change(config: FitConfig, settings: dict[str, Any]) -> FitConfig:
    known = [field.name for field in fields(FitConfig)]
    for name in settings:
        if name not in known:
            raise ValueError(unknown_name("setting", name, known))
    return replace(config, **settings)


@torch.inference_mode(False)  # the published fit needs gradients, and results may be trained on
def fit_guidance(
    guidance: Tensor, backbone: Backbone, config: FitConfig, *, on_step: OnFit | None = None
) -> ImplicitFeatures:
    """Fit an image that already has the size of the fit.

    Args:
        guidance: (3, H, W) uint8, the image.
        backbone: extracts the features; it is run in eval mode, and its mode is then restored.
        config: settings of the fit; ``size`` is ignored.
        on_step: called with the progress of the fit.
    """
    features = None
    # The regressions lose too many digits in the precision of autocast.
    exact = [torch.autocast(kind, enabled=False) for kind in ("cpu", backbone.mean.device.type)]
    with exact[0], exact[1]:
        for progress in fit_rounds(guidance, backbone, config):
            features = progress.features
            if on_step is not None:
                on_step(progress)
    assert features is not None, "the last round has the result"
    return features


@torch.no_grad()
def fit_rounds(guidance: Tensor, backbone: Backbone, config: FitConfig) -> Iterator[FitProgress]:
    """Fit an image round by round; the features of the last round are the result.

    Args:
        guidance: (3, H, W) uint8, the image.
        backbone: extracts the features; it is run in eval mode, and its mode is then restored.
        config: settings of the fit; ``size`` is ignored.

    Yields:
        Progress, with features whenever there are new ones.
    """
    was_training = backbone.training
    backbone.eval()
    observed = backbone
    if config.preset == "fast":  # the published fit has no mean
        observed = with_early_layers(align_for(mean_upsampler(backbone), backbone))
    try:
        observer = Observer(
            guidance,
            observed,
            held_out=config.held_out,
            max_pad=config.max_pad,
            max_zoom=config.max_zoom,
            seed=config.seed,
        )
        fit = _fit_fast if config.preset == "fast" else _fit_reference
        yield from fit(guidance, observer, config)
    finally:
        backbone.train(was_training)


def _fit_fast(guidance: Tensor, observer: Observer, config: FitConfig) -> Iterator[FitProgress]:
    total = config.held_out + 1 + config.n_views + config.zoomed_views
    views = spread_jitters(
        config.n_views,
        size=observer.size,
        max_pad=config.max_pad,
        max_zoom=config.max_zoom,
        generator=stream(config.seed, "views"),
    )
    zoomed = zoomed_jitters(
        config.zoomed_views, size=observer.size, generator=stream(config.seed, "zoomed views")
    )
    for done, fitted in fit_kernel(guidance, observer, views, zoomed, config):
        progress = FitProgress(config.held_out + done, total)
        if fitted is not None:
            features = _assemble(fitted, guidance, observer, config, done)
            progress = replace(progress, held_out=features.facts["held_out"], features=features)
        yield progress


def _fit_reference(
    guidance: Tensor, observer: Observer, config: FitConfig
) -> Iterator[FitProgress]:
    n = config.n_views
    views = sample_jitters(
        n,
        size=observer.size,
        max_pad=config.max_pad,
        max_zoom=config.max_zoom,
        generator=stream(config.seed, "views"),
    )
    total = config.held_out + n + config.steps
    features = observer.observe(views[slice(0, _PCA_VIEWS)])
    basis = feature_basis(features, config.components, whiten=False)
    targets = [basis.encode(features)]
    for start in range(_PCA_VIEWS, n, _PCA_VIEWS):
        yield FitProgress(config.held_out + start, total)
        targets.append(basis.encode(observer.observe(views[slice(start, start + _PCA_VIEWS)])))
    fit = create_network_fit(
        guidance,
        basis,
        stride=observer.backbone.stride,
        downsampler=config.downsampler,
        seed=config.seed,
    )
    steps = train_network(
        fit,
        views,
        torch.cat(targets),
        steps=config.steps,
        views_per_step=config.views_per_step,
        learning_rate=config.learning_rate,
        seed=config.seed,
    )
    for step in steps:
        progress = FitProgress(config.held_out + n + step, total)
        if step % _REPORT_EVERY == 0 or step == config.steps:
            fit.eval()
            drawn = _assemble(Fitted(fit.field, basis), guidance, observer, config, n)
            if step < config.steps:
                fit.train()
            progress = replace(progress, held_out=drawn.facts["held_out"], features=drawn)
        yield progress


@torch.no_grad()
def _assemble(
    fitted: Fitted, guidance: Tensor, observer: Observer, config: FitConfig, views: int
) -> ImplicitFeatures:
    """Assemble features, compute their held-out loss and record their provenance.

    Raises:
        ValueError: there were too few views to fit to, so that the features are not finite, or the
            held-out features do not vary, so that they cannot judge the fit.
    """
    basis = fitted.basis
    features = ImplicitFeatures(fitted.field, guidance, basis.components, basis.mean)
    drawn = features.render(fitted.map_size)
    loss, scale = observer.held_out_loss(drawn), observer.held_out_variance
    rounding = _LEAST_VARIANCE * observer.held_out_square
    cells = "×".join(map(str, observer.grid_size))
    if not math.isfinite(loss):
        raise ValueError(
            f"the fit to {views} views of {cells} cells is not finite; give more views "
            f"(views={config.views} now), or a larger size"
        )
    if scale < rounding and loss > _MOST_ERROR * scale:
        raise ValueError(
            f"the features of {config.held_out} held-out views of {cells} cells do not vary, so "
            "there is nothing to judge the fit by; give more (held_out=), or a larger size"
        )
    facts: dict[str, Any] = {
        "backbone": observer.backbone.name,
        "stride": observer.backbone.stride,
        "preset": config.preset,
        "seed": config.seed,
        "views": views,
        "held_out": loss / (max(scale, rounding) or 1e-12),
        "held_out_loss": loss,
    }
    if config.preset == "fast":
        facts |= {"share": config.share, "translation": config.translation}
    if fitted.passes is not None:
        facts["passes"] = fitted.passes
    features.facts.update(facts)
    return features
