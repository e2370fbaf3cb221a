"""Fit implicit features to one image: the fast way, in closed form, or the published one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upfeat.backbones import Backbone, load_backbone
from upfeat.bounds import shown
from upfeat.images import read_image
from upfeat.implicit.anchors import fit_kernel
from upfeat.implicit.features import ImplicitFeatures, resize_image
from upfeat.implicit.fields import MOST_ANCHORS, Field
from upfeat.implicit.observe import Basis, Observer, feature_basis, zoomed_jitters
from upfeat.implicit.published import create_network_fit, train_network
from upfeat.randomness import stream
from upfeat.registry import unknown_name
from upfeat.settings import Number, Whole, check, documented, setting
from upfeat.views import sample_jitters, spread_jitters

if TYPE_CHECKING:
    from upfeat.images import ImageLike

PRESETS = ("fast", "reference")
_DEFAULT_SIZE = 224
_PCA_VIEWS = 50
_REPORT_EVERY = 50
_LEAST_VARIANCE = 1e-10
"""Of held-out features over their mean square: below, they vary by rounding alone."""
_MOST_ERROR = 1e3
"""Over that variance: the error of constant features, fitted to rounding, is small too."""


def _one_of(*known: str) -> Callable[[str, Any], str]:
    """A check of a name among a few."""

    def check_name(name: str, value: Any) -> str:
        if value not in known:
            listed = " or ".join(f'"{choice}"' for choice in known)
            raise ValueError(f"{name}={shown(value)} must be {listed}")
        return value

    return check_name


@documented
@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit."""

    preset: str = setting(
        "fast",
        "`fast`, a closed-form solution; or `reference`, the published recipe (FeatUp, section "
        "3.3), some hundred times slower",
        _one_of(*PRESETS),
    )
    size: int | None = setting(
        None,
        "length of the shorter side at which the image is fitted, pixels; `None` for its own, at "
        "most 224; the result can be drawn at any size",
        Whole(1, 1 << 14, optional=True),
    )
    seed: int = setting(0, "seed of all that is drawn at random", Whole(0, (1 << 63) - 1))
    views: int | None = setting(
        None,
        "jittered views to look at; `None` for at most 64 (fast: fewer where held-out views gain "
        "nothing, and the image itself besides) or 3000 (reference)",
        Whole(1, 1 << 20, optional=True),
    )
    zoomed_views: int = setting(
        48, "fast: magnified views, looked at beside those for their details", Whole(0, 1 << 16)
    )
    held_out: int = setting(
        32, "views that are never fitted, by which the fit is judged", Whole(1, 1 << 16)
    )
    components: int = setting(
        128,
        "principal components of the features in which the fit works",
        Whole(1, 1 << 15),
    )
    max_pad: float = setting(30, "reflected border of views, pixels", Number(0, 1 << 14))
    max_zoom: float = setting(1.8, "largest magnification of views", Number(1, 1e3))
    tolerance: float = setting(
        0.01,
        "fast: stop when twice the views lower the held-out loss by less than this fraction",
        Number(0, 1, below=True),
    )
    slack: float = setting(
        0.05,
        "fast: fraction of the held-out loss that may be given for a smoother map; the smoothest "
        "is what a one-pass upsampler draws, smoothness helps linear probes, and 0 gives the least "
        "held-out loss",
        Number(0, 1, below=True),
    )
    anchors: int = setting(1024, "fast: basis functions, at most", Whole(1, MOST_ANCHORS))
    steps: int = setting(1200, "reference: steps of NAdam", Whole())
    views_per_step: int = setting(10, "reference: views drawn for each step", Whole(1, 1 << 16))
    learning_rate: float = setting(2e-3, "reference: step size of NAdam", Number(0, 10, above=True))
    downsampler: str = setting(
        "attention", "reference: `attention` or `simple`", _one_of("attention", "simple")
    )

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a setting is out of its range.
        """
        check(self)

    @property
    def n_views(self) -> int:
        """Views to look at, at most."""
        if self.views is not None:
            return self.views
        return 64 if self.preset == "fast" else 3000


@dataclass(frozen=True)
class FitProgress:
    """How far a fit is.

    Attributes:
        done: units of work done.
        total: of all.
        held_out: loss on held-out views relative to a constant map's; ``None`` until known.
        features: what the fit has found so far, where that is new.
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
    """Fit a function of place and image to what a backbone sees in many views of one image.

    Args:
        image: a path, PIL image, array or tensor, as :func:`upfeat.images.read_image` takes them.
        backbone: a backbone, its name, or a module or function to wrap as one.
        config: settings; the fast preset by default.
        on_step: is told of progress.
        **settings: fields of :class:`FitConfig` that replace the configuration's, as ``size=64``.

    Returns:
        The features; ``facts["held_out"]`` is the loss on views that were never fitted, relative to
        that of a constant map.

    Raises:
        FileNotFoundError: there is no such image.
        ValueError: it cannot be read, is smaller than the backbone's stride, the backbone gives
            NaN or infinity, or there is no such setting.

    Source: FeatUp (Fu, Hamilton et al., ICLR 2024), section 3.3.
    """
    config = _change(config or FitConfig(), settings)
    network = load_backbone(backbone)
    pixels = read_image(image)
    shorter = min(pixels.shape[1:])
    if config.size is None and shorter < network.stride:
        raise ValueError(
            f"image is {shorter} pixels on its shorter side, less than the stride of "
            f"{network.name} ({network.stride}); give a larger one, or size={network.stride}"
        )
    size = default_size(shorter, network) if config.size is None else config.size
    shape = network.preprocess(pixels, size, align=True).shape[-2:]
    return fit_guidance(
        resize_image(pixels, (shape[0], shape[1])), network, config, on_step=on_step
    )


