"""Copies of a model for several threads, which share the model's tensors.

A forward pass may change the modules that it runs (hooks that record a layer's output, the size of
the last image), so two threads must not run a module at the same time. Copies of the modules that
share their weights cost almost no memory.
"""

from __future__ import annotations

import copy
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import nn

from upfeat.model import FeatUp


class Replica(NamedTuple):
    """A copy of a model, or the model itself with a lock."""

    model: FeatUp
    turn: AbstractContextManager[object]
    """Context to enter while the model runs: a lock if the model is shared."""


def replicate(model: FeatUp, count: int) -> list[Replica]:
    """Copy a model for several threads; its weights must not change while the copies are used.

    Args:
        model: the model to copy.
        count: number of threads.

    Returns:
        ``count`` copies that share the model's parameters and buffers. If copies might share
        further state (the backbone wraps a function, or the model has hooks): ``count`` times the
        model itself, with a common lock.
    """
    turn = threading.Lock() if count > 1 else nullcontext()
    shared = [Replica(model, turn) for _ in range(count)]
    if not all(_is_of_modules(part) for part in (model.backbone.origin, model.upsampler)):
        return shared
    memo = {id(one): one for one in (*model.parameters(), *model.buffers())}
    try:
        copies = [copy.deepcopy(model, dict(memo)) for _ in range(count)]
    except Exception:  # users' modules may raise anything
        return shared
    if any(_is_hooked(one) for one in copies):
        return shared
    return [Replica(one, nullcontext()) for one in copies]


def _is_of_modules(module: nn.Module) -> bool:
    """Return whether a module wraps no function, whose state a copy would share."""
    wrapped = getattr(module, "module", None)
    return wrapped is None or isinstance(wrapped, nn.Module)


def _is_hooked(model: nn.Module) -> bool:
    return any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
