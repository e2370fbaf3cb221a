"""State of tensors at one time, to check whether a cached result of them is still valid."""

from __future__ import annotations

import torch
from torch import Tensor


class Snapshot:
    """State of tensors at one time, to check whether a cached result of them is still valid.

    A snapshot keeps references to the tensors, so that no other tensor can reuse their memory.
    Inference tensors have no version counter, so it also keeps copies of their values.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        """Take the snapshot."""
        self.tensors = tensors
        self.recorded = watched(tensors)
        self.states = [one.clone() if one.is_inference() else one._version for one in tensors]

    def holds(self, tensors: list[Tensor]) -> bool:
        """Return whether these are the snapshot's tensors, unchanged and recorded as before."""
        return (
            len(tensors) == len(self.tensors)
            and self.recorded == watched(tensors)
            and all(
                new is old
                and (
                    torch.equal(new, state) if isinstance(state, Tensor) else new._version == state
                )
                for new, old, state in zip(tensors, self.tensors, self.states, strict=True)
            )
        )


def watched(tensors: list[Tensor]) -> bool:
    """Return whether autograd records operations on the tensors."""
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
