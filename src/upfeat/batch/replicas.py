"""One model for several threads: copies that share its tensors.

A pass may leave something in the modules that it runs through (hooks that catch a layer's output,
sizes of the last image), so two threads must not run one module at the same time. A copy of the
modules without a copy of their weights costs next to nothing.
"""

from __future__ import annotations

import copy
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import nn

from upfeat.backbones.efficientnet_lite import ConvNorm
from upfeat.model import FeatUp


class Replica(NamedTuple):
    """A model, and what must be held while it runs."""

    model: FeatUp
    turn: AbstractContextManager[object]


def replicate(model: FeatUp, count: int) -> list[Replica]:
    """Make models for several threads, for as long as the model's weights do not change.

    Args:
        model: what every one of them computes.
        count: threads.

    Returns:
        That many copies that share the model's parameters and buffers; or, where copies are not
        sure to be apart (functions, hooks that somebody registered), the model again and again,
        with a lock.
    """
    turn = threading.Lock() if count > 1 else nullcontext()
    shared = [Replica(model, turn) for _ in range(count)]
    if not all(_is_of_modules(part) for part in (model.backbone, model.upsampler)):
        return shared
    memo = {id(one): one for one in (*model.parameters(), *model.buffers())}
    try:
        copies = [copy.deepcopy(model, dict(memo)) for _ in range(count)]
    except Exception:  # modules of strangers raise what they like
        return shared
    if any(_is_hooked(one) for one in copies):
        return shared
    for module in (module for one in copies for module in one.modules()):
        if isinstance(module, ConvNorm):
            module.keep_folded()
    return [Replica(one, nullcontext()) for one in copies]


def _is_of_modules(module: nn.Module) -> bool:
    """Return whether a module, and what it wraps, is known to hold all that a pass changes."""
    wrapped = getattr(module, "module", None)
    return wrapped is None or isinstance(wrapped, nn.Module)


def _is_hooked(model: nn.Module) -> bool:
    return any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
