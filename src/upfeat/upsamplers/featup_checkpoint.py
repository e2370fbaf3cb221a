"""Checkpoints in the layout that FeatUp published: names, shapes and safe reading."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from upfeat.bounds import path_of
from upfeat.tensor_checks import check_values, fault_in_memory
from upfeat.upsamplers.tensor_files import load_pickled

logger = logging.getLogger(__name__)

N_STAGES = 4
"""Number of stages of every published stack; the radius of each stage is 3."""

_STAGE_SHAPES = {
    "range_temp": (),
    "sigma_spatial": (),
    "range_proj.0.weight": (32, 3, 1, 1),
    "range_proj.0.bias": (32,),
    "range_proj.3.weight": (32, 32, 1, 1),
    "range_proj.3.bias": (32,),
    "fixup_proj.0.weight": (49, 52, 1, 1),
    "fixup_proj.0.bias": (49,),
    "fixup_proj.3.weight": (49, 49, 1, 1),
    "fixup_proj.3.bias": (49,),
}
_MIX = "upsampler.fixup_proj.1."


def read_featup(path: str | Path) -> tuple[dict[str, Tensor], int]:
    """Read the upsampler of a published checkpoint, under this library's names.

    Args:
        path: the ``.ckpt`` file.

    Returns:
        The state of a ``JBUStack``, and its ``embed_dim``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as :meth:`upfeat.JBUStack.from_featup`.
    """
    path = path_of("path", path)
    content = load_pickled(path)
    return featup_state(path, content.get("state_dict", content))


def featup_state(path: Path, content: Any) -> tuple[dict[str, Tensor], int]:
    """Convert tensors by published names to the state of a ``JBUStack`` and its ``embed_dim``.

    Args:
        path: the file, for error messages.
        content: dictionary of the file's tensors.

    Raises:
        ValueError: tensors are missing, of another shape, or not finite.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a dictionary of tensors")
    bias = content.get(f"{_MIX}bias")
    embed_dim = bias.numel() if isinstance(bias, Tensor) else 0
    layout = _layout(embed_dim)
    missing = [name for name in layout if not isinstance(content.get(name), Tensor)]
    if missing:
        raise ValueError(
            f"{path}: not a FeatUp JBU stack; {len(missing)} of its {len(layout)} tensors are "
            f"missing: {', '.join(missing)}"
        )
    wrong = [
        f"{name} is {tuple(content[name].shape)}, not {shape}"
        for name, (_, shape) in layout.items()
        if tuple(content[name].shape) != shape
    ]
    if wrong:
        raise ValueError(f"{path}: tensors of another shape: {'; '.join(wrong)}")
    extra = sorted(map(str, set(content) - set(layout)))
    if extra:
        logger.info("%s: left unread: %s", path, ", ".join(extra))
    for name in layout:
        fault = fault_in_memory(content[name])
        if fault is not None:
            raise ValueError(f"{path}: {name} {fault}")
    check_values(path, {name: content[name] for name in layout})
    return {ours: content[theirs].float() for theirs, (ours, _) in layout.items()}, embed_dim


def _layout(embed_dim: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map published names to pairs of our name and shape."""
    stages = {
        f"upsampler.up{stage + 1}.{name}": (
            f"stages.{stage}.{name.replace('range_temp', 'range_temperature')}",
            shape,
        )
        for stage in range(N_STAGES)
        for name, shape in _STAGE_SHAPES.items()
    }
    return stages | {
        f"{_MIX}weight": ("channel_mix.weight", (embed_dim, embed_dim, 1, 1)),
        f"{_MIX}bias": ("channel_mix.bias", (embed_dim,)),
    }
