"""Modules that a backbone runs: those of a function, their mode, weights and input."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_LOG = logging.getLogger("upfeat.backbones")

COLOURS = 3
"""Bands of a colour image."""


def held_modules(function: object) -> list[nn.Module]:
    """Find the modules that a function may run: closed over, bound, or global names in it."""
    if isinstance(function, nn.Module):
        return []
    held: dict[int, nn.Module] = {}
    pending: list[object] = [function]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            held[id(one)] = one
        elif isinstance(one, functools.partial):
            pending += [one.func, *one.args, *one.keywords.values()]
        elif inspect.ismethod(one):
            pending += [one.__self__, one.__func__] if isinstance(one.__self__, nn.Module) else []
        elif inspect.isfunction(one) and not one.__module__.startswith("torch"):
            names = inspect.getclosurevars(one)
            pending += [*names.nonlocals.values(), *names.globals.values()]
    return list(held.values())


def settle_mode(name: str, module: object, held: list[nn.Module]) -> None:
    """Put a module, or all modules that a function uses, in eval mode; warn of the latter."""
    if isinstance(module, nn.Module):
        module.eval()
    training = [plain_name(one) for one in held if one.training]
    for one in held:
        one.eval()
    if training:
        _LOG.warning(
            "%s runs %s, which was in train mode: it is put in eval mode, in which features of an "
            "image do not depend on its batch",
            *(name, ", ".join(training)),
        )


def refuse_meta(name: str, modules: Sequence[object]) -> None:
    """Refuse modules without values, whose features would be whatever the memory contains."""
    for module in modules:
        weights = module.parameters() if isinstance(module, nn.Module) else ()
        if any(one.is_meta for one in weights):
            raise ValueError(
                f"{name} has parameters on meta, without values; load its weights first, as by "
                "load_state_dict(…, assign=True)"
            )


def first_tensor(module: object, held: list[nn.Module]) -> Tensor:
    """Return a parameter, on the device and of the type that the module computes in."""
    for one in [module, *held]:
        if isinstance(one, nn.Module):
            floating = (p for p in one.parameters() if p.is_floating_point())
            first = next(floating, None)
            if first is not None:
                return first
    return torch.empty(0)


def input_channels(modules: Sequence[object]) -> int:
    """Return the number of channels that the first convolution takes; 3 without a convolution."""
    for module in modules:
        for layer in module.modules() if isinstance(module, nn.Module) else ():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
                return layer.in_channels
    return COLOURS


def plain_name(module: object) -> str:
    """Return a module's own name, or that of its class."""
    return getattr(module, "name", None) or type(module).__name__
