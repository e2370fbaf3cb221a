"""Conformance: everything of ours passes, and faults are found and named."""

import pytest
import torch
from small_upsamplers import SMALL

import upfeat
from upfeat import testing
from upfeat.backends import dispatch
from upfeat.testing.upsamplers import PROPERTIES
from upfeat.upsamplers.base import UPSAMPLERS

UNCLAIMED = {
    "anyup": ["flips"],
    "jafar": ["flips"],  # pixels know their place, from a corner on
    "naf": ["flips"],
    "uplift": ["flips"],
    "jbu_stack": ["constants", "flips"],  # weights need not sum to 1; filters have no symmetry
}


def test_every_upsampler_class_conforms(name):
    held = testing.check_upsampler(SMALL[name], without=UNCLAIMED.get(name, ()))
    assert len(held) > len(PROPERTIES) // 2


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(UPSAMPLERS))


@pytest.mark.parametrize("options", [{}, {"ridge": 0.0}, {"back_projections": 0}])
def test_universal_detail_conforms(options):
    testing.check_upsampler(lambda: upfeat.DetailUpsampler(query_dim=8, levels=3, **options))


@pytest.mark.parametrize("backend", list(dispatch.BACKENDS))
def test_every_backend_conforms(backend):
    reason = dispatch.availability()[backend]
    if reason is not None:
        pytest.skip(reason)
    device = "cuda" if backend == "triton" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter has tests of its own")
    assert "values" in testing.check_backend(backend, device=device)


class Shifted:
    """Kernels of which a window is one row off."""

    def __init__(self, kernels):
        self.kernels = kernels

    def __call__(self, features):
        return self.kernels(features)

    def crop(self, features, window):
        top = max(window.top - 1, 0)
        return self.kernels.crop(features, window._replace(top=top))


class CropOneOff(upfeat.Bilinear):
    def prepare(self, *arguments):
        return Shifted(super().prepare(*arguments))


class Brighter(upfeat.Bilinear):
    def mix(self, features):
        return 1.01 * features


class Squares(upfeat.Bilinear):
    def mix(self, features):
        return features.square()


class Leaning(upfeat.Bilinear):
    def forward(self, features, guidance, output_size=None):
        return super().forward(features, guidance, output_size).roll(1, -1)


class Forgetful(upfeat.Bilinear):
    def forward(self, features, guidance, output_size=None):
        return super().forward(features, guidance)


class Mixing(upfeat.Bilinear):
    def mix(self, features):
        return features + 0.1 * features.mean(0, keepdim=True)


class Dead(upfeat.Bilinear):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.ones(3))


class Drawing(upfeat.Bilinear):
    def mix(self, features):
        torch.rand(1)
        return features


class Single(upfeat.Bilinear):
    def mix(self, features):
        return features.float()


class Lenient(upfeat.Bilinear):
    def forward(self, features, guidance, output_size=None):
        return super().forward(features.nan_to_num(0), guidance, output_size)


FAULTS = {
    "windows": CropOneOff,
    "constants": Brighter,
    "affine": Squares,
    "flips": Leaning,
    "output_sizes": Forgetful,
    "batches": Mixing,
    "gradients": Dead,
    "side_effects": Drawing,
    "dtypes": Single,
    "refusals": Lenient,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault):
    others = [other for other in PROPERTIES if other != fault]
    with pytest.raises(AssertionError, match=rf"^{FAULTS[fault].__name__}: {fault}: \w"):
        testing.check_upsampler(FAULTS[fault], without=others)
    testing.check_upsampler(upfeat.Bilinear, without=others)


def test_a_wrong_kernel_is_found(monkeypatch):
    eager = dispatch.BACKENDS["eager"]
    right = eager.neighbourhood_upsample

    def wrong(features, *arguments):
        return 1.001 * right(features, *arguments)

    monkeypatch.setattr(eager, "neighbourhood_upsample", wrong)
    with pytest.raises(AssertionError, match=r"backend eager: values: .*neighbourhood_upsample"):
        testing.check_backend("eager")


def test_what_cannot_be_checked_is_said():
    with pytest.raises(ValueError, match='"cuda" is unknown'):
        testing.check_backend("cuda")
    with pytest.raises(ValueError, match="did you mean windows"):
        testing.check_upsampler(upfeat.Bilinear, without=["window"])
    for name, reason in dispatch.availability().items():
        if reason is not None:
            with pytest.raises(ValueError, match="cannot be checked"):
                testing.check_backend(name)
