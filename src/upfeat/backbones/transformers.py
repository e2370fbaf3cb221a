"""Vision models of transformers, loaded by ``hf:ID-OR-FOLDER`` or given as objects."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.backbones.outputs import Layer, NoFeatures, numbers
from upfeat.backbones.patches import Patches
from upfeat.backbones.shortened import Cut, cuts, remove_recorders, shortened
from upfeat.types import Size

_LOG = logging.getLogger("upfeat.backbones")

# Attributes under which models of images and text store their vision part.
_TOWERS = (
    "vision_model",
    "vision_tower",
    "visual_model",
    "visual",
    "vision_encoder",
    "image_encoder",
)
# Attributes of the configurations of models of videos.
_FRAMES = ("num_frames", "frames_per_clip")
# Names of a model's first argument; the second is that of Qwen-VL and Florence-2.
_IMAGES = ("pixel_values", "hidden_states")


class TransformersFeatures(nn.Module):
    """Hidden states of a transformers model's layers.

    Layers are counted from 0 without the embedding: layer 8 is ``hidden_states[9]``. The last layer
    alone is ``last_hidden_state``, after the model's last norm if the model applies it there.

    Blocks after the last one chosen are left out, if the hidden states of a first image are the
    same to the bit without them. A program that is traced or compiled contains all of them; its
    compiler leaves out what has no effect.
    """

    cut: Cut | None = None
    """Description of the model without later blocks; ``None`` to run all of them."""
    tested: bool = False
    """True once :attr:`cut` is known."""

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[Layer] | None = None,
        *,
        interpolate: bool = True,
        blue_first: bool = False,
    ) -> None:
        """Choose layers.

        Args:
            network: a vision model, or a model of images and text, whose vision part is used.
            layers: numbers of layers; ``None`` for the last.
            interpolate: interpolate the position embeddings for images of other sizes.
            blue_first: give the network images in the order blue, green, red.

        Raises:
            ValueError: the network is no vision model, or there is no such layer.
        """
        super().__init__()
        self.network = vision_part(network)
        config: Any = self.network.config
        self.blocks = _count_blocks(config)
        self.layers = numbers(layers, self.blocks, type(self.network).__name__)
        self.options = _options(self.network, interpolate)
        self.blue_first = blue_first
        parameters = inspect.signature(self.network.forward).parameters
        grid_name = Patches.needed(self.network, parameters)
        self.frames = _clip_frames(self.network)
        # RF-DETR's windows exchange height and width, which scrambles images that are not square.
        kind = getattr(config, "model_type", "")
        self.square = kind == "rf_detr_dinov2" and config.num_windows > 1
        self.patches = None if grid_name is None else Patches(self.network, grid_name)
        self.patch = getattr(config, "patch_size", 16)
        # Hiera has a number for each axis, and shuffles nothing.
        self.masked = "noise" in parameters and isinstance(self.patch, int)
        self.suffix = getattr(config, "num_detection_tokens", 0)  # YOLOS: after the cells' tokens

    def forward(self, x: Tensor) -> Any:
        """(B, 3, H, W) -> tokens or a map; a list of them for several layers."""
        if self.square and x.shape[2] != x.shape[3]:
            raise ValueError(f"{type(self.network).__name__} takes square images only")
        x = x.flip(1) if self.blue_first else x
        chosen = [self._cells(one, x) for one in self._states(x)]
        return chosen[0] if len(chosen) == 1 else chosen

    def _states(self, x: Tensor) -> list[Any]:
        """Return the hidden states of the layers chosen, or the last one."""
        if self.layers is None:
            return [self._last(self._output(self.network, x))]
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return self._chosen(self._output(self.network, x), self.blocks)
        cut = self.cut
        short = None if cut is None else shortened(self.network, cut)
        output = self._output(self.network if short is None else short, x)
        # A forward of its own, as of accelerate, may have run the whole model after all.
        count = self.blocks
        if cut is not None and len(_recorded(output)) == cut.states:
            count = cut.kept
        states = self._chosen(output, count)
        if not self.tested:
            self.cut, self.tested = self._find_cut(x), True
        return states

    def _find_cut(self, x: Tensor) -> Cut | None:
        """Return a way to shorten the model that changes no bit of the states chosen."""
        if self.layers is None or self.blocks is None:
            return None
        # Blank images, by which models are probed, may be 0 in every layer.
        draw = torch.Generator().manual_seed(0)
        image = torch.randn((1, *x.shape[1:]), generator=draw, device="cpu").to(x)
        with torch.no_grad():
            expected = None
            for cut in cuts(self.network, self.blocks, max(self.layers) + 1):
                short = shortened(self.network, cut)
                if short is None:
                    continue
                if expected is None:
                    expected = self._chosen(self._output(self.network, image), self.blocks)
                try:
                    output = self._output(short, image)
                    found = self._chosen(output, cut.kept)
                    if all(map(torch.equal, expected, found)):
                        return cut._replace(states=len(_recorded(output)))
                except Exception:  # a norm of another width, or whatever counts on all blocks
                    continue
        return None

    def _output(self, network: nn.Module, x: Tensor) -> Any:
        """Run the model, or a shortened copy of it, on images in the order of colours it takes."""
        options: dict[str, Any] = dict(self.options)
        if self.masked:  # without this noise, the model would shuffle the patches
            count = (x.shape[2] // self.patch) * (x.shape[3] // self.patch)
            options["noise"] = torch.arange(count, device=x.device).expand(len(x), -1)
        given = x
        if self.patches is not None:
            given, beside = self.patches.given(x)
            options |= beside
        elif self.frames is not None:
            given = x[:, None].expand(-1, self.frames, -1, -1, -1)
        with _unmasked(self.network.config), _whole_windows(self.network):
            return network(given, output_hidden_states=self.layers is not None, **options)

    def _chosen(self, output: Any, count: int | None) -> list[Any]:
        """Return the hidden states of the layers chosen from those of ``count`` blocks.

        Raises:
            ValueError: the model returns no hidden states, or not one for each of its layers.
        """
        assert self.layers is not None
        name = type(self.network).__name__
        states = _recorded(output)
        count = len(states) if count is None else count
        if len(states) == 2 * count:  # SwiftFormer: of the embedding, then stages and reductions
            states = states[1::2]
        states = states[1:] if len(states) == count + 1 else states  # without the embedding
        if len(states) != count or not states:
            raise ValueError(
                f"{name} returns {len(states)} hidden states for {count} layers; leave layer= out, "
                "or wrap it in a function of the image that returns one of them"
            )
        if not all(-count <= layer < count for layer in self.layers):
            shown = ", ".join(map(str, self.layers))
            raise ValueError(f"{name}: layer={shown} does not exist; 0 to {count - 1} do")
        return [states[layer] for layer in self.layers]

    def _cells(self, states: Any, x: Tensor) -> Any:
        """Return the cells' tokens, or maps, of the images x."""
        if self.patches is not None:
            return self.patches.map(states, x)
        if not isinstance(states, Tensor):  # maps of a detector's neck
            return states
        if states.dim() == 3 and len(states) == 1 < len(x):  # Pixtral: one image after the other
            return states.reshape(len(x), -1, states.shape[2])
        return states[:, : -self.suffix] if self.suffix else states

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled."""
        remove_recorders(self.network)
        return self.__dict__

    def _last(self, output: Any) -> Any:
        """Return the last hidden state: a map if the output contains one, otherwise tokens."""
        if "feature_maps" in output:
            return output["feature_maps"][-1]
        if output.get("encoder_last_hidden_state") is not None:  # of DETR, whose last are objects
            return output["encoder_last_hidden_state"]
        if "last_hidden_state" not in output:
            raise NoFeatures(
                f"{type(self.network).__name__} returns {', '.join(output)}, no hidden states; "
                "give its base model (.base_model)"
            )
        return output["last_hidden_state"]


def _recorded(output: Any) -> Any:
    """All hidden states that a model returned."""
    return output.get("reshaped_hidden_states") or output.get("hidden_states") or ()


def is_transformers(module: object) -> bool:
    """Return whether a module is a model of transformers."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def vision_part(network: nn.Module) -> nn.Module:
    """Return the vision part of a model: its base model without a head, or its vision tower.

    Raises:
        NoFeatures: that part does not take images, or needs further arguments.
    """
    base: Any = network
    if "For" in type(network).__name__:  # a head on a model, as ViTForImageClassification
        base = getattr(network, "base_model", network)
        inner = getattr(base, "backbone", None)
        if base is network and isinstance(inner, nn.Module):  # as DepthAnythingForDepthEstimation
            base = inner
    for name in _TOWERS:
        tower = getattr(base, name, None)
        if isinstance(tower, nn.Module):
            base = tower
            break
    inner = getattr(base, "timm_model", None)
    if isinstance(inner, nn.Module):
        return inner
    name, config = type(network).__name__, getattr(base, "config", None)
    parameters = inspect.signature(base.forward).parameters
    if _clip_frames(base):
        return base
    for frames in _FRAMES:
        if count := getattr(config, frames, None):
            raise NoFeatures(
                f"{name} takes videos ({frames}={count}), not images; wrap it in a function of "
                "images that repeats them as frames and keeps the tokens of one time"
            )
    beside = (*Patches.arguments(Patches.needed(base, parameters)), *_IMAGES)
    if not takes_images(base):
        raise NoFeatures(
            f"{name} takes no pixel_values: it is no vision model; give the part of it that sees"
        )
    needed = [
        label
        for label, one in parameters.items()
        if label not in beside
        and one.kind in (0, 1, 3)
        and (one.default is one.empty or label in Patches.GRIDS)
    ]
    if needed:
        raise NoFeatures(
            f"{type(base).__name__} needs {', '.join(needed)} beside the image; wrap it in a "
            "function of the image that gives them"
        )
    return base


