"""Size and normalisation of a model's images, read from the model's configuration."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from upfeat.bounds import number
from upfeat.normalization import HALF, IMAGENET, Colour, Normalization, check_normalization

_LOG = logging.getLogger("upfeat.backbones")

OPENAI = Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Normalisation of CLIP."""

_NONE = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# Normalisation by the model type of transformers, where a processor's configuration has none.
# Some models normalise images themselves (RADIO, Gemma 4).
_TYPES = {
    OPENAI: "clip altclip chinese_clip metaclip_2 aimv2 mlcd blip blip_2 instructblip git owlvit "
    "owlv2 pixtral qwen2_vl qwen2_5_vl glm4v glm4v_moe",
    HALF: "siglip siglip2 vit beit sam3 idefics2 idefics3 smolvlm llama4 qwen3_vl "
    "qwen3_vl_moe qwen3_5 qwen3_5_moe",
    _NONE: "mobilevit mobilevitv2 glpn swin2sr tipsv2 radio gemma4",
}
_BY_TYPE = {kind: values for values, kinds in _TYPES.items() for kind in kinds.split()}
# Buffers by which modules normalise images themselves.
_MEANS = ("norm_mean", "pixel_mean", "image_mean")
_BLUE_FIRST = ("mobilevit", "mobilevitv2")

# Pillow's numbers of resampling filters, which configurations of processors contain.
_FILTERS = {2: "bilinear", 3: "bicubic"}


class Settings(NamedTuple):
    """Properties of the images that a model expects."""

    mean: Colour = IMAGENET.mean
    std: Colour = IMAGENET.std
    interpolation: str = "bicubic"
    """Filter for resizing."""
    input_size: int | None = None
    """Side of the images that the model was trained with, pixels."""
    prefix_tokens: int | None = None
    """Number of class and register tokens; ``None`` if unknown."""
    patch_size: int = 1
    """Pixels; the sides of images must be multiples of this number."""
    blue_first: bool = False
    """Reversed channels: blue, green, red. Mean and deviation are of red, green, blue."""

    def for_channels(self, channels: int) -> Settings:
        """Return settings for images of ``channels`` bands.

        If mean and standard deviation are of another number of bands, images are not normalised.
        """
        if len(self.mean) == channels:
            return self
        return self._replace(mean=(0.0,) * channels, std=(1.0,) * channels)


def settings_of(modules: nn.Module | Iterable[nn.Module]) -> Settings:
    """Read settings from the configurations of modules and of the modules inside them.

    Args:
        modules: one module or several.

    Returns:
        The first settings found; the defaults, with ImageNet's normalisation, if no module has a
        configuration or their normalisations differ.
    """
    tops = [modules] if isinstance(modules, nn.Module) else list(modules)
    found: list[Settings] = []
    for top in tops:
        for module in top.modules():
            settings = _own_settings(module)
            if settings is not None and settings not in found:
                found.append(settings)
    if len({(one.mean, one.std) for one in found}) > 1:
        _LOG.warning(
            "the module holds models of different normalisations; ImageNet's is taken: give mean= "
            "and std= if it is another"
        )
        return Settings()
    return found[0] if found else _self_normalised(tops)


def _self_normalised(tops: Iterable[nn.Module]) -> Settings:
    """Return settings without normalisation for a module that normalises images itself.

    Such modules, as RADIO, hold the mean and deviation as buffers, in [0, 1] or in [0, 255].
    """
    buffers = {name: one for top in tops for name, one in top.named_buffers()}
    for name, mean in buffers.items():
        if name.rpartition(".")[2] in _MEANS and mean.numel() == 3:
            scale = 255.0 if float(mean.max()) > 1 else 1.0
            _LOG.warning(
                "the module holds %s: images from 0 to %d are given, for it to normalise; give "
                "mean= and std= if it does not",
                *(name, scale),
            )
            return Settings((0.0,) * 3, (1 / scale,) * 3)
    return Settings()


def _own_settings(module: nn.Module) -> Settings | None:
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(module, attribute, None)
        if isinstance(config, Mapping) and "mean" in config:
            return timm_settings(config)
    if isinstance(own := getattr(module, "normalization", None), Normalization):  # a Backbone
        return Settings(*own, getattr(module, "interpolation", "bicubic"))
    config = getattr(module, "config", None)
    if hasattr(config, "model_type") and hasattr(config, "to_dict"):
        return transformers_settings(config)
    return None


