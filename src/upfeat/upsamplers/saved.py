"""Folders of an upsampler's configuration and weights: saving, loading, and shipped ones."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from upfeat.bounds import path_of, shown
from upfeat.normalization import check_normalization
from upfeat.optional import import_optional
from upfeat.registry import unknown_name
from upfeat.storage import read_tensors, replacing, sweep, write_tensors
from upfeat.strict_json import read_object
from upfeat.tensor_checks import check_layouts, check_values, read_layouts
from upfeat.upsamplers.blueprint import build

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_SHIPPED = Path(__file__).parent.parent / "weights"
"""Folder of the shipped weights, in folders ``CLASS_BACKBONE``, or ``CLASS_universal`` for any."""

UNIVERSAL = "universal"

AnyModule = TypeVar("AnyModule")


def shipped_names() -> list[str]:
    """Names of the weights inside the package.

    Raises:
        FileNotFoundError: the package was installed without its weights, or in an archive.
    """
    if not _SHIPPED.is_dir():
        raise FileNotFoundError(
            f"{_SHIPPED}: no such folder; upfeat works only with its weights, and as a folder, "
            "not inside a .zip: install it by pip, or let the packager include its data files"
        )
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{CONFIG_FILE}"))


def find_saved(
    name: str,
    classes: Mapping[str, type[Any]],
    embed_dim: int | None = None,
    *,
    backbone: str | None = None,
) -> Any:
    """Make an upsampler with the best-suited shipped weights, or one that needs no weights.

    Args:
        name: name of a class, or of shipped weights.
        classes: upsampler classes by name.
        embed_dim: number of feature channels; a class's weights for another number are skipped.
        backbone: name of the backbone; weights that were trained for it are preferred.

    Returns:
        The upsampler, in eval mode; ``None`` if nothing has that name.

    Raises:
        ValueError: the class needs weights, and none are shipped.
    """
    shipped = shipped_names()
    for candidate in (f"{name}_{backbone}", f"{name}_{UNIVERSAL}", name):
        if candidate in shipped and (name in classes or candidate == name):
            upsampler: Any = load_pretrained(nn.Module, _SHIPPED / candidate, classes)
            trained_for = candidate.removeprefix(f"{upsampler.name}_")
            upsampler.trained_for = None if trained_for == UNIVERSAL else trained_for
            if getattr(upsampler, "embed_dim", None) in (None, embed_dim) or candidate == name:
                return upsampler
    if name not in classes:
        return None
    published_by = classes[name].published_by
    if published_by is not None:
        raise ValueError(
            f"{name} has no weights in this package; give the file that {published_by} "
            'published, as upsampler="path/to/file.pth"'
        )
    if getattr(classes[name], "wants_hidden", False):
        raise ValueError(
            f"{name} has no weights for {backbone or 'this backbone'}: "
            f"{', '.join(one for one in shipped if one.startswith(name))} are there; with "
            "early=True and no upsampler, detail sees the early layers of any"
        )
    return classes[name]().eval()


def load_named(name: str | Path, classes: Mapping[str, type[Any]]) -> Any:
    """Load an upsampler by name, or from a folder; in eval mode.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: there is no such upsampler; close names are suggested.
    """
    found = find_saved(str(name), classes)
    if found is not None:
        return found
    if str(name) and (Path(name).is_dir() or {"/", "\\"} & {*str(name)}):
        return load_pretrained(nn.Module, name, classes)
    raise ValueError(unknown_name("upsampler", str(name), [*classes, *shipped_names()]))


def load_pretrained(
    cls: type[AnyModule], folder: str | Path, classes: Mapping[str, type[Any]]
) -> AnyModule:
    """Rebuild a module that ``save_pretrained`` wrote; in eval mode.

    Args:
        cls: class that the module must be an instance of.
        folder: a local folder, or the name of a model repository on the Hugging Face hub.
        classes: classes by the name in a folder's configuration.

    Raises:
        FileNotFoundError: the folder, or one of its two files, does not exist.
        ValueError: the folder contains another class, or tensors that do not fit.
    """
    folder = _local_folder(folder)
    path = folder / CONFIG_FILE
    config = read_object(path)
    mean, std = config.pop("mean", None), config.pop("std", None)
    trained_for, origin = config.pop("trained_for", None), config.pop("origin", None)
    if trained_for is not None and not isinstance(trained_for, str):
        raise ValueError(f"{path}: trained_for={shown(trained_for)} must be a backbone's name")
    if origin is not None and not isinstance(origin, str):
        raise ValueError(f"{path}: origin={shown(origin)} must be a text")
    saved = _class_of(config, path, classes)
    if not issubclass(saved, cls):
        raise ValueError(f"{folder}: holds a {saved.__name__}; load it with that class")
    empty: Any = build(saved, config, path, values=False)
    layouts, _ = read_layouts(folder / WEIGHTS_FILE)
    check_layouts(folder / WEIGHTS_FILE, layouts, empty.state_dict())
    upsampler: Any = build(saved, config, path)
    if (mean, std) != (None, None):
        try:
            upsampler.mean, upsampler.std = check_normalization(mean, std)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    upsampler.trained_for, upsampler.origin = trained_for, origin
    state, _ = read_tensors(folder / WEIGHTS_FILE)
    try:
        upsampler.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {error}") from None
    return upsampler.eval()


def save_pretrained(upsampler: Any, folder: Path, *, has_config: bool) -> None:
    """Write an upsampler's configuration and weights; see :meth:`Upsampler.save_pretrained`.

    Args:
        upsampler: the upsampler.
        folder: folder to write to.
        has_config: whether its class defines ``config()``; otherwise it may have no arguments.
    """
    given = [
        one.name
        for one in inspect.signature(type(upsampler)).parameters.values()
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        and one.name not in upsampler.unsaved
    ]
    if given and not has_config:
        raise ValueError(
            f"{folder}: not written: {type(upsampler).__name__} defines no config(); let it return "
            f"the arguments {', '.join(given)}"
        )
    state = {key: value.contiguous() for key, value in upsampler.state_dict().items()}
    check_values(f"{folder}: not written", state, magnitudes=upsampler.magnitudes)
    config = {"upsampler": upsampler.name, **upsampler.config()}
    if upsampler.mean is not None and upsampler.std is not None:
        config |= {"mean": list(upsampler.mean), "std": list(upsampler.std)}
    if upsampler.wants_hidden and upsampler.trained_for is not None:
        config["trained_for"] = upsampler.trained_for
    if upsampler.origin is not None:
        config["origin"] = upsampler.origin
    content = (json.dumps(config, indent=2) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    # Both are written before either replaces an earlier file, lest a full disk leave a mixture.
    with replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_bytes(content)
        write_tensors(folder / WEIGHTS_FILE, state, {"upsampler": upsampler.name})


def _class_of(config: dict[str, Any], path: Path, classes: Mapping[str, type[Any]]) -> type[Any]:
    """Remove the name of the class from a configuration, and return the class."""
    name = config.pop("upsampler", None)
    saved = classes.get(name) if isinstance(name, str) else None
    if saved is None:
        raise ValueError(f"{path}: {unknown_name('upsampler', str(name)[:60], list(classes))}")
    return saved


def _local_folder(folder: str | Path) -> Path:
    if path_of("folder", folder).is_dir():
        return Path(folder)
    if isinstance(folder, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    missing = "to load it from the Hugging Face hub, pip install huggingface_hub"
    try:
        hub = import_optional("huggingface_hub", missing)
        faults = import_optional("huggingface_hub.errors", missing)
    except ValueError as error:
        raise FileNotFoundError(f"{folder}: no such folder; {error}") from None
    try:
        return Path(hub.snapshot_download(folder, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (faults.HfHubHTTPError, faults.HFValidationError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"{folder}: no such folder, and not on the hub ({reason})"
        ) from None