def default_size(shorter: int, backbone: Backbone) -> int:
    """The shorter side at which an image is fitted whose own is ``shorter`` pixels."""
    return min(shorter, max(_DEFAULT_SIZE, backbone.stride))


def _change(config: FitConfig, settings: dict[str, Any]) -> FitConfig:
    known = [field.name for field in fields(FitConfig)]
    for name in settings:
        if name not in known:
            raise ValueError(unknown_name("setting", name, known))
    return replace(config, **settings)


@torch.no_grad()
def fit_guidance(
    guidance: Tensor, backbone: Backbone, config: FitConfig, *, on_step: OnFit | None = None
) -> ImplicitFeatures:
    """Fit an image that already has its final size.

    Args:
        guidance: (3, H, W) uint8.
        backbone: in whatever mode it is; it is run in eval mode.
        config: settings; ``size`` plays no part.
        on_step: is told of progress.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        observer = Observer(
            guidance,
            backbone,
            held_out=config.held_out,
            max_pad=config.max_pad,
            max_zoom=config.max_zoom,
            seed=config.seed,
        )
        fit = _fit_fast if config.preset == "fast" else _fit_reference
        return fit(guidance, observer, config, on_step or (lambda progress: None))
    finally:
        backbone.train(was_training)


def _fit_fast(
    guidance: Tensor, observer: Observer, config: FitConfig, on_step: OnFit
) -> ImplicitFeatures:
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

    found: list[ImplicitFeatures] = []

    def tell_round(field: Field, basis: Basis, n: int) -> None:
        found[:] = [_assemble(field, basis, guidance, observer, config, n)]
        on_step(FitProgress(config.held_out + n, total, found[0].facts["held_out"], found[0]))

    fit_kernel(
        guidance,
        observer,
        views,
        zoomed,
        components=config.components,
        anchors=config.anchors,
        tolerance=config.tolerance,
        slack=config.slack,
        seed=config.seed,
        on_round=tell_round,
        on_views=lambda n: on_step(FitProgress(config.held_out + n, total)),
    )
    return found[0]


def _fit_reference(
    guidance: Tensor, observer: Observer, config: FitConfig, on_step: OnFit
) -> ImplicitFeatures:
    n = config.n_views
    views = sample_jitters(
        n,
        size=observer.size,
        max_pad=config.max_pad,
        max_zoom=config.max_zoom,
        generator=stream(config.seed, "views"),
    )
    total = config.held_out + n + config.steps
    first = views[slice(0, _PCA_VIEWS)]
    features = observer.observe(first)
    basis = feature_basis(features, config.components, whiten=False)
    targets = [basis.encode(features)]
    for start in range(_PCA_VIEWS, n, _PCA_VIEWS):
        on_step(FitProgress(config.held_out + start, total))
        targets.append(basis.encode(observer.observe(views[slice(start, start + _PCA_VIEWS)])))
    fit = create_network_fit(
        guidance,
        basis,
        stride=observer.backbone.stride,
        downsampler=config.downsampler,
        seed=config.seed,
    )

    def tell(step: int) -> None:
        found = None
        if step % _REPORT_EVERY == 0 and step < config.steps:
            fit.eval()
            found = _assemble(fit.field, basis, guidance, observer, config, n)
            fit.train()
        held_out = found.facts["held_out"] if found else None
        on_step(FitProgress(config.held_out + n + step, total, held_out, found))

    train_network(
        fit,
        views,
        torch.cat(targets),
        steps=config.steps,
        views_per_step=config.views_per_step,
        learning_rate=config.learning_rate,
        seed=config.seed,
        on_step=tell,
    )
    return _assemble(fit.field, basis, guidance, observer, config, n)


@torch.no_grad()
def _assemble(
    field: Field,
    basis: Basis,
    guidance: Tensor,
    observer: Observer,
    config: FitConfig,
    views: int,
) -> ImplicitFeatures:
    """Join the parts, judge them by the held-out views and write down where they come from.

    Raises:
        ValueError: there was too little to fit to, so that the features are not finite, or to judge
            by.
    """
    features = ImplicitFeatures(field, guidance, basis.components, basis.mean)
    loss, scale = observer.held_out_loss(features.render()), observer.held_out_variance
    cells = "×".join(map(str, observer.grid_size))
    if not math.isfinite(loss):
        raise ValueError(
            f"the fit to {views} views of {cells} cells is not finite; give more views "
            f"(views={config.views} now), or a larger size"
        )
    if scale < _LEAST_VARIANCE * observer.held_out_square and loss > _MOST_ERROR * scale:
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
        "held_out": loss / max(scale, 1e-12),
        "held_out_loss": loss,
    }
    features.facts.update(facts)
    return features
