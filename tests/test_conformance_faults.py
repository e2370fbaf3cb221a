"""Mutation tests of the conformance suites: a module that breaks a property fails that one."""

import copy

import pytest
import torch
from torch import nn

import upfeat
from upfeat.backbones import Backbone
from upfeat.backends import dispatch
from upfeat.testing import backbones as backbone_suite
from upfeat.testing import check_backbone, check_backend, check_upsampler
from upfeat.testing import operators as backend_suite
from upfeat.testing import upsamplers as upsampler_suite

Bilinear = upfeat.Bilinear


class NotAtOnePixel(Bilinear):
    def forward(self, features, guidance, output_size=None):
        out = super().forward(features, guidance, output_size)
        return out * torch.nan if out.shape[2:] == (1, 1) else out


class SingleOnly(Bilinear):
    def forward(self, features, guidance, output_size=None):
        if features.dtype == torch.float64:
            raise RuntimeError("expected Float but found Double")
        return super().forward(features, guidance, output_size)


class Rounding(Bilinear):
    def forward(self, features, guidance, output_size=None):
        if features.dtype == torch.float64:
            features = features.round()
        return super().forward(features, guidance, output_size)


class Offset(Bilinear):
    @property
    def offset(self):
        return torch.full((4,), 0.01)


class Clipped(Bilinear):
    def mix(self, features):
        return features.clamp(-1, 1)


class TopDown(Bilinear):
    def mix(self, features):
        rows = torch.linspace(0.9, 1.1, features.shape[2])
        return features * rows[:, None].to(features)


class FirstOfABatch(Bilinear):
    def mix(self, features):
        return features[:1].expand(features.shape)


class ByMemory(Bilinear):
    def forward(self, features, guidance, output_size=None):
        scale = 1 if guidance.is_contiguous() else 1.01
        return scale * super().forward(features, guidance, output_size)


class FullOneOff(Bilinear):
    def render(self, kernels, mixed, *, head=None, window=None):
        out = super().render(kernels, mixed, head=head, window=window)
        return out if window is not None else out.roll(1, 2)


class HeadWithoutItsSign(Bilinear):
    def render(self, kernels, mixed, *, head=None, window=None):
        return super().render(kernels, mixed, head=head.abs() if head is not None else None)


class Detached(Bilinear):
    def mix(self, features):
        return features.detach()


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return 2 * gradient


class WrongGradient(Bilinear):
    def mix(self, features):
        return _Doubled.apply(features)


class Boundless(Bilinear):
    """One that looks at all cells and says that it does not."""

    reach = 1

    def mix(self, features):
        return features + 0.01 * features.mean((2, 3), keepdim=True)


class Nearsighted(upfeat.NeighbourhoodUpsampler):
    """One whose queries come from farther pixels than it says."""

    reach = 2

    def __init__(self):
        super().__init__(query_dim=8, levels=3)


class Unsaid(Bilinear):
    """One whose configuration is no JSON."""

    def config(self):
        return {"device": torch.device("cpu")}


class Sharing(Bilinear):
    """One that copies to something else."""

    scale = 1.0

    def mix(self, features):
        return self.scale * features

    def __deepcopy__(self, memory):
        other = type(self)()
        other.scale = 2.0
        return other


class AnyBackend(Bilinear):
    def set_backend(self, backend):
        pass


class OtherOnTheReference(Bilinear):
    def set_backend(self, backend):
        super().set_backend(backend)
        self.chosen = backend

    def mix(self, features):
        return features * (1.1 if getattr(self, "chosen", "auto") == "reference" else 1)


class TakesInfinity(Bilinear):
    def forward(self, features, guidance, output_size=None):
        return super().forward(features, guidance.nan_to_num(0, 0, 0), output_size)


class TakesTwoImages(Bilinear):
    def forward(self, features, guidance, output_size=None):
        return super().forward(features, guidance[: len(features)], output_size)


class TakesNoBatch(Bilinear):
    def forward(self, features, guidance, output_size=None):
        features = features[None] if features.dim() == 3 else features
        return super().forward(features, guidance, output_size)


class TakesNoSize(Bilinear):
    def forward(self, features, guidance, output_size=None):
        if output_size is not None:
            output_size = tuple(max(side, 1) for side in output_size)
        return super().forward(features, guidance, output_size)


class InPlace(Bilinear):
    def forward(self, features, guidance, output_size=None):
        out = super().forward(features, guidance, output_size)
        guidance.add_(1)
        return out


class Counting(Bilinear):
    calls = 0

    def forward(self, features, guidance, output_size=None):
        self.calls += 1
        return super().forward(features, guidance, output_size) + 1e-6 * self.calls


