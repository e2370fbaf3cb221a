"""Rebuild saved upsamplers, and find upsamplers by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from upfeat.normalization import check_normalization
from upfeat.registry import unknown_name
from upfeat.storage import read_tensors
from upfeat.strict_json import read_object
from upfeat.tensor_checks import check_layouts, read_layouts
from upfeat.upsamplers.base import UPSAMPLERS, Upsampler
from upfeat.upsamplers.blueprint import build
from upfeat.upsamplers.checkpoints import load_checkpoint
from upfeat.upsamplers.detail import DetailUpsampler
from upfeat.upsamplers.tensor_files import SUFFIXES

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
    usable = {name for name, cls in UPSAMPLERS.items() if cls.published_by is None}
    return sorted({*usable, *_shipped_names()})


def load_upsampler(name: str | Path, *, sha256: str | None = None) -> Upsampler:
    """Load an upsampler for features that one already has; in eval mode and frozen.

    Args:
        name: one of :func:`list_upsamplers` ("detail": weights that suit any backbone); a folder
            that ``save_pretrained`` wrote; or a file of a published upsampler, FeatUp, AnyUp,
            JAFAR or NAF, which is recognised by its tensors. Only tensors are read, never code.
        sha256: what the file must hash to; ``None`` for no check.

    Returns:
        The upsampler; call it as ``upsampler(features, image)``, the image normalised by its
        ``mean`` and ``std``. What a file turned out to be is in its ``origin`` and logged at INFO
        level.

    Raises:
        FileNotFoundError: ``name`` is a path where nothing is.
        ValueError: there is no such upsampler, or the file is damaged, another one than
            ``sha256`` says, or holds more than tensors.

    Example:
        >>> import torch
        >>> upsampler = load_upsampler("detail")
        >>> upsampler(torch.rand(1, 384, 8, 8), torch.rand(1, 3, 112, 112)).shape
        torch.Size([1, 384, 112, 112])
    """
    if _is_checkpoint(name):
        return load_checkpoint(name, sha256=sha256)
    if sha256 is not None:
        raise ValueError(f"sha256 is for checkpoint files; {str(name)!r} is none")
    return create_upsampler(name).requires_grad_(False)


def _is_checkpoint(name: str | Path) -> bool:
    return Path(name).suffix.lower() in SUFFIXES or Path(name).is_file()


def create_upsampler(
    name: str | Path | None, embed_dim: int | None = None, *, backbone: str | None = None
) -> Upsampler:
    """Make an upsampler by name, or load a saved one; in eval mode.

    Args:
        name: one of :func:`list_upsamplers`, a folder that ``save_pretrained`` wrote, or a
            published checkpoint (see :func:`load_upsampler`); ``None`` for the default.
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
        published_by = UPSAMPLERS[name].published_by
        if published_by is not None:
            raise ValueError(
                f"{name} has no weights in this package; give the file that {published_by} "
                'published, as upsampler="path/to/file.pth"'
            )
        return UPSAMPLERS[name]().eval()
    if _is_checkpoint(name):
        return load_checkpoint(name)
    if Path(name).is_dir() or "/" in name:
        return load_pretrained(Upsampler, name)
    raise ValueError(unknown_name("upsampler", name, list_upsamplers()))


def _shipped_names() -> list[str]:
    """Weights inside the package."""
    return sorted(path.parent.name for path in _SHIPPED.glob(f"*/{CONFIG_FILE}"))


def load_pretrained(cls: type[AnyUpsampler], folder: str | Path) -> AnyUpsampler:
    """See :meth:`Upsampler.from_pretrained`; ``cls`` is what the result must be."""
    folder = _local_folder(folder)
    path = folder / CONFIG_FILE
    config = read_object(path)
    mean, std = config.pop("mean", None), config.pop("std", None)
    saved = _class_of(config, path)
    if not issubclass(saved, cls):
        raise ValueError(f"{folder}: holds a {saved.__name__}; load it with that class")
    empty = build(saved, config, path, values=False)
    layouts, _ = read_layouts(folder / WEIGHTS_FILE)
    check_layouts(folder / WEIGHTS_FILE, layouts, empty.state_dict())
    upsampler = build(saved, config, path)
    if (mean, std) != (None, None):
        upsampler.mean, upsampler.std = check_normalization(mean, std)
    state, _ = read_tensors(folder / WEIGHTS_FILE)
    try:
        upsampler.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {error}") from None
    return upsampler.eval()


def _class_of(config: dict[str, Any], path: Path) -> type[Upsampler]:
    """The class that a configuration names, which is taken out of it."""
    name = config.pop("upsampler", None)
    saved = UPSAMPLERS.get(name) if isinstance(name, str) else None
    if saved is None:
        raise ValueError(f"{path}: {unknown_name('upsampler', str(name)[:60], list(UPSAMPLERS))}")
    return saved


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
