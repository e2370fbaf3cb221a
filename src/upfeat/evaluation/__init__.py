"""Measuring upsamplers: probes on labelled photographs, always with bilinear in the table."""

from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.evaluate import evaluate
from upfeat.evaluation.results import Results, Row

__all__ = ["EvalConfig", "Results", "Row", "evaluate"]
