"""Checkpoints in the layout that FeatUp published: names, shapes and safe reading."""

from __future__ import annotations

import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat.tensor_checks import check_values

logger = logging.getLogger(__name__)

N_STAGES = 4
"""Stages of every published stack; their radius is 3."""

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
    path = Path(path)
    content = _load_tensors(path)
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
    check_values(path, {name: content[name] for name in layout}, floating=True)
    return {ours: content[theirs].float() for theirs, (ours, _) in layout.items()}, embed_dim


def _layout(embed_dim: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Published name to (our name, shape)."""
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


def _load_tensors(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            # A pickle of another protocol than PyTorch writes is refused or read, as it deserves.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's message goes on for lines with advice to switch its protection off.
        reason = str(error).partition("\n")[0].partition("WeightsUnpickler error")[0].strip()
        raise ValueError(
            f"{path}: holds more than tensors, so it was not loaded (it could run code); save its "
            f"state_dict alone with torch.save [{type(error).__name__}: {reason[:80]}]"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{path}: not a whole PyTorch checkpoint ({reason})") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not a dictionary of tensors")
    return state
