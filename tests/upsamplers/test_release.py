"""What is made of one image goes with its last user, without Python's collector."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from upsamplers.test_ways import MADE, inputs

from upfeat.features import UpsampledFeatures
from upfeat.types import Window


class Made(TorchDispatchMode):
    """Remembers the storages of all tensors that operators make, without holding them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor):
                self.seen.append(weakref.ref(one))
        return out


@pytest.mark.parametrize("whole", [1 << 20, 100], ids=["whole", "by windows"])
@pytest.mark.parametrize("name", MADE)
def test_no_tensor_outlives_the_map(name, whole, monkeypatch):
    """Objects that hold each other keep their tensors until the collector comes by.

    It counts objects and not bytes: tiles of a raster then add up to gigabytes.
    """
    monkeypatch.setattr("upfeat.upsamplers.maps.WHOLE", whole)
    upsampler = MADE[name]().eval()
    features, guidance = inputs(height=6, width=8)

    def use():
        lazy = UpsampledFeatures(features, guidance, upsampler)
        lazy.crop(3, 5, 20, 30)
        lazy.project(torch.ones(2, 8))
        lazy.full()
        kernels = upsampler.prepare(guidance, (6, 8), (48, 64), features)
        upsampler.render(kernels, upsampler.mix(features), window=Window(0, 0, 9, 9))

    with torch.inference_mode(), Made():
        use()  # what is kept for good, here or in PyTorch's dispatch, is made now
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode(), Made() as made:
            use()
        known = [features, guidance, *upsampler.parameters(), *upsampler.buffers()]
        known = {one.data_ptr() for one in known}
        kept = (one() for one in made.seen)
        left = [x.shape for x in kept if x is not None and x.data_ptr() not in known]
        assert not left, f"{name}: {len(left)} tensors are left: {left}"
    finally:
        gc.enable()
