"""Derivatives beyond plain gradients: of gradients, forward, and of a few parameters only.

Compiled kernels must give the derivatives of the definition in float64, or leave them to PyTorch.
"""

import copy

import pytest
import torch
from torch.autograd import forward_ad

import upfeat
from upfeat import functional

ROWS, COLUMNS = [0] * 9 + [3] * 9, [1] * 8 + [4] * 8


def cases() -> dict:
    """Operators with their tensors."""
    torch.manual_seed(0)
    weights, image, grid = torch.randn(1, 9, 9, 8), torch.randn(1, 4, 9, 8), torch.randn(1, 4, 3, 4)
    scalars = torch.tensor(2.0), torch.tensor(0.7)
    return {
        "adaptive_conv2d": (functional.adaptive_conv2d, (torch.randn(1, 5, 11, 10), weights)),
        "joint_bilateral_upsample": (functional.joint_bilateral_upsample, (grid, weights)),
        "neighbourhood_upsample": (functional.neighbourhood_upsample, (grid, weights)),
        "bilateral_weights": (functional.bilateral_weights, (image, *scalars)),
        "neighbourhood_weights": (functional.neighbourhood_weights, (image, grid, *scalars)),
        "window_attention": (
            lambda *tensors, **chosen: functional.window_attention(
                *tensors, ROWS, COLUMNS, heads=2, **chosen
            ),
            (image, grid, torch.randn(1, 5, 3, 4)),
        ),
    }


def of_gradients(function, tensors):
    """Gradients of the squared gradients of the squared result."""
    tensors = [one.clone().requires_grad_() for one in tensors]
    loss = function(*tensors).square().sum()
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    return torch.autograd.grad(sum(one.square().sum() for one in first), tensors)


def forward(function, tensors):
    """Derivative of the result along ones."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(one, torch.ones_like(one)) for one in tensors]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
    assert tangent is not None
    return (tangent,)


def agree(found, expected, tolerance=1e-4):
    """Compare each result with float64."""
    for one, exact in zip(found, expected, strict=True):
        assert (one.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("derivative", [of_gradients, forward])
@pytest.mark.parametrize("operator", list(cases()))
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by PyTorch itself
def test_derivatives_of_operators_are_those_of_the_definition(operator, derivative):
    function, tensors = cases()[operator]
    expected = derivative(
        lambda *given: function(*given, backend="reference"), [one.double() for one in tensors]
    )
    agree(derivative(function, tensors), expected)
    if derivative is of_gradients:
        agree(derivative(lambda *given: function(*given, backend="cpu"), tensors), expected)


@pytest.mark.parametrize("derivative", [of_gradients, forward])
@pytest.mark.parametrize(
    "upsampler",
    [upfeat.JBUStack, upfeat.NeighbourhoodUpsampler, upfeat.DetailUpsampler, upfeat.JointBilateral],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_derivatives_of_upsamplers_equal_float64(upsampler, derivative):
    torch.manual_seed(0)
    up = upsampler().eval()
    tensors = torch.randn(1, 5, 3, 4), torch.randn(1, 3, 18, 20)
    expected = derivative(copy.deepcopy(up).double(), [one.double() for one in tensors])
    agree(derivative(up, tensors), expected, 1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: upfeat.JBUStack(embed_dim=5),
        upfeat.NeighbourhoodUpsampler,
        lambda: upfeat.DetailUpsampler(embed_dim=5),
    ],
)
def test_each_parameter_learns_by_itself_in_eval_mode(make):
    torch.manual_seed(0)
    up = make().eval().requires_grad_(False)
    features, guidance = torch.randn(1, 5, 3, 4), torch.randn(1, 3, 18, 20)
    for one in up.parameters():
        one.requires_grad_()
        up(features, guidance).square().sum().backward()
        assert one.grad is not None
        one.requires_grad_(False)