def timm_settings(config: Mapping[str, Any]) -> Settings:
    """Read image size, normalisation and interpolation from a configuration of timm."""
    mean, std = (tuple(map(float, config[label])) for label in ("mean", "std"))
    size = config.get("input_size")
    interpolation = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
    return Settings(mean, std, interpolation, int(max(size[1:])) if size else None)


def transformers_settings(config: Any, processor: Mapping[str, Any] | None = None) -> Settings:
    """Read image size, normalisation and interpolation of a transformers model.

    Args:
        config: configuration of the model.
        processor: configuration of its image processor, as a dictionary; ``None`` to take the
            usual normalisation of the model's type.
    """
    size = getattr(config, "image_size", None)
    if isinstance(size, (list, tuple)):
        size = max(size) if size else None
    size = int(size) if isinstance(size, int) else None
    patch = getattr(config, "patch_size", 1)
    patch = patch if isinstance(patch, int) else 1
    # The kind of a vision part is its model's: qwen3_vl_vision, sam3_vit_model.
    kind = re.sub(r"_(vision|vit_model).*$", "", str(getattr(config, "model_type", "")))
    mean, std = usual = _BY_TYPE.get(kind, IMAGENET)
    if processor is not None:
        mean, std = _normalization(processor, usual, getattr(config, "num_channels", 0) or 3)
    processor = processor or {}
    blue_first = bool(processor.get("do_flip_channel_order", kind in _BLUE_FIRST))
    if blue_first:
        mean, std = mean[::-1], std[::-1]
    interpolation = _FILTERS.get(processor.get("resample", 3), "bicubic")
    return Settings(mean, std, interpolation, size, patch_size=patch, blue_first=blue_first)


def _normalization(
    processor: Mapping[str, Any], usual: Normalization, channels: int
) -> Normalization:
    """Return the normalisation of colours in [0, 1] that equals a processor's steps.

    The processor multiplies colours from 0 to 255 by a factor, then subtracts its mean and divides
    by its standard deviation; either step may be off. EfficientNet's may subtract 1 in between
    (``rescale_offset``), and divide by the deviation a second time (``include_top``).

    Args:
        processor: configuration of the processor.
        usual: normalisation of such models, for what the configuration leaves out.
        channels: bands of the images, if all have the same mean and deviation.
    """
    factor = processor.get("rescale_factor", 1 / 255)
    scale = 255 * number("rescale_factor", factor, 0, above=True)
    if not processor.get("do_rescale", True):
        scale = 255.0
    mean, std, again, offset = 0.0, 1.0, 1.0, 0
    if processor.get("do_normalize", usual is not _NONE):
        mean = processor.get("image_mean") or usual.mean
        std = processor.get("image_std") or usual.std
    if processor.get("rescale_offset") and processor.get("do_rescale", True):
        offset = 1
    if processor.get("include_top"):
        again = processor.get("image_std") or usual.std
    mean, std, again = _for_each_band([mean, std, again], channels)
    std = [one * other for one, other in zip(std, again, strict=True)]
    return check_normalization(
        [(value + offset) / scale for value in mean], [value / scale for value in std], len(mean)
    )


def _for_each_band(values: Sequence[Any], channels: int) -> list[tuple[float, ...]]:
    """Repeat numbers, and lists of one number, for as many bands as the other lists have."""
    lists = [(one,) if isinstance(one, (int, float)) else tuple(one) for one in values]
    count = max((len(one) for one in lists if len(set(one)) > 1), default=channels)
    return [one[:1] * count if len(set(one)) == 1 else one for one in lists]


def cropping(processor: Mapping[str, Any]) -> str | None:
    """Return the size that a processor crops images to, as "224×224"; ``None`` without a crop."""
    if not processor.get("do_center_crop"):
        return None
    size = processor.get("crop_size") or processor.get("size") or {}
    if isinstance(size, int):
        return f"{size}×{size}"
    if not isinstance(size, Mapping):
        return "a square"
    return f"{size.get('height', '?')}×{size.get('width', '?')}"
