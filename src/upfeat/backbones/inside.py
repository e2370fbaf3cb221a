"""The outputs of modules inside a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.backbones.outputs import concatenate


class LayerFeatures(nn.Module):
    """A network up to some of its modules, by their names; what they return, side by side.

    The network runs until the last of them has; what comes after, such as a head for one image
    size, is left out.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        """Choose modules.

        Args:
            network: any module.
            names: of modules inside, as ``network.named_modules()`` has them.
        """
        super().__init__()
        self.network = network
        self.names = list(names)

    def forward(self, x: Tensor) -> Any:
        """(B, 3, H, W) -> what the modules return, maps concatenated."""
        found: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                found[name] = output
                # Whatever traces for an export must see every module end; what nothing reads of
                # the rest is left out of the program.
                if len(found) == len(self.names) and not _exporting():
                    raise _Done

            return hook

        modules = dict(self.network.named_modules())
        handles = [modules[name].register_forward_hook(keep(name)) for name in self.names]
        try:
            self.network(x)
        except _Done:
            pass
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.names if name not in found]
        if missing:
            raise ValueError(f"layer {', '.join(missing)} does not run when the network does")
        outputs = [found[name] for name in self.names]
        if len(outputs) == 1:
            return outputs[0]
        if any(not isinstance(one, Tensor) or one.dim() != 4 for one in outputs):
            raise ValueError(
                f"layers {', '.join(self.names)} do not all return (B, C, h, w); give one layer"
            )
        return concatenate(outputs)


def outputs_inside(
    network: nn.Module, run: Callable[[], Tensor], names: Sequence[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a network and see what modules inside return that are maps (B, C, h, w).

    Args:
        network: whose modules to watch.
        run: runs it.
        names: of modules, as ``network.named_modules()`` has them; ``None`` for all.

    Returns:
        What ``run`` returned, and the maps by name, in the order in which modules ended.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                found.pop(name, None)  # one that runs twice stands where it ran last
                found[name] = output

        return hook

    modules = dict(network.named_modules())
    handles = [
        modules[name].register_forward_hook(keep(name))
        for name in (modules if names is None else names)
    ]
    try:
        return run(), found
    finally:
        for handle in handles:
            handle.remove()


def _exporting() -> bool:
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


class _Done(Exception):
    """Raised to leave a network once the modules chosen have run."""
