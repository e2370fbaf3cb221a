"""Loading of upsamplers by name, from folders, and from published files."""

from __future__ import annotations

import logging
from pathlib import Path

from upfeat.bounds import path_of
from upfeat.registry import unknown_name
from upfeat.upsamplers.base import UPSAMPLERS, Upsampler
from upfeat.upsamplers.checkpoints import load_checkpoint
from upfeat.upsamplers.detail import DetailUpsampler
from upfeat.upsamplers.early_detail import EarlyDetailUpsampler
from upfeat.upsamplers.saved import find_saved, load_pretrained, shipped_names
from upfeat.upsamplers.tensor_files import SUFFIXES

logger = logging.getLogger(__name__)

DEFAULT_UPSAMPLER = DetailUpsampler.name
"""The default upsampler: with weights trained for the backbone if there are any, else universal."""


def list_upsamplers() -> list[str]:
    """Return the names that ``upfeat.load(upsampler=…)`` and ``upfeat run --upsampler`` accept.

    The name of a class ("jbu_stack") stands for the weights that suit the backbone best; the full
    name of weights ("jbu_stack_universal") for exactly those weights.
    """
    usable = {
        name
        for name, cls in UPSAMPLERS.items()
        if cls.published_by is None and not cls.wants_hidden  # neither kind has universal weights
    }
    return sorted({*usable, *shipped_names()})


def load_upsampler(name: str | Path, *, sha256: str | None = None) -> Upsampler:
    """Load an upsampler for features that are computed elsewhere; in eval mode and frozen.

    Args:
        name: one of :func:`list_upsamplers` ("detail" has weights for any backbone); a folder that
            ``save_pretrained`` wrote; or a checkpoint of FeatUp, AnyUp, JAFAR, NAF or UPLiFT,
            recognised by the names of its tensors. Only tensors are read, never code.
        sha256: expected SHA-256 of the file; ``None`` for no check.

    Returns:
        The upsampler; call it as ``upsampler(features, image)``, the image normalised by the
        upsampler's ``mean`` and ``std``. For a checkpoint, the method that was recognised is stored
        in ``origin`` and logged at INFO level.

    Raises:
        FileNotFoundError: ``name`` is a path that does not exist.
        ValueError: there is no such upsampler, or the file is damaged, does not match ``sha256``,
            or contains more than tensors.

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
    path = path_of("name", name)
    return path.suffix.lower() in SUFFIXES or path.is_file()


def trained_for_early(backbone: str) -> str | None:
    """Return the name of weights trained on the early layers of ``backbone``, or ``None``."""
    name = f"{EarlyDetailUpsampler.name}_{backbone}"
    return name if name in shipped_names() else None


def create_upsampler(
    name: str | Path | None, embed_dim: int | None = None, *, backbone: str | None = None
) -> Upsampler:
    """Make an upsampler by name, or load a saved one; in eval mode.

    Args:
        name: one of :func:`list_upsamplers`, a folder that ``save_pretrained`` wrote, or a
            published checkpoint (see :func:`load_upsampler`); ``None`` for the default. Weights
            that were trained for another backbone than ``backbone`` are logged at WARNING level.
        embed_dim: number of feature channels; a class's weights for another number are skipped.
        backbone: name of the backbone, to choose weights that were trained for it; ``None`` for
            the universal weights.

    Raises:
        FileNotFoundError: ``name`` is a path that does not exist.
        ValueError: there is no such upsampler (close names are suggested), or its weights were
            trained on the early layers of another backbone.
    """
    if isinstance(name, type):
        raise TypeError(
            f"upsampler={name.__name__} is a class; give its name, or {name.__name__}(…)"
        )
    name = DEFAULT_UPSAMPLER if name is None else str(name)
    found = find_saved(name, UPSAMPLERS, embed_dim, backbone=backbone)
    if found is not None:
        if backbone is not None and name in shipped_names():
            _check_origin(found, name, embed_dim, backbone)
        return found
    if _is_checkpoint(name):
        return load_checkpoint(name)
    if name and (Path(name).is_dir() or {"/", "\\"} & {*str(name)}):
        return load_pretrained(Upsampler, name, UPSAMPLERS)
    raise ValueError(unknown_name("upsampler", name, list_upsamplers()))


def _check_origin(upsampler: Upsampler, name: str, embed_dim: int | None, backbone: str) -> None:
    """Warn of shipped weights that were trained for another backbone, or refuse them."""
    own = name.removeprefix(f"{upsampler.name}_")
    if own in (backbone, "universal"):
        return
    if upsampler.wants_hidden:
        raise ValueError(
            f"upsampler={name!r} was trained on early layers of {own}, not of {backbone}; "
            f"give {upsampler.name}, which takes those of the backbone's own"
        )
    if getattr(upsampler, "embed_dim", None) in (None, embed_dim):  # others are refused elsewhere
        logger.warning(
            "upsampler=%r was trained for %s, not for %s; %r takes the weights that suit it best",
            *(name, own, backbone, upsampler.name),
        )


def require_upsampler(upsampler: object) -> None:
    """Check that the argument is an :class:`Upsampler`.

    Raises:
        TypeError: the argument is a name, a class or another module.
        ValueError: its ``__init__`` does not call that of the base class.
    """
    if not isinstance(upsampler, Upsampler):
        kind = "a class" if isinstance(upsampler, type) else f"of type {type(upsampler).__name__}"
        raise TypeError(
            f"upsampler is {kind}; give an Upsampler, as upfeat.load_upsampler(name) returns it"
        )
    if "_parameters" not in vars(upsampler):
        raise ValueError(
            f"upsampler is a {type(upsampler).__name__} whose __init__ does not call "
            "super().__init__(); call it there first"
        )
