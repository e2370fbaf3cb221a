"""Ways in which PyTorch runs modules, with every upsampler: the table of docs/guides/pytorch.md."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from small_upsamplers import stack_of
from torch.export import Dim
from torch.func import grad, jvp, vmap

import upfeat
from upfeat.upsamplers.base import UPSAMPLERS

SMALL = {"query_dim": 8, "levels": 2}
MADE = {
    "nearest": upfeat.Nearest,
    "bilinear": upfeat.Bilinear,
    "bicubic": upfeat.Bicubic,
    "joint_bilateral": lambda: upfeat.JointBilateral(radius=1),
    "jbu_stack": lambda: stack_of(8, radius=1, n_stages=2),
    "neighbourhood": lambda: upfeat.NeighbourhoodUpsampler(back_projections=1, **SMALL),
    "detail": lambda: upfeat.DetailUpsampler(**SMALL),
    "detail of a backbone": lambda: upfeat.DetailUpsampler(8, width=4, depth=1, **SMALL),
    "early_detail": lambda: upfeat.EarlyDetailUpsampler(
        8, hidden_dim=3, width=4, depth=1, smoothing=2, **SMALL
    ),
    "anyup": lambda: UPSAMPLERS["anyup"](width=32),
    "jafar": lambda: UPSAMPLERS["jafar"](8, width=32),
    "naf": lambda: UPSAMPLERS["naf"](width=32),
    "uplift": lambda: UPSAMPLERS["uplift"](8, encoder_widths=(4, 6, 8), width=18),
}
PLAIN = ("nearest", "bilinear", "bicubic", "joint_bilateral", "jbu_stack")
"""Those that are traced within a few seconds."""

FIXED = ("anyup", "jafar", "naf", "uplift")
"""Those that are exported for fixed sizes alone."""


def inputs(batch=1, height=3, width=4, stride=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch, 8, height, width, generator=generator)
    guidance = torch.rand(batch, 3, height * stride, width * stride, generator=generator)
    return features.to(dtype), guidance.to(dtype)


def close(a, b, tolerance=1e-3):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def make(name):
    torch.manual_seed(0)
    return MADE[name]().eval().requires_grad_(False)


def traced():
    """Every upsampler, those that take long to trace marked so."""
    return [name if name in PLAIN else pytest.param(name, marks=pytest.mark.slow) for name in MADE]


def test_every_upsampler_is_here():
    assert {type(make(name)).name for name in MADE} == set(UPSAMPLERS)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MADE)
def test_vmap(name):
    upsampler, (features, guidance) = make(name), inputs(3)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            found = vmap(lambda f, g: upsampler(f[None], g[None])[0])(features, guidance)
            close(found, upsampler(features, guidance))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of its scripts
@pytest.mark.parametrize("name", MADE)
def test_jvp(name):
    upsampler = make(name).double()
    features, guidance = inputs(dtype=torch.float64)
    step = torch.randn_like(features)
    _, tangent = jvp(lambda f: upsampler(f, guidance), (features,), (step,))
    after, before = (upsampler(features + sign * 1e-4 * step, guidance) for sign in (1, -1))
    close(tangent, (after - before) / 2e-4)


@pytest.mark.parametrize("name", MADE)
def test_grad(name):
    upsampler, (features, guidance) = make(name), inputs()
    found = grad(lambda f: upsampler(f, guidance).square().sum())(features)
    features.requires_grad_()
    upsampler(features, guidance).square().sum().backward()
    close(found, features.grad)


@pytest.mark.parametrize("name", MADE)
def test_backward(name):
    upsampler, (features, guidance) = make(name).requires_grad_(), inputs()
    shown = {"hidden": torch.rand(1, 3, 6, 8)} if upsampler.wants_hidden else {}
    out = upsampler(features.requires_grad_(), guidance.requires_grad_(), **shown)
    out.square().sum().backward()
    for label, parameter in (("features", features), *upsampler.named_parameters()):
        assert parameter.grad is not None, label
        assert torch.isfinite(parameter.grad).all(), label


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.02), (torch.bfloat16, 0.08)])
def test_half_precision(name, dtype, error):
    upsampler = make(name)
    with torch.no_grad():
        expected = upsampler(*inputs())
        found = copy.deepcopy(upsampler).to(dtype)(*inputs(dtype=dtype))
    assert found.dtype is dtype
    assert (found.float() - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("name", MADE)
def test_autocast(name):
    upsampler = make(name)
    with torch.no_grad():
        expected = upsampler(*inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = upsampler(*inputs())
    assert (found.float() - expected).norm() < 0.08 * expected.norm()


@pytest.mark.parametrize("name", MADE)
def test_copies(name):
    upsampler = make(name)
    with torch.no_grad():
        expected = upsampler(*inputs())
        for again in (copy.deepcopy(upsampler), pickle.loads(pickle.dumps(upsampler))):
            assert torch.equal(again(*inputs()), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dynamo detected a call")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_compile(name, dynamic):
    """Traced whole, for one size and for sizes that it does not know."""
    upsampler = make(name)
    torch._dynamo.reset()
    compiled = torch.compile(upsampler, fullgraph=True, dynamic=dynamic, backend="eager")
    with torch.no_grad():
        for size in [{"batch": 2}, {"batch": 3, "height": 5}] if dynamic else [{}]:
            close(compiled(*inputs(**size)), upsampler(*inputs(**size)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", traced())
def test_export(name):
    upsampler = make(name)
    with torch.no_grad():
        program = torch.export.export(upsampler, inputs())
        close(program.module()(*inputs()), upsampler(*inputs()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MADE)
def test_export_for_any_size(name):
    """Batch, height and width are open, the image's sides whole multiples of the grid's."""
    upsampler = make(name)
    batch, height, width = (Dim(one, min=3 * (one != "b"), max=32) for one in "bhw")
    shapes = ({0: batch, 2: height, 3: width}, {0: batch, 2: 8 * height, 3: 8 * width})
    refused = pytest.raises(ValueError, match=f"{upsampler.name} cannot be exported for a height")
    with torch.no_grad(), refused if name in FIXED else nullcontext():
        example = inputs(2, 4, 5)
        program = torch.export.export(upsampler, example, dynamic_shapes=shapes).module()
        for size in ((1, 3, 4), (3, 7, 5)):
            close(program(*inputs(*size)), upsampler(*inputs(*size)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["joint_bilateral", "neighbourhood"])
def test_sizes_that_are_no_whole_multiples(name):
    """A program for whole multiples refuses them, any other is right."""
    upsampler = make(name)
    height, tall = Dim("h", min=3, max=32), Dim("H", min=24, max=256)
    other = inputs()[0], torch.rand(1, 3, 41, 32)
    with torch.no_grad():
        program = torch.export.export(
            upsampler, inputs(), dynamic_shapes=({2: height}, {2: tall})
        ).module()
        close(program(*inputs(height=5)), upsampler(*inputs(height=5)))
        if name == "joint_bilateral":
            close(program(*other), upsampler(*other))
        else:
            with pytest.raises(Exception, match="Guard failed"):
                program(*other)
