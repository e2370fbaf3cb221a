"""Loading of transformers' models from folders and the hub, with their image processors."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upfeat.backbones.libraries import import_library, quiet, without_broken
from upfeat.backbones.outputs import NoFeatures
from upfeat.backbones.settings import Settings, cropping, settings_of, transformers_settings
from upfeat.backbones.transformers import vision_part
from upfeat.failures import first_line

_LOG = logging.getLogger("upfeat.backbones")

_WITHOUT_CODE = {"trust_remote_code": False}
"""Option of transformers, which otherwise asks on the terminal whether to run a folder's code."""

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


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
        return _load(source, pretrained, whole)


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
            config = library.AutoConfig.from_pretrained(source, **_WITHOUT_CODE)
            saved = _saved_class(library, config)
            missing: Iterable[str] = ()
            tower = _load_tower(library, source, config) if pretrained and not whole else None
            if tower is not None:
                network = tower
            elif pretrained:
                network, report = (saved or library.AutoModel).from_pretrained(
                    source, dtype=torch.float32, output_loading_info=True, **_WITHOUT_CODE
                )
                missing = report["missing_keys"]
            else:
                network = _untrained(library, config)
            processor = _read_processor(source)
    except NoFeatures:
        raise
    except OSError as error:
        raise _unreachable(source, error) from None
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"hf:{source}: its model is code of its own, which is not run; if you trust it, "
                "load it by transformers with trust_remote_code=True, and give the model"
            ) from None
        raise ValueError(f"hf:{source}: {first_line(error)}") from None
    finally:
        if shown:
            progress.enable_progress_bar()
    part = network if tower is not None else vision_part(network)
    wanted = network if whole else part
    _check_complete(source, network, wanted, missing)
    return wanted, _settings(f"hf:{source}", getattr(part, "config", config), processor)


def _load_tower(library: Any, source: str, config: Any) -> nn.Module | None:
    """Load the vision tower of a model without the model, which may be billions of parameters.

    Returns:
        The tower; ``None`` if the model has none, or its weights have other names.

    Raises:
        NoFeatures: see :func:`vision_part`.
    """
    try:
        with torch.device("meta"):
            network = _untrained(library, config)
    except Exception:  # it needs values when it is made
        return None
    part = vision_part(network)
    name = next((name for name, one in network.named_modules() if one is part), "")
    if not name or not isinstance(part, library.PreTrainedModel):
        return None
    own: Any = part
    loaded, report = type(own).from_pretrained(
        source,
        config=own.config,
        dtype=torch.float32,
        output_loading_info=True,
        key_mapping={rf"^(.*\.)?{re.escape(name.rpartition('.')[2])}\.": ""},
    )
    missing = [one for one in report["missing_keys"] if "pooler" not in one]
    return None if missing or report["mismatched_keys"] else loaded


def settings_of_object(network: Any, part: Any) -> Settings:
    """Read the settings of a model that was given as an object.

    If it was loaded by ``from_pretrained``, its processor is read from where it was loaded from.
    """
    source = getattr(network, "name_or_path", None)
    if not source:
        return settings_of(part)
    try:
        processor = _read_processor(str(source), local_files_only=True)
    except (OSError, ValueError):  # the folder has gone
        processor = None
    return _settings(str(source), part.config, processor)


def _settings(source: str, config: Any, processor: dict[str, Any] | None) -> Settings:
    """Read a model's settings; warn if its processor crops images or is missing."""
    try:
        settings = transformers_settings(config, processor)
        crop = None if processor is None else cropping(processor)
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{source}: preprocessor_config.json: {first_line(error)}") from None
    if crop is not None:
        _LOG.warning(
            "%s: its processor crops images to %s; upfeat keeps the whole image, at its own "
            "size or the one you give",
            *(source, crop),
        )
    if processor is None:
        _LOG.warning(
            "%s has no preprocessor_config.json: mean %s and std %s are taken, as for its kind; "
            "give mean= and std= if they are others",
            *(source, settings.mean, settings.std),
        )
    return settings


def _saved_class(library: Any, config: Any) -> Any:
    """Return the class of a backbone, or of a model that AutoModel does not know; else ``None``."""
    name = next(iter(getattr(config, "architectures", None) or ()), "")
    if name.endswith("Backbone") or type(config) not in library.MODEL_MAPPING:
        return getattr(library, name, None)
    return None


def _untrained(library: Any, config: Any) -> Any:
    """Make a model of a configuration, with random weights."""
    saved = _saved_class(library, config)
    if saved is not None:
        return saved(config)
    return library.AutoModel.from_config(config, **_WITHOUT_CODE)


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


def _read_processor(source: str, **options: Any) -> dict[str, Any] | None:
    """Read the image processor's configuration; ``None`` if there is none."""
    cached: Any = import_library("transformers.utils", extra="transformers").cached_file
    for name in _PROCESSOR_FILES:
        local = Path(source) / name
        if Path(source).is_dir():
            path = local if local.is_file() else None
        else:
            path = cached(source, name, _raise_exceptions_for_missing_entries=False, **options)
        if path is not None:
            found = json.loads(Path(path).read_bytes())
            return found.get("image_processor", found)
    return None


def _unreachable(source: str, error: OSError) -> FileNotFoundError:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):  # C:/models has a colon
        return FileNotFoundError(f"hf:{source}: no such folder")
    return FileNotFoundError(
        f"hf:{source}: no such folder, and not in the cache or on the hub ({first_line(error)}); "
        "download its config.json, model.safetensors and preprocessor_config.json into a folder "
        "and give hf:FOLDER"
    )