def takes_images(network: Any) -> bool:
    """Return whether a model's forward takes images, or their patches."""
    parameters = inspect.signature(network.forward).parameters
    # The first argument of Florence-2's backbone is the image under another name.
    renamed = "hidden_states" in parameters and type(network).__name__.endswith("Backbone")
    return renamed or any(one in parameters for one in ("pixel_values", *Patches.GRIDS))


def _clip_frames(network: Any) -> int | None:
    """Return the frames of the shortest clip of a model that takes clips of any length.

    V-JEPA 2 is trained on images, too, as clips of one image repeated.
    """
    config: Any = getattr(network, "config", None)
    return config.tubelet_size if getattr(config, "model_type", "") == "vjepa2" else None


def _count_blocks(config: Any) -> int | None:
    """Return the number of layers or stages without the embedding; ``None`` if unknown."""
    repeats = getattr(config, "num_block_repeats", None)
    if repeats:  # EfficientNet, whose num_hidden_layers is another number
        return sum(math.ceil(config.depth_coefficient * times) for times in repeats)
    for name in ("num_encoder_blocks", "depths", "num_hidden_layers", "depth"):
        value = getattr(config, name, None)
        if value:
            return len(value) if isinstance(value, (list, tuple)) else int(value)
    stages = getattr(config, "blocks_per_stage", None)  # SAM 2, whose layers are blocks
    inner = getattr(config, "backbone_config", None)
    if stages:
        return sum(stages)
    return None if inner is None else _count_blocks(inner)


