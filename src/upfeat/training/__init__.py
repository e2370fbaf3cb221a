"""Training upsamplers on photographs alone, by multi-view consistency."""

from upfeat.training.config import TrainConfig
from upfeat.training.loop import train
from upfeat.training.record import StepReport

__all__ = ["StepReport", "TrainConfig", "train"]
