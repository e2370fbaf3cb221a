"""Reading of the outputs of modules inside a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LayerFeatures(nn.Module):
    """A network that returns the outputs of some of its modules.

    The network runs only until the last of these modules has returned. Later modules, such as a
    head for one image size, are not run.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        """Choose modules.

        Args:
            network: any module.
            names: names of modules inside, as in ``network.named_modules()``.
        """
        super().__init__()
        self.network = network
        self.names = list(names)

    def forward(self, x: Tensor) -> Any:
        """(B, 3, H, W) -> the output of the module, or a list of the outputs of several modules."""
        found: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                found[name] = output
                # A tracer must see every module return, so an export runs the whole network; the
                # exported program then omits the operations that its output does not depend on.
                if len(found) == len(set(self.names)) and not _exporting():
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
        return outputs[0] if len(outputs) == 1 else outputs


def outputs_inside(
    network: nn.Module, run: Callable[[], Tensor], names: Sequence[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a network and record the maps (B, C, h, w) that modules inside return.

    Args:
        network: network whose modules to record.
        run: function that runs the network.
        names: names of modules, as in ``network.named_modules()``; ``None`` for all.

    Returns:
        The output of ``run``, and the maps by module name, in the order in which the modules
        returned.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                found.pop(name, None)  # a module that runs twice keeps the place of its last run
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
    """Raised to leave a network once the chosen modules have run."""
