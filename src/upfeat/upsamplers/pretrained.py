"""Upsamplers by name, from folders, and from published files."""

from __future__ import annotations

from pathlib import Path

from upfeat.registry import unknown_name
from upfeat.upsamplers.base import UPSAMPLERS, Upsampler
from upfeat.upsamplers.checkpoints import load_checkpoint
from upfeat.upsamplers.detail import DetailUpsampler
from upfeat.upsamplers.early_detail import EarlyDetailUpsampler
from upfeat.upsamplers.saved import find_saved, load_pretrained, shipped_names
from upfeat.upsamplers.tensor_files import SUFFIXES

DEFAULT_UPSAMPLER = DetailUpsampler.name
"""The default: with weights made for the backbone, if there are any, or else for any."""


def list_upsamplers() -> list[str]:
    """The names that ``upfeat.load(upsampler=…)`` and ``upfeat run --upsampler`` take.

    A class's name ("jbu_stack") stands for the weights that suit the backbone best; a full one
    ("jbu_stack_universal") for those weights.
    """
    usable = {
        name
        for name, cls in UPSAMPLERS.items()
        if cls.published_by is None and not cls.wants_hidden  # which have no weights for any
    }
    return sorted({*usable, *shipped_names()})


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


def trained_for_early(backbone: str) -> str | None:
    """The name of weights that were trained on a backbone's early layers, if there are any."""
    name = f"{EarlyDetailUpsampler.name}_{backbone}"
    return name if name in shipped_names() else None


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
        ValueError: there is no such upsampler (close names are suggested), or its weights were
            trained on the early layers of another backbone.
    """
    name = DEFAULT_UPSAMPLER if name is None else str(name)
    found = find_saved(name, UPSAMPLERS, embed_dim, backbone=backbone)
    if found is not None:
        if found.wants_hidden and backbone is not None and name in shipped_names():
            own = name.removeprefix(f"{found.name}_")
            if own != backbone:
                raise ValueError(
                    f"upsampler={name!r} was trained on early layers of {own}, not of {backbone}; "
                    f"give {found.name}, which takes those of the backbone's own"
                )
        return found
    if _is_checkpoint(name):
        return load_checkpoint(name)
    if name and (Path(name).is_dir() or "/" in name):
        return load_pretrained(Upsampler, name, UPSAMPLERS)
    raise ValueError(unknown_name("upsampler", name, list_upsamplers()))
