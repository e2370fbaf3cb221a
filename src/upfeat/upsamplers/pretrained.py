"""Rebuild saved upsamplers, and find upsamplers by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from upfeat.normalization import check_normalization
from upfeat.registry import unknown_name
from upfeat.storage import read_tensors
from upfeat.upsamplers.base import UPSAMPLERS, Upsampler
from upfeat.upsamplers.detail import DetailUpsampler
from upfeat.upsamplers.jbu import JBUStack

DEFAULT_UPSAMPLER = DetailUpsampler.name
"""What a backbone gets: with weights made for it, if there are any, or else for any backbone."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_SHIPPED = Path(__file__).parent.parent / "weights"
"""Folders that ``save_pretrained`` wrote: ``CLASS_BACKBONE``, or ``CLASS_universal`` for any."""

AnyUpsampler = TypeVar("AnyUpsampler", bound=Upsampler)


def list_upsamplers() -> list[str]:
    """The names that ``upfeat.load(upsampler=…)`` and ``upfeat run --upsampler`` take.

    A class's name ("jbu_stack") stands for the weights that suit the backbone best; a full one
    ("jbu_stack_universal") for those weights.
    """
    return sorted({*UPSAMPLERS, *_shipped_names()})


def create_upsampler(
    name: str | Path | None, embed_dim: int | None = None, *, backbone: str | None = None
) -> Upsampler:
    """Make an upsampler by name, or load a saved one; in eval mode.

    Args:
        name: one of :func:`list_upsamplers`, a folder that ``save_pretrained`` wrote, or a
            published FeatUp checkpoint (``.ckpt``); ``None`` for the default.
        embed_dim: number of channels it will be given, checked where it matters.
        backbone: name of the backbone, for weights that were trained for it; any backbone gets
            the universal ones without.

    Raises:
        FileNotFoundError: ``name`` is a path where nothing is.
        ValueError: there is no such upsampler; close names are suggested.
    """
    name = DEFAULT_UPSAMPLER if name is None else str(name)
    shipped = _shipped_names()
    for candidate in (f"{name}_{backbone}", f"{name}_universal", name):
        if candidate in shipped and (name in UPSAMPLERS or candidate == name):
            upsampler = load_pretrained(Upsampler, _SHIPPED / candidate)
            if getattr(upsampler, "embed_dim", None) in (None, embed_dim) or candidate == name:
                return upsampler
    if name in UPSAMPLERS:
        return UPSAMPLERS[name]().eval()
    if Path(name).suffix == ".ckpt":
        return JBUStack.from_featup(name)
    if Path(name).is_dir() or "/" in name:
        return load_pretrained(Upsampler, name)
    raise ValueError(unknown_name("upsampler", name, list_upsamplers()))


def _shipped_names() -> list[str]:
    """Weights inside the package."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{CONFIG_FILE}"))


def load_pretrained(cls: type[AnyUpsampler], folder: str | Path) -> AnyUpsampler:
    """See :meth:`Upsampler.from_pretrained`; ``cls`` is what the result must be."""
    folder = _local_folder(folder)
    config = _read_config(folder / CONFIG_FILE)
    mean, std = config.pop("mean", None), config.pop("std", None)
    name = config.pop("upsampler", None)
    saved = UPSAMPLERS.get(str(name))
    if saved is None:
        raise ValueError(f"{folder}: {unknown_name('upsampler', str(name), list_upsamplers())}")
    if not issubclass(saved, cls):
        raise ValueError(f"{folder}: holds a {saved.__name__}; load it with that class")
    try:
        upsampler = saved(**config)
    except TypeError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    if (mean, std) != (None, None):
        upsampler.mean, upsampler.std = check_normalization(mean, std)
    state, _ = read_tensors(folder / WEIGHTS_FILE)
    check_state(folder / WEIGHTS_FILE, state, upsampler.state_dict())
    upsampler.load_state_dict(state)
    return upsampler.eval()


def check_state(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that ``found`` has the names and shapes of ``expected``.

    Raises:
        ValueError: it does not; every name at fault is in the message.
    """
    faults = [f"missing {name}" for name in sorted(set(expected) - set(found))]
    faults += [f"extra {name}" for name in sorted(set(found) - set(expected))]
    faults += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
        for name in sorted(set(found) & set(expected))
        if found[name].shape != expected[name].shape
    ]
    if faults:
        raise ValueError(f"{path}: its tensors do not fit its configuration: {'; '.join(faults)}")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds {type(config).__name__}, not an object")
    return config


def _local_folder(folder: str | Path) -> Path:
    if Path(folder).is_dir():
        return Path(folder)
    if isinstance(folder, Path) or folder.count("/") != 1 or folder.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{folder}: no such folder")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise FileNotFoundError(
            f"{folder}: no such folder; to load it from the Hugging Face hub, "
            "pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(folder, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"{folder}: no such folder, and not on the hub ({reason})"
        ) from None
