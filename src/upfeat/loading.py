"""Loading a backbone with its best upsampler, for one pass or several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upfeat.alignment import align_for
from upfeat.backbones import Backbone, load_backbone
from upfeat.backbones.efficientnet_lite import EfficientNetLite
from upfeat.bounds import PASSES, flag, one_of
from upfeat.guided import early_by_default, has_layers_at_both_sizes
from upfeat.machine import find_device, parse_memory
from upfeat.mirrored import Mirrored
from upfeat.model import FeatUp
from upfeat.scales import FINER_WEIGHTS, SecondScale
from upfeat.translation import Translation
from upfeat.upsamplers import DetailUpsampler, Upsampler, create_upsampler
from upfeat.upsamplers.pretrained import DEFAULT_UPSAMPLER, trained_for_early

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEFAULT_BACKBONE = "efficientnet_lite0"


def default_upsampler(backbone: Backbone, *, early: bool | None = None) -> str:
    """Return the name of the best upsampler for a backbone, as :func:`load` chooses it.

    Args:
        backbone: the backbone.
        early: False for none that was trained on early layers.

    Returns:
        A name for :func:`upfeat.upsamplers.create_upsampler`, to be given with the backbone's name.
    """
    trained = None if early is False else trained_for_early(backbone.name)
    # A model of one's own may have the name of an embedded backbone, and other layers.
    known = isinstance(backbone.origin, EfficientNetLite)
    return trained if trained is not None and known else DEFAULT_UPSAMPLER


def load(
    name: str | Backbone | Callable[[Tensor], Tensor] = DEFAULT_BACKBONE,
    *,
    upsampler: str | Path | Upsampler | None = None,
    device: str | torch.device | None = None,
    bands: Sequence[int] | None = None,
    passes: int = 1,
    early: bool | None = None,
    max_memory: int | str | None = None,
    translation: Translation | str | Path | None = None,
) -> FeatUp:
    """Load a backbone with an upsampler, in eval mode and frozen.

    Args:
        name: name of a backbone, or a model, as :func:`upfeat.load_backbone` accepts them: one of
            ``upfeat.list_backbones()``, ``"timm:NAME"``, ``"hf:ID-OR-FOLDER"``, a model of the timm
            or transformers library, or any module or function from images to features. A module's
            parameters are frozen in place. For options, such as a layer, call
            :func:`upfeat.load_backbone` and pass its result.
        upsampler: one of ``upfeat.list_upsamplers()``, a folder that ``save_pretrained`` wrote, a
            published FeatUp checkpoint (``.ckpt``), or an :class:`Upsampler`; ``None`` for the best
            upsampler for the backbone: one trained on its early layers, as for EfficientNet-Lite0
            and Lite1, else detail, trained for it or universal, with early layers.
        device: device of the model's parameters; ``None`` for the CPU.
        bands: see :class:`FeatUp`.
        passes: cost of the features, in passes of the backbone over the image. 2: its features and
            those of the mirror image are averaged (:class:`upfeat.mirrored.Mirrored`). 5: it is
            also applied to the image at √3 times its sides (:class:`upfeat.scales.SecondScale`),
            and ``model.backbone`` has half the stride. Early layers of the backbone's own are used
            at both sizes, and the stride is a quarter; those of the guide follow, at half the
            stride. 8: also to the mirror image of the enlarged one.
        early: whether the upsampler also gets features of early layers, on a finer grid. True: the
            backbone's own if it returns any, as convolutional networks do; otherwise, as for
            transformers, those of the embedded EfficientNet-Lite0, which then sees the image too;
            the regression of a detail upsampler uses them. False: no, and ``upsampler=None``
            chooses none that was trained on them; one that is named gets them even so. ``None``:
            with ``upsampler=None``, wherever they are to be had; with a named one, only if it was
            trained on them. Maps of :meth:`FeatUp.lazy` contain and save the early layers.
        max_memory: see :class:`FeatUp`.
        translation: for ``passes=5`` and 8: the translation learnt for this backbone by
            :func:`upfeat.scales.fit_translation`, or a file of it; ``None`` for the shipped
            translation, or, if the package has none for the backbone, a translation of each image
            learnt from its own cells.

    Raises:
        FileNotFoundError: ``upsampler`` is a path that does not exist.
        ValueError: there is no such backbone or upsampler (close names are suggested), the model's
            output is not a feature map, the device does not exist, or an option does not fit the
            others.

    Example:
        >>> model = load("efficientnet_lite0", upsampler="bilinear")
        >>> model(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 112, 64, 96])
    """
    network = load_backbone(name)
    passes = one_of("passes", passes, PASSES)
    if early is None and upsampler is None:
        early = early_by_default(network, bands, passes)
    wanted = False if early is None else flag("early", early)
    if passes in (1, 2):
        if translation is not None:
            raise ValueError(
                f"translation is for passes=5 and 8; with passes={passes} there is nothing for it"
            )
        if not isinstance(upsampler, Upsampler):
            if upsampler is None:
                upsampler = default_upsampler(network, early=early)
            upsampler = create_upsampler(upsampler, network.embed_dim, backbone=network.name)
        network = Mirrored(network) if passes == 2 else network
        model = FeatUp(network, upsampler, bands=bands, early=wanted)
    else:
        every = passes == 8
        model = _two_scales(network, upsampler, bands, translation, early=early, mirrored=every)
    model.max_memory = None if max_memory is None else parse_memory(max_memory)
    return model if device is None else model.to(find_device(device))


def _two_scales(
    network: Backbone,
    upsampler: str | Path | Upsampler | None,
    bands: Sequence[int] | None,
    translation: Translation | str | Path | None,
    *,
    early: bool | None,
    mirrored: bool,
) -> FeatUp:
    """Make a model whose backbone is applied to the image at two scales."""
    if isinstance(translation, str | Path):
        translation = Translation.load(translation, network)
    if not isinstance(upsampler, Upsampler):
        if upsampler is None:
            name = default_upsampler(network, early=early)
            upsampler = FINER_WEIGHTS if name == DEFAULT_UPSAMPLER else name
        upsampler = create_upsampler(upsampler, network.embed_dim, backbone=network.name)
    steps = upsampler if isinstance(upsampler, DetailUpsampler) else None
    network = align_for(upsampler, network)
    layers = steps is not None and (
        steps.wants_hidden or (bool(early) and has_layers_at_both_sizes(network))
    )
    scales = SecondScale(
        network, steps, bands=bands, translation=translation, mirrored=mirrored, early=layers
    )
    if steps is None or (early and not layers):  # a guide helps both steps, from the finer grid on
        return FeatUp(scales, upsampler, bands=bands, early=bool(early))
    return FeatUp(scales, steps.last_step(), bands=bands)
