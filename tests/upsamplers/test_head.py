"""Heads: one rule for features, for what an upsampler adds, and for constants."""

import pytest
import torch
from small_upsamplers import stack_of

import upfeat
from upfeat.upsamplers.head import Head


def _detail():
    torch.manual_seed(0)
    made = upfeat.DetailUpsampler(6, query_dim=8, levels=2, width=4, depth=1)
    for parameter in (made.detail.weight, made.detail.bias, made.channel_mix.weight):
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval().requires_grad_(False)


def _stack():
    torch.manual_seed(0)
    return stack_of(6, n_stages=2).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [upfeat.Bilinear, _stack, _detail])
def test_a_head_with_its_bias_is_rendered_as_it_would_be_applied(make):
    up, generator = make(), torch.Generator().manual_seed(1)
    features = torch.randn(2, 6, 3, 4, generator=generator)
    guidance = torch.randn(2, 3, 24, 32, generator=generator)
    weight, bias = torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)
    kernels, mixed = up.prepare(guidance, (3, 4), (24, 32), features), up.mix(features)
    whole = up.render(kernels, mixed)
    found = up.render(kernels, mixed, head=Head(weight, bias))
    expected = torch.einsum("kc,bchw->bkhw", weight, whole) + bias[:, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    part = up.render(kernels, mixed, head=Head(slice(1, 4), bias))
    torch.testing.assert_close(part, whole[:, 1:4] + bias[:, None, None], rtol=1e-4, atol=1e-4)


def test_the_constant_of_a_head():
    weight, bias, offset = torch.randn(3, 6), torch.randn(3), torch.randn(6)
    assert Head(weight).constant(None) is None
    assert torch.equal(Head(None, None).constant(offset), offset)
    torch.testing.assert_close(Head(weight, bias).constant(offset), weight @ offset + bias)
    assert torch.equal(Head(slice(2, 5)).constant(offset), offset[2:5])
    assert Head(weight, bias).constant(None) is bias
    head = Head(weight)
    assert Head.of(head) is head
    assert Head.of(weight).weight is weight
