"""Vision models of transformers, loaded by ``hf:ID-OR-FOLDER`` or given as objects."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.backbones.libraries import import_library, quiet, without_broken
from upfeat.backbones.outputs import Layer, numbers
from upfeat.backbones.settings import Settings, cropping, transformers_settings
from upfeat.types import Size

_LOG = logging.getLogger("upfeat.backbones")

# Attributes under which models of images and text store their vision part.
_TOWERS = ("vision_model", "vision_tower", "visual_model", "image_encoder")
# Attributes of the configurations of models of videos.
_FRAMES = ("num_frames", "frames_per_clip")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class TransformersFeatures(nn.Module):
    """Hidden states of a transformers model's layers.

    Layers are counted from 0 without the embedding: layer 8 is ``hidden_states[9]``. The last layer
    alone is ``last_hidden_state``, after the model's last norm if the model applies it there.
    """

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
        self.patch = getattr(config, "patch_size", 16)
        # Hiera has a number for each axis, and shuffles nothing.
        self.masked = "noise" in parameters and isinstance(self.patch, int)
        self.suffix = getattr(config, "num_detection_tokens", 0)  # YOLOS: after the cells' tokens

    def forward(self, x: Tensor) -> Any:
        """(B, 3, H, W) -> tokens or a map; a list of them for several layers."""
        x = x.flip(1) if self.blue_first else x
        options: dict[str, Any] = dict(self.options)
        if self.masked:  # without this noise, the model would shuffle the patches
            count = (x.shape[2] // self.patch) * (x.shape[3] // self.patch)
            options["noise"] = torch.arange(count, device=x.device).expand(len(x), -1)
        with _unmasked(self.network.config), _whole_windows(self.network):
            output = self.network(x, output_hidden_states=self.layers is not None, **options)
        if self.layers is None:
            return self._cells(self._last(output))
        chosen = [self._cells(one) for one in self._states(output)]
        return chosen[0] if len(chosen) == 1 else chosen

    def _states(self, output: Any) -> list[Any]:
        """Return the hidden states of the layers chosen.

        Raises:
            ValueError: the model returns no hidden states, or not one for each of its layers.
        """
        assert self.layers is not None
        name = type(self.network).__name__
        states = output.get("reshaped_hidden_states") or output.get("hidden_states") or ()
        count = len(states) if self.blocks is None else self.blocks
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

    def _cells(self, states: Any) -> Any:
        """Leave out tokens that follow those of the cells."""
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
            raise ValueError(
                f"{type(self.network).__name__} returns {', '.join(output)}, no hidden states; "
                "give its base model (.base_model)"
            )
        return output["last_hidden_state"]


def remove_recorders(network: nn.Module) -> None:
    """Remove the hooks by which transformers records hidden states, which cannot be pickled.

    transformers installs them again when hidden states are next requested.
    """
    for module in network.modules():
        hooks = module._forward_hooks
        for key, hook in list(hooks.items()):
            if type(hook).__module__ == "builtins" and "output_cap" in hook.__qualname__:
                del hooks[key]
        if hasattr(module, "_output_capturing_hooks_installed"):
            module._output_capturing_hooks_installed = False  # pyright: ignore[reportArgumentType]


def is_transformers(module: object) -> bool:
    """Return whether a module is a model of transformers."""
    return any(
        cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.")
        for cls in type(module).__mro__
    )


def vision_part(network: nn.Module) -> nn.Module:
    """Return the vision part of a model: its base model without a head, or its vision tower.

    Raises:
        ValueError: that part does not take images, or needs further arguments.
    """
    base: Any = network
    if "For" in type(network).__name__:  # a head on a model, as ViTForImageClassification
        base = getattr(network, "base_model", network)
        inner = getattr(base, "backbone", None)
        if base is network and isinstance(inner, nn.Module):  # as DepthAnythingForDepthEstimation
            base = inner
    inner = getattr(base, "timm_model", None)
    if isinstance(inner, nn.Module):
        return inner
    for name in _TOWERS:
        tower = getattr(base, name, None)
        if isinstance(tower, nn.Module):
            base = tower
            break
    parameters = inspect.signature(base.forward).parameters
    config = getattr(base, "config", None)
    for name in _FRAMES:
        if getattr(config, name, None):
            raise ValueError(
                f"{type(network).__name__} takes videos ({name}={getattr(config, name)}), not "
                "images; wrap it in a function of images that repeats them as frames"
            )
    if "pixel_values" not in parameters:
        raise ValueError(
            f"{type(network).__name__} takes no pixel_values: it is no vision model; give the part "
            "of it that sees"
        )
    needed = [
        name
        for name, one in parameters.items()
        if name != "pixel_values" and one.default is one.empty and one.kind in (0, 1, 3)
    ]
    if needed:
        raise ValueError(
            f"{type(base).__name__} needs {', '.join(needed)} beside the image; wrap it in a "
            "function of the image that gives them"
        )
    return base


def _count_blocks(config: Any) -> int | None:
    """Return the number of layers or stages without the embedding; ``None`` if unknown."""
    repeats = getattr(config, "num_block_repeats", None)
    if repeats:  # EfficientNet, whose num_hidden_layers is another number
        return sum(math.ceil(config.depth_coefficient * times) for times in repeats)
    for name in ("num_encoder_blocks", "depths", "num_hidden_layers"):
        value = getattr(config, name, None)
        if value:
            return len(value) if isinstance(value, (list, tuple)) else int(value)
    return None


def _options(network: Any, interpolate: bool) -> dict[str, Any]:
    parameters = inspect.signature(network.forward).parameters
    options: dict[str, Any] = {}
    if interpolate and "interpolate_pos_encoding" in parameters:
        options["interpolate_pos_encoding"] = True
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


def load_transformers(
    source: str, *, pretrained: bool, whole: bool = False
) -> tuple[nn.Module, Settings]:
    """Load a vision model and the settings of its image processor.

    Args:
        source: a folder, or the name of a model on the hub.
        pretrained: load the model's weights; otherwise random weights.
        whole: return the model itself rather than its vision part.

    Raises:
        FileNotFoundError: there is no such folder, and the model cannot be downloaded.
        ValueError: transformers is not installed, or cannot make the model.
    """
    with without_broken("torchvision"):
        network, settings = _load(source, pretrained, whole)
    return network if whole else vision_part(network), settings


def _load(source: str, pretrained: bool, whole: bool) -> tuple[nn.Module, Settings]:
    library = import_library("transformers", extra="transformers")
    if Path(source).expanduser().exists():
        source = str(Path(source).expanduser())
        _check_folder(Path(source), pretrained)
    progress = library.utils.logging
    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        with quiet():
            config = library.AutoConfig.from_pretrained(source)
            saved = _saved_class(library, config)
            missing: Iterable[str] = ()
            if pretrained:
                network, report = (saved or library.AutoModel).from_pretrained(
                    source, dtype=torch.float32, output_loading_info=True
                )
                missing = report["missing_keys"]
            elif saved is not None:
                network = saved(config)
            else:
                network = library.AutoModel.from_config(config)
            processor = _read_processor(source)
    except OSError as error:
        raise _unreachable(source, error) from None
    except Exception as error:
        raise ValueError(f"hf:{source}: {_line(error)}") from None
    finally:
        if shown:
            progress.enable_progress_bar()
    part = vision_part(network)
    _check_complete(source, network, network if whole else part, missing)
    try:
        settings = transformers_settings(getattr(part, "config", config), processor)
        crop = None if processor is None else cropping(processor)
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"hf:{source}: preprocessor_config.json: {_line(error)}") from None
    if crop is not None:
        _LOG.warning(
            "hf:%s: its processor crops images to %s; upfeat keeps the whole image, at its own "
            "size or the one you give",
            *(source, crop),
        )
    if processor is None:
        _LOG.warning(
            "hf:%s has no preprocessor_config.json: mean %s and std %s are taken, as for its kind; "
            "give mean= and std= if they are others",
            *(source, settings.mean, settings.std),
        )
    return network, settings


def _saved_class(library: Any, config: Any) -> Any:
    """Return the class of a backbone, or of a model that AutoModel does not know; else ``None``."""
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    if name.endswith("Backbone") or type(config) not in library.MODEL_MAPPING:
        return getattr(library, name, None)
    return None


def _check_complete(source: str, network: nn.Module, part: nn.Module, names: Iterable[str]) -> None:
    """Refuse weights that lack most parameters of a part, or warn if a few: they would be random.

    Poolers, which the features do not pass, may be missing: heads of classifiers have none.
    """
    within = {id(one) for one in part.parameters()}
    known = dict(network.named_parameters())
    missing = sorted(
        name for name in names if id(known.get(name)) in within and "pooler" not in name
    )
    if not missing:
        return
    line = f"hf:{source}: its weights lack {len(missing)} of {len(within)} parameters of "
    line += f"{type(part).__name__}, such as {missing[0]}"
    if 2 * len(missing) > len(within):
        raise ValueError(f"{line}; give the folder of such a model, with its names of parameters")
    _LOG.warning("%s: they are random", line)


def _check_folder(folder: Path, pretrained: bool) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"hf:{folder}: holds no config.json; give a folder that save_pretrained of "
            "transformers wrote"
        )
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if pretrained and not weights:
        raise FileNotFoundError(
            f"hf:{folder}: holds no weights (model.safetensors); put them there, or give "
            "pretrained=False for random ones"
        )


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


def _read_processor(source: str) -> dict[str, Any] | None:
    """Read the image processor's configuration; ``None`` if there is none."""
    cached: Any = import_library("transformers.utils", extra="transformers").cached_file
    for name in _PROCESSOR_FILES:
        local = Path(source) / name
        if Path(source).is_dir():
            path = local if local.is_file() else None
        else:
            path = cached(source, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            found = json.loads(Path(path).read_bytes())
            return found.get("image_processor", found)
    return None


def _unreachable(source: str, error: OSError) -> FileNotFoundError:
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        return FileNotFoundError(f"hf:{source}: no such folder")
    return FileNotFoundError(
        f"hf:{source}: no such folder, and not in the cache or on the hub ({_line(error)}); "
        "download its config.json, model.safetensors and preprocessor_config.json into a folder "
        "and give hf:FOLDER"
    )


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
