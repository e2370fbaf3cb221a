"""Evaluation of upsamplers on photographs, with bilinear interpolation as the baseline."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upfeat.evaluation.comparison import Comparison, compare
    from upfeat.evaluation.config import EvalConfig
    from upfeat.evaluation.evaluate import evaluate
    from upfeat.evaluation.results import Results, Row

# Imported on first use, so that the command can list its tasks without loading PyTorch.
_LAZY = {
    "Comparison": "upfeat.evaluation.comparison",
    "EvalConfig": "upfeat.evaluation.config",
    "Results": "upfeat.evaluation.results",
    "Row": "upfeat.evaluation.results",
    "compare": "upfeat.evaluation.comparison",
    "evaluate": "upfeat.evaluation.evaluate",
}

__all__ = ["Comparison", "EvalConfig", "Results", "Row", "compare", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        globals()[name] = value = getattr(import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
