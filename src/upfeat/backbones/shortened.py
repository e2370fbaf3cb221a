"""Models without the blocks behind the last one whose output is needed.

A shortened model is a shallow copy: the modules on the way to the list of blocks are copied, and
share everything but their children with the originals; the list is shorter. It is made for a single
call, so that it has the weights, hooks and mode that the model has then, and the model itself does
not change. The caller tests whether a copy returns what the model returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

_INSTALLED = "_output_capturing_hooks_installed"
"""Attribute of models on whose blocks transformers has put its hooks that record hidden states."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Cut(NamedTuple):
    """Description of a shortened model."""

    path: tuple[str, ...]
    """Names of children, from the model to the module that contains the blocks."""
    lists: tuple[str, ...]
    """Names of that module's lists: of the blocks, and of further modules for each block."""
    kept: int
    """Number of blocks that are kept."""
    bare: bool
    """True if modules behind the blocks, such as a norm of the last one, return their input."""
    recording: tuple[bool, ...]
    """Of the model and each module on the path: whether transformers records by hooks below it."""
    states: int = 0
    """Number of hidden states that the copy returns; 0 until it was run."""


def cuts(network: nn.Module, blocks: int, kept: int) -> list[Cut]:
    """List the ways to shorten a model, those with fewest changes first.

    Args:
        network: the model, after a call that recorded hidden states.
        blocks: number of its blocks.
        kept: number of blocks to keep.

    Returns:
        The ways; none if no module has lists of that many entries, or several modules have.
    """
    found: dict[str, list[str]] = {}
    outer: list[str] = []
    for name, module in network.named_modules():
        nested = any(name.startswith(f"{one}.") for one in outer)
        if name and isinstance(module, nn.ModuleList) and len(module) == blocks and not nested:
            parent, _, own = name.rpartition(".")
            found.setdefault(parent, []).append(own)
            outer.append(name)
    if len(found) != 1 or kept >= blocks:
        return []
    [(parent, lists)] = found.items()
    path = tuple(parent.split(".")) if parent else ()
    recording = tuple(_records(one) for one in _along(network, path))
    return [Cut(path, tuple(lists), kept, bare, recording) for bare in (False, True)]


def shortened(network: nn.Module, cut: Cut) -> nn.Module | None:
    """Return a shortened copy of a model, which shares its blocks, parameters and buffers.

    Returns:
        The copy; ``None`` if modules that it lacks have hooks of a user, or if transformers has
        removed its own hooks: it would put them on the shared blocks, and note that on the copy.
    """
    originals = _along(network, cut.path)
    if any(was and not _records(one) for one, was in zip(originals, cut.recording, strict=True)):
        return None
    lacking: list[nn.Module] = []
    short: Any = None
    for depth, original in reversed(list(enumerate(originals))):
        copied, children = _copy(original), original._modules
        if cut.recording[depth]:  # whatever another thread has removed since
            setattr(copied, _INSTALLED, True)
        if short is None:
            for name in cut.lists:
                entries: Any = children[name]
                copied._modules[name] = _copy(entries, range(cut.kept))
                lacking += entries[cut.kept :]
        else:
            copied._modules[cut.path[depth]] = short
        short = copied
        for name in _behind(children, cut.path[depth : depth + 1] or cut.lists):
            if cut.bare and (module := children[name]) is not None:
                copied._modules[name] = _Unchanged()
                lacking.append(module)
    return None if any(_is_hooked(one) for one in lacking) else short


def is_recorder(hook: object) -> bool:
    """Return whether a hook is one by which transformers records hidden states."""
    return type(hook).__module__ == "builtins" and "output_cap" in getattr(hook, "__qualname__", "")


def remove_recorders(network: nn.Module) -> None:
    """Remove the hooks by which transformers records hidden states, which cannot be pickled.

    transformers installs them again when hidden states are next requested.
    """
    for module in network.modules():
        hooks = module._forward_hooks
        for key, hook in list(hooks.items()):
            if is_recorder(hook):
                del hooks[key]
        if hasattr(module, _INSTALLED):
            setattr(module, _INSTALLED, False)


class _Unchanged(nn.Module):
    """A module that returns its input."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return x


def _along(network: nn.Module, path: Sequence[str]) -> list[nn.Module]:
    """The model and the modules on a path, from the outermost to the innermost."""
    modules = [network]
    for name in path:
        modules.append(modules[-1].get_submodule(name))
    return modules


def _copy(module: nn.Module, entries: Iterable[int] | None = None) -> nn.Module:
    """Copy a module, with some entries of a list only; everything but the children is shared."""
    copied: nn.Module = object.__new__(type(module))
    children = dict(module._modules)
    if entries is not None:
        children = {str(one): children[str(one)] for one in entries}
    vars(copied).update(vars(module), _modules=children)
    return copied


def _behind(children: Any, names: Sequence[str]) -> list[str]:
    """Names of the children behind the last of some."""
    order = list(children)
    return order[1 + max(order.index(name) for name in names) :]


def _records(module: nn.Module) -> bool:
    return bool(vars(module).get(_INSTALLED))


def _is_hooked(module: nn.Module) -> bool:
    """Return whether a module, or one inside, has hooks other than those of transformers."""
    return any(
        not is_recorder(hook)
        for one in module.modules()
        for hooks in _HOOKS
        for hook in getattr(one, hooks).values()
    )
