"""Upsamplers built from configurations of any origin, with arguments and sizes checked first."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from upfeat.registry import unknown_name

AnyClass = TypeVar("AnyClass")


def build(
    cls: type[AnyClass], config: dict[str, Any], source: str | Path, *, values: bool = True
) -> AnyClass:
    """Make an upsampler from a configuration of any origin; PyTorch's random state is unchanged.

    Args:
        cls: class of the upsampler, with the attributes ``unsaved`` and ``always_small`` of
            :class:`.base.Upsampler`.
        config: arguments of the constructor.
        source: name of the configuration in error messages.
        values: ``False`` for a module with shapes but no values, to compare with the header of a
            file before anything large is allocated; ``always_small`` classes get values anyway.

    Raises:
        ValueError: an argument is unknown or out of range.
    """
    about: Any = cls
    known = [name for name in inspect.signature(cls).parameters if name not in about.unsaved]
    for name in config:
        if name not in known:
            raise ValueError(f"{source}: {unknown_name('argument', name[:60], known)}")
    place = nullcontext() if values or about.always_small else torch.device("meta")
    try:
        with torch.random.fork_rng(devices=[]), place:
            return cls(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