UPSAMPLERS = [
    ("output_sizes", NotAtOnePixel, "holds NaN or infinity at"),
    ("dtypes", SingleOnly, "expected Float"),
    ("dtypes", Rounding, "float64 strays by"),
    ("constants", Offset, "0.01"),
    ("affine", Clipped, ""),
    ("flips", TopDown, ""),
    ("batches", FirstOfABatch, ""),
    ("batches", ByMemory, ""),
    ("windows", FullOneOff, ""),
    ("heads", HeadWithoutItsSign, ""),
    ("gradients", Detached, "features"),
    ("gradients", WrongGradient, ""),
    ("reach", Boundless, "reach=1, but farther pixels change by"),
    ("reach", Nearsighted, "reach=2, but farther pixels change by"),
    ("copies", Unsaid, "not JSON serializable"),
    ("copies", Sharing, ""),
    ("named_backends", AnyBackend, "is accepted"),
    ("named_backends", OtherOnTheReference, ""),
    ("refusals", TakesInfinity, "guidance with infinity is accepted"),
    ("refusals", TakesTwoImages, "two images for one map is accepted"),
    ("refusals", TakesNoBatch, "features without a batch is accepted"),
    ("refusals", TakesNoSize, "an output size of 0 is accepted"),
    ("side_effects", InPlace, "changes its inputs"),
    ("side_effects", Counting, "differs from call to call"),
]


@pytest.mark.parametrize(("fault", "make", "words"), UPSAMPLERS)
def test_an_upsampler_that_breaks_a_property_fails_it(fault, make, words):
    others = [name for name in upsampler_suite.PROPERTIES if name != fault]
    with pytest.raises(AssertionError, match=rf"(?s)^{make.__name__}: {fault}: .*{words}"):
        check_upsampler(make, without=others)


class Cells(Backbone):
    """A right one, small: a convolution of each cell's pixels."""

    def __init__(self, **facts):
        super().__init__(**{"name": "cells", "embed_dim": 6, "stride": 8, **facts})
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 3, 8, 8, generator=draw) / 14)

    def extract(self, x):
        return torch.nn.functional.conv2d(x, self.weight.to(x), stride=8)


class OtherChannels(Cells):
    def extract(self, x):
        return super().extract(x)[:, :5]


class NoName(Cells):
    def __init__(self):
        super().__init__(name="")


class FlatMean(Cells):
    def __init__(self):
        super().__init__()
        self.mean = self.mean.flatten()


class SquareOnly(Cells):
    def extract(self, x):
        out = super().extract(x)
        side = min(out.shape[2:])
        return out[:, :, :side, :side]


class InfiniteWhereTall(Cells):
    def extract(self, x):
        out = super().extract(x)
        return out / 0 if out.shape[2] > out.shape[3] + 1 else out


class AlwaysDouble(Cells):
    def forward(self, x):
        return super().forward(x).double()


class Transposed(Cells):
    """Cells column by column under the shape of row by row."""

    def extract(self, x):
        out = super().extract(x)
        return out.mT.flatten(2).unflatten(2, out.shape[2:])


class Shifted(Cells):
    def extract(self, x):
        return super().extract(x).roll(3, 2)


class NormalisedByBatch(Cells):
    def extract(self, x):
        out = super().extract(x)
        return out - out.mean((0, 2, 3), keepdim=True)


class Noisy(Cells):
    def extract(self, x):
        return super().extract(x + 0.01 * torch.randn_like(x))


class Overwriting(Cells):
    def forward(self, x):
        out = super().forward(x)
        x.mul_(0.5)
        return out


class Stubborn(Cells):
    """One that records a graph where none is wanted."""

    def forward(self, x):
        with torch.enable_grad():
            return super().forward(x)


class NoGraph(Cells):
    def extract(self, x):
        return super().extract(x.detach()) + 0 * x.sum()


class NaNGradient(Cells):
    def extract(self, x):
        return super().extract(x) + (x - x).sqrt().sum() * 0


class HalfImages(Cells):
    def preprocess(self, image, size=None, **options):
        return super().preprocess(image, size, **options).half()


class CutImages(Cells):
    def preprocess(self, image, size=None, **options):
        return super().preprocess(image, size, **options)[..., :-1]


class OtherInBfloat16(Cells):
    def extract(self, x):
        out = super().extract(x)
        return out.roll(1, 1) if x.dtype == torch.bfloat16 else out


class KeepsHalf(Cells):
    def forward(self, x):
        return self.extract(self._ready(x))


class OverflowsInHalf(Cells):
    def extract(self, x):
        big = 1e4 * super().extract(x)
        return (big * big / 1e8).clamp(max=60000) if x.dtype == torch.float16 else big / 1e4


class LosesItself(Cells):
    def __getstate__(self):
        state = copy.deepcopy(self.__dict__)
        state["_parameters"]["weight"] = nn.Parameter(torch.ones(6, 3, 8, 8))
        return state


class Local(Cells):
    def __reduce__(self):
        raise TypeError("cannot pickle this")


class TakesOneImage(Cells):
    def forward(self, x):
        return super().forward(x[None] if x.dim() == 3 else x)


class TakesTwoBands(Cells):
    def forward(self, x):
        return super().forward(x[:, :1].repeat(1, 3, 1, 1) if x.dim() == 4 else x)


