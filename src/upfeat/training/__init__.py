"""Training upsamplers on photographs alone, by multi-view consistency."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upfeat.training.config import TrainConfig
    from upfeat.training.loop import train
    from upfeat.training.record import StepReport

# Imported on first use, so that the command can list its settings without loading PyTorch.
_LAZY = {
    "StepReport": "upfeat.training.record",
    "TrainConfig": "upfeat.training.config",
    "train": "upfeat.training.loop",
}

__all__ = ["StepReport", "TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        globals()[name] = value = getattr(import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
