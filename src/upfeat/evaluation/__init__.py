"""Evaluation of upsamplers on photographs, with bilinear interpolation as the baseline."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upfeat.evaluation.comparison import Comparison, compare
    from upfeat.evaluation.config import EvalConfig
    from upfeat.evaluation.results import Results, Row
    from upfeat.evaluation.run import evaluate

# Imported on first use, so that the command can list its tasks without loading PyTorch. No module
# has the name of a public function, because importing the module would replace the function.
_LAZY = {
    "Comparison": "upfeat.evaluation.comparison",
    "EvalConfig": "upfeat.evaluation.config",
    "Results": "upfeat.evaluation.results",
    "Row": "upfeat.evaluation.results",
    "compare": "upfeat.evaluation.comparison",
    "evaluate": "upfeat.evaluation.run",
}

__all__ = ["Comparison", "EvalConfig", "Results", "Row", "compare", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        globals()[name] = value = getattr(import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