BACKBONES = [
    ("sizes", OtherChannels, "give"),
    ("facts", NoName, "name is empty"),
    ("facts", FlatMean, "mean is"),
    ("sizes", SquareOnly, "give"),
    ("sizes", InfiniteWhereTall, "NaN or infinity"),
    ("sizes", AlwaysDouble, "float32 images give torch.float64"),
    ("order", Transposed, "at"),
    ("order", Shifted, "at"),
    ("batches", NormalisedByBatch, "differ by"),
    ("repeats", Noisy, "differ by"),
    ("repeats", Overwriting, "the image is changed"),
    ("gradients", Stubborn, "a graph is recorded"),
    ("gradients", NoGraph, "the gradient is 0"),
    ("gradients", NaNGradient, "NaN or infinity"),
    ("device", HalfImages, "images are torch.float16"),
    ("device", CutImages, "images are"),
    ("bfloat16", OtherInBfloat16, "the cosine to float32 is"),
    ("bfloat16", KeepsHalf, "float32 images give torch.bfloat16"),
    ("float16", KeepsHalf, "float32 images give torch.float16"),
    ("float16", OverflowsInHalf, ""),
    ("pickling", LosesItself, "differ by"),
    ("pickling", Local, "cannot pickle"),
    ("refusals", TakesOneImage, "is taken"),
    ("refusals", TakesTwoBands, "is taken"),
]


def test_the_right_backbone_holds_all():
    held = check_backbone(Cells)
    assert sorted([*held, "mode"]) == sorted(backbone_suite.PROPERTIES)  # mode: of wrapped ones


@pytest.mark.parametrize(("fault", "make", "words"), BACKBONES)
def test_a_backbone_that_breaks_a_property_fails_it(fault, make, words):
    others = [name for name in backbone_suite.PROPERTIES if name != fault]
    with pytest.raises(AssertionError, match=rf"(?s)^\w*: {fault}: .*{words}"):
        check_backbone(make, without=others)


class Wakeful(nn.Module):
    """A module that cannot be kept in eval mode."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 8, 8, stride=8)

    def forward(self, x):
        return self.inner(x)

    def train(self, mode=True):
        return super().train(True)


def test_a_module_that_leaves_eval_mode_fails_it():
    others = [name for name in backbone_suite.PROPERTIES if name != "mode"]
    with pytest.raises(AssertionError, match=r"mode: .*in train mode: Wakeful, Conv2d"):
        check_backbone(Wakeful, without=others)


def _values(right):
    return lambda *arguments: 1.001 * right(*arguments)


def _layouts(right):
    def wrong(*arguments):
        dense = all(one.is_contiguous() for one in arguments[:2])
        return right(*arguments) * (1 if dense else 1.01)

    return wrong


def _half_precision(right):
    return lambda *arguments: right(*arguments).float()


def _half_values(right):
    def wrong(*arguments):
        out = right(*arguments)
        return out if out.dtype == torch.float32 else 2 * out

    return wrong


def _gradients(right):
    return lambda *arguments: _Doubled.apply(right(*arguments))


def _silent(right):
    return lambda first, *rest: right(first.detach(), *rest)


def _counting(right):
    calls = []

    def wrong(*arguments):
        calls.append(1)
        return right(*arguments) + 1e-6 * len(calls)

    return wrong


def _in_place(right):
    def wrong(first, *rest):
        out = right(first, *rest)
        first.add_(1)
        return out

    return wrong


BACKENDS = [
    ("values", _values, ""),
    ("layouts", _layouts, ""),
    ("half_precision", _half_precision, "gives torch.float32 for torch.bfloat16"),
    ("half_precision", _half_values, ""),
    ("gradients", _gradients, ""),
    ("gradients", _silent, ""),
    ("repeats", _counting, "differs from call to call"),
    ("repeats", _in_place, "changes its inputs"),
]
OPERATORS = ["joint_bilateral_upsample", "adaptive_conv2d", "neighbourhood_weights"]


@pytest.mark.parametrize(("fault", "spoil", "words"), BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_that_breaks_a_property_fails_it(monkeypatch, fault, spoil, words, operator):
    eager = dispatch.BACKENDS["eager"]
    monkeypatch.setattr(eager, operator, spoil(getattr(eager, operator)))
    others = [name for name in backend_suite.PROPERTIES if name != fault]
    with pytest.raises(AssertionError, match=rf"(?s)^backend eager: {fault}: .*{words}"):
        check_backend("eager", without=others)


def test_operators_that_take_anything_fail_refusals(monkeypatch):
    monkeypatch.setattr(
        upfeat.functional, "neighbourhood_upsample", lambda features, weights, backend: features
    )
    others = [name for name in backend_suite.PROPERTIES if name != "refusals"]
    with pytest.raises(AssertionError, match="accepts"):
        check_backend("eager", without=others)


def test_a_backend_that_runs_nothing_is_no_backend(monkeypatch):
    def refuse(*arguments):
        raise ValueError("not today")

    monkeypatch.setattr(dispatch, "call", refuse)
    with pytest.raises(AssertionError, match="runs none of the operators"):
        check_backend("eager", without=["refusals"])
