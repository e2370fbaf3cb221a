"""Measuring upsamplers: probes on labelled photographs, always with bilinear in the table."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upfeat.evaluation.config import EvalConfig
    from upfeat.evaluation.evaluate import evaluate
    from upfeat.evaluation.results import Results, Row

# Imported when first asked for: the command lists its tasks before PyTorch is loaded.
_LAZY = {
    "EvalConfig": "upfeat.evaluation.config",
    "Results": "upfeat.evaluation.results",
    "Row": "upfeat.evaluation.results",
    "evaluate": "upfeat.evaluation.evaluate",
}

__all__ = ["EvalConfig", "Results", "Row", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        globals()[name] = value = getattr(import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
