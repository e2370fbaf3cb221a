"""A backend asked for by name is the only one that runs, everywhere, or the call raises."""

import pytest
import torch

import upfeat
from upfeat.backends import dispatch
from upfeat.backends.torch_operators import WEIGHTS, WINDOWED

OPERATORS = (*WINDOWED, *WEIGHTS, "jbu_stage", "pyramid_queries", "pyramid_means")
MAKERS = {
    "joint_bilateral": upfeat.JointBilateral,
    "jbu_stack": lambda **options: upfeat.JBUStack(4, n_stages=2, **options),
    "neighbourhood": lambda **options: upfeat.NeighbourhoodUpsampler(
        query_dim=8, levels=3, back_projections=1, **options
    ),
    "detail": lambda **options: upfeat.DetailUpsampler(
        4, query_dim=8, levels=3, width=8, depth=1, **options
    ),
}
INTERPOLATION = ["nearest", "bilinear", "bicubic"]


@pytest.fixture
def ran(monkeypatch):
    """The backends whose operators ran."""
    names = set()

    def watched(name, function):
        def run(*arguments, **options):
            names.add(name)
            return function(*arguments, **options)

        return run

    for name, module in dispatch.BACKENDS.items():
        for operator in OPERATORS:
            if hasattr(module, operator):
                monkeypatch.setattr(module, operator, watched(name, getattr(module, operator)))
    return names


def _use_everything(upsampler):
    """The whole map, windows, points, heads, another size, and gradients."""
    features, guidance = torch.randn(1, 4, 3, 4), torch.randn(1, 3, 24, 32)
    upsampler.eval()
    with torch.no_grad():
        for size in (None, (23, 29), (6, 5)):
            lazy = upfeat.UpsampledFeatures(features, guidance, upsampler, size)
            whole = upsampler(features, guidance, size)
            lazy.crop(1, 2, 4, 3)
            lazy.at(torch.tensor([[1.5, 2.5]]))
            lazy.project(torch.randn(2, 4))
            lazy.full(torch.float64)
    upsampler.train()
    features.requires_grad_()
    upsampler(features, guidance).square().sum().backward()
    return whole


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
@pytest.mark.parametrize("name", MAKERS)
def test_only_the_backend_that_was_asked_for_runs(name, backend, ran):
    reason = dispatch.availability()[backend]
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    _use_everything(MAKERS[name](backend=backend))
    assert ran == {backend}
    ran.clear()
    upsampler = MAKERS[name]()
    upsampler.set_backend(backend)
    _use_everything(upsampler)
    assert ran == {backend}


@pytest.mark.parametrize("name", MAKERS)
def test_all_backends_agree(name):
    outs = {}
    for backend in ("reference", "eager", "auto"):
        torch.manual_seed(0)
        outs[backend] = _use_everything(MAKERS[name](backend=backend))
    for out in outs.values():
        torch.testing.assert_close(out, outs["reference"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_a_backend_that_cannot_run_raises(name):
    upsampler = MAKERS[name](backend="triton")
    if dispatch.availability()["triton"] is not None or name != "jbu_stack":
        with pytest.raises(ValueError, match='backend="triton" cannot run'):
            upsampler(torch.randn(1, 4, 3, 4), torch.randn(1, 3, 24, 32))
    for make in (MAKERS[name], lambda backend: MAKERS[name]().set_backend(backend)):
        with pytest.raises(ValueError, match='backend="cuda" is unknown; choose from "auto"'):
            make(backend="cuda")


@pytest.mark.parametrize("name", INTERPOLATION)
def test_interpolation_is_pytorchs(name, ran):
    make = {"nearest": upfeat.Nearest, "bilinear": upfeat.Bilinear, "bicubic": upfeat.Bicubic}[name]
    for backend in ("auto", "eager", "reference"):
        _use_everything(make(backend=backend))
    assert not ran
    with pytest.raises(ValueError, match=f'backend="cpu" has no interpolation.*{name}'):
        make().set_backend("cpu")


def test_only_auto_chooses_and_says_so(caplog):
    features, guidance = torch.randn(1, 4, 3, 4), torch.randn(1, 3, 24, 32)
    with caplog.at_level("DEBUG", logger="upfeat"), torch.no_grad():
        for name in MAKERS:
            caplog.clear()
            MAKERS[name](backend="eager").eval()(features, guidance)
            assert not caplog.records
            MAKERS[name]().eval()(features, guidance)
            assert any("backend" in record.message for record in caplog.records)
