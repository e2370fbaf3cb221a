"""The network by runs of pixels equals its plain layers."""

import pytest
import torch

from upfeat import JBUStack
from upfeat.upsamplers import pointwise
from upfeat.upsamplers.jbu import JBUStage
from upfeat.upsamplers.pointwise import PointwiseNetwork, can_run_in_runs


@pytest.mark.parametrize("size", [(3, 5), (16, 16), (17, 9)])
@pytest.mark.parametrize("residual", [False, True])
def test_runs_equal_layers(size, residual, monkeypatch):
    monkeypatch.setattr(pointwise, "_RUN", 64)
    torch.manual_seed(0)
    net = PointwiseNetwork(7, 4).double().train()
    first = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    found = net.in_runs(first, second, share=0.3, residual=residual)
    torch.manual_seed(1)
    expected = 0.3 * net(torch.cat([first, second], dim=1)) + (first if residual else 0)
    torch.testing.assert_close(found, expected)
    inputs, grad = [first, second, *net.parameters()], torch.randn_like(found)
    for own, other in zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_any_strides_and_no_gradient_of_an_image():
    net = PointwiseNetwork(3, 8).train()
    image = torch.rand(2, 3, 6, 5).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    found = net.in_runs(image)
    torch.manual_seed(1)
    torch.testing.assert_close(found, net(image))
    found.sum().backward()
    assert net[0].weight.grad is not None


def test_only_where_gradients_are_wanted():
    image = torch.rand(1, 3, 4, 4)
    assert can_run_in_runs(image)
    assert not can_run_in_runs(image.double())
    with torch.no_grad():
        assert not can_run_in_runs(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_run_in_runs(image)


def test_stages_train_as_plain_layers_do():
    torch.manual_seed(0)
    stack = JBUStack(6, n_stages=2).train()
    features, guidance = torch.randn(2, 6, 5, 7), torch.randn(2, 3, 20, 28)
    gradients = []
    for backend in ("auto", "eager"):
        stack.set_backend(backend)
        stack.zero_grad()
        torch.manual_seed(2)
        stack(features, guidance).square().mean().backward()
        gradients.append([one.grad.clone() for one in stack.parameters()])
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_names_of_weights_are_those_of_the_layers():
    names = {name for name, _ in JBUStage().range_proj.named_parameters()}
    assert names == {"0.weight", "0.bias", "3.weight", "3.bias"}
