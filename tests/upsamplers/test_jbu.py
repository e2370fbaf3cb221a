"""The JBU stack against an independent float64 reference, pixel by pixel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jbu_reference import reference, relative_error

import upfeat
from upfeat.upsamplers.jbu import stage_sizes


@pytest.mark.parametrize(
    ("stride", "grid"), [(8, (5, 7)), (14, (3, 4)), (16, (3, 5)), (32, (2, 3))]
)
@pytest.mark.parametrize("embed_dim", [None, 6])
def test_agrees_with_the_reference(stride, grid, embed_dim):
    torch.manual_seed(stride)
    stack = upfeat.JBUStack(embed_dim).eval()
    with torch.no_grad():
        for constant in stack.constants:  # initially 0
            constant.normal_()
        for stage in stack.stages:
            stage.range_temperature.normal_()
            stage.sigma_spatial.uniform_(0.3, 1.5)
    size = (grid[0] * stride, grid[1] * stride)
    features, guidance = torch.randn(2, 6, *grid), torch.randn(2, 3, *size)
    with torch.no_grad():
        for output_size in (size, (size[0] - 5, size[1] + 3)):
            out = stack(features, guidance, output_size)
            expected = reference(stack, features, guidance, output_size)
            assert out.shape == (2, 6, *output_size)
            assert relative_error(out, expected) < 1e-5


def test_tiny_grids_work():
    stack = upfeat.JBUStack().eval()
    features, guidance = torch.randn(1, 2, 1, 2), torch.randn(1, 3, 16, 32)
    out = stack(features, guidance)
    assert relative_error(out, reference(stack, features, guidance, (16, 32))) < 1e-5


def test_sixteen_fold_is_four_doublings():
    assert stage_sizes((14, 10), (224, 160), 4) == [(28, 20), (56, 40), (112, 80), (224, 160)]
    assert stage_sizes((28, 28), (224, 224), 4)[-2:] == [(224, 224), (224, 224)]
    assert stage_sizes((7, 7), (224, 224), 4) == [(14, 14), (28, 28), (56, 56), (224, 224)]


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
@settings(deadline=None, max_examples=30)
def test_output_size_is_honoured(size, grid):
    stack = upfeat.JBUStack().eval()
    with torch.no_grad():
        out = stack(torch.randn(1, 2, *grid), torch.randn(1, 3, 33, 29), size)
    assert out.shape[-2:] == size
    assert torch.isfinite(out).all()


def test_channel_mix_commutes_with_upsampling():
    stack = upfeat.JBUStack(5).eval()
    features, guidance = torch.randn(1, 5, 3, 4), torch.randn(1, 3, 24, 40)
    with torch.no_grad():
        plain = stack.prepare(guidance, (3, 4), (24, 40))(features)
        after = plain + 0.1 * stack.channel_mix(plain)
        torch.testing.assert_close(stack(features, guidance), after, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns():
    torch.manual_seed(0)
    stack = upfeat.JBUStack(4)
    stack(torch.randn(2, 4, 3, 3), torch.randn(2, 3, 48, 48)).square().mean().backward()
    silent = [n for n, p in stack.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert all(stage.fixup_proj[3].bias.grad.ne(0).all() for stage in stack.stages)


def test_dropout_only_in_training():
    stack = upfeat.JBUStack(4)
    inputs = torch.randn(1, 4, 3, 3), torch.randn(1, 3, 24, 24)
    assert not torch.equal(stack(*inputs), stack(*inputs))
    stack.eval()
    assert torch.equal(stack(*inputs), stack(*inputs))


@pytest.mark.parametrize(
    ("features", "guidance", "output_size", "words"),
    [
        (torch.ones(2, 4, 3, 3), torch.ones(1, 3, 8, 8), None, "batch size 2"),
        (torch.ones(1, 4, 3, 3) * torch.nan, torch.ones(1, 3, 8, 8), None, "features holds NaN"),
        (torch.ones(1, 4, 3, 3), torch.full((1, 3, 8, 8), torch.inf), None, "guidance holds NaN"),
        (torch.ones(1, 4, 3, 3), torch.ones(1, 1, 8, 8), None, "guidance has 1 channels"),
        (torch.ones(1, 5, 3, 3), torch.ones(1, 3, 8, 8), None, "embed_dim=5"),
        (torch.ones(1, 4, 3, 3), torch.ones(1, 3, 8, 8), (0, 4), "output_size"),
        (torch.ones(1, 4, 3, 3), torch.ones(1, 3, 8, 8), (4.5, 4), "output_size"),
        (torch.ones(1, 4, 3, 3), torch.ones(1, 3, 8, 8), 8, "output_size"),
        (torch.ones(4, 3, 3), torch.ones(1, 3, 8, 8), None, "features must be"),
        (torch.ones(1, 4, 0, 3), torch.ones(1, 3, 8, 8), None, "features must be"),
    ],
)
def test_bad_arguments_are_named(features, guidance, output_size, words):
    with pytest.raises(ValueError, match=words):
        upfeat.JBUStack(4).eval()(features, guidance, output_size)