def _options(network: Any, interpolate: bool) -> dict[str, Any]:
    parameters = inspect.signature(network.forward).parameters
    options: dict[str, Any] = {}
    if interpolate and "interpolate_pos_encoding" in parameters:
        options["interpolate_pos_encoding"] = True
    if "skip_predictor" in parameters:
        options["skip_predictor"] = True
    return options


@contextmanager
def _unmasked(config: Any) -> Iterator[None]:
    """Set the mask ratio of a masked autoencoder to 0, so that no patch is left out."""
    ratio = getattr(config, "mask_ratio", None)
    if ratio is None:
        yield
        return
    config.mask_ratio = 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio


@contextmanager
def _whole_windows(network: nn.Module) -> Iterator[None]:
    """Keep Swin's windows at their size, also on images smaller than a window.

    On a small image, transformers' Swin would shrink a layer's windows permanently, and the layer's
    position biases would no longer fit. With full windows it pads the image instead.
    """
    layers: list[Any] = [
        one for one in network.modules() if hasattr(one, "set_shift_and_window_size")
    ]
    shifts = [layer.shift_size for layer in layers]

    def keep(layer: Any, shift: int, resolution: Size) -> None:
        layer.shift_size = 0 if min(resolution) <= layer.window_size else shift

    for layer, shift in zip(layers, shifts, strict=True):
        layer.set_shift_and_window_size = partial(keep, layer, shift)
    try:
        yield
    finally:
        for layer, shift in zip(layers, shifts, strict=True):
            del layer.set_shift_and_window_size
            layer.shift_size = shift
