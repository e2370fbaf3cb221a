"""State of tensors at one time, to check whether a cached result of them is still valid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm


class Snapshot:
    """State of tensors at one time, to check whether a cached result of them is still valid.

    A snapshot keeps references to the tensors, so that no other tensor can reuse their memory.
    Inference tensors have no version counter, so it also keeps copies of their values. Changes of
    a parameter's ``data``, which are not counted, are seen in the parameters' norms.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        """Take the snapshot."""
        self.tensors = tensors
        self.recorded = watched(tensors)
        self.states = [one.clone() if one.is_inference() else _state(one) for one in tensors]
        self.norms = _norms(tensors)

    def holds(self, tensors: list[Tensor]) -> bool:
        """Return whether these are the snapshot's tensors, unchanged and recorded as before."""
        return (
            len(tensors) == len(self.tensors)
            and self.recorded == watched(tensors)
            and all(
                new is old
                and (torch.equal(new, state) if isinstance(state, Tensor) else _state(new) == state)
                for new, old, state in zip(tensors, self.tensors, self.states, strict=True)
            )
            and self.norms == _norms(tensors)
        )


def _state(x: Tensor) -> tuple[int, torch.dtype, int]:
    """Number of changes, type and memory; assigning a parameter's ``data`` counts as no change."""
    return x._version, x.dtype, x.data_ptr() if type(x) is nn.Parameter else 0


def _norms(tensors: list[Tensor]) -> list[float]:
    """Norms of all parameters among the tensors, in a fraction of the time of comparing copies."""
    own = [x.detach() for x in tensors if type(x) is nn.Parameter and x.is_floating_point()]
    # Not in float64, which would take as long as one point of a small map.
    norms = [
        vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for x in own
        if not x.is_meta
    ]
    return torch.stack(norms).tolist() if norms else []  # one transfer from a GPU


def watched(tensors: list[Tensor]) -> bool:
    """Return whether autograd records operations on the tensors."""
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
