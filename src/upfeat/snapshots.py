"""Tensors as they were, to tell whether what was made of them still stands."""

from __future__ import annotations

import torch
from torch import Tensor


class Snapshot:
    """Tensors as they were, to tell whether what was made of them still stands.

    It holds them, so that no other tensor can take their place in memory. Those of inference mode
    do not count their changes: of them it holds a copy too.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        """Take the snapshot."""
        self.tensors = tensors
        self.recorded = watched(tensors)
        self.states = [one.clone() if one.is_inference() else one._version for one in tensors]

    def holds(self, tensors: list[Tensor]) -> bool:
        """Return whether these are the same tensors, unchanged, recorded by autograd alike."""
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
    """Return whether autograd records what is made of tensors."""
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
