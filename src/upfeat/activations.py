"""Peak memory of a backbone's forward pass, measured once for each backbone."""

from __future__ import annotations

import weakref
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from upfeat.backbones import Backbone

_ACTIVATIONS: WeakKeyDictionary[Backbone, dict[bool, float]] = WeakKeyDictionary()


def activation_bytes(backbone: Backbone, *, early: bool = False) -> float:
    """Measure the peak memory of a backbone's forward pass, in bytes per pixel of its input.

    With ``early``, early layers are computed as well (:meth:`Backbone.with_hidden`).

    The tensors that are alive are counted while two small images of different sizes are processed;
    the difference of the two peaks excludes memory that does not grow with the image. A quarter is
    added for the workspace of the operators, which is not counted.
    """
    known = _ACTIVATIONS.setdefault(backbone, {})
    if early not in known:
        known[early] = _measure_activations(backbone, early)
    return known[early]


@torch.no_grad()
def _measure_activations(backbone: Backbone, early: bool) -> float:
    sides = (8 * backbone.stride, 16 * backbone.stride)
    peaks = []
    for side in sides:
        x = torch.zeros(1, backbone.in_channels, side, side, device=backbone.mean.device)
        counted = _LiveBytes()
        with counted:
            try:
                (backbone.with_hidden if early else backbone)(x)
            except (RuntimeError, ValueError):  # the backbone accepts one size only: a rough guess
                return 1.5 * 64 * 4
        peaks.append(counted.peak)
    growth = (peaks[1] - peaks[0]) / (sides[1] ** 2 - sides[0] ** 2)
    return 1.25 * max(growth, 12)


class _LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of the operators' outputs while they are alive."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import the compiler in order to disable it: longer than the measurement.
        return False

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self._count(one)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self._users.get(place):
            self._held += size
            self.peak = max(self.peak, self._held)
        self._users[place] = self._users.get(place, 0) + 1
        weakref.finalize(tensor, self._forget, place, size).atexit = False

    def _forget(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            self._held -= size
