"""Pooling views: the same as warping first, without the warped maps."""

import pytest
import torch

from upfeat.downsamplers import AttentionDownsampler, SimpleDownsampler
from upfeat.pooling import pool_patches, repeat_maps
from upfeat.views import Jitter, apply_jitter, sample_jitters
from upfeat.warp import warp

SHAPES = [
    # map, image of the jitter, grid, kernel size
    ((32, 32), (32, 32), (4, 4), 8),
    ((24, 40), (24, 40), (3, 5), 8),
    ((21, 36), (42, 72), (6, 4), 11),
    ((12, 300), (12, 300), (3, 37), 6),
]


def _views(size, count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return sample_jitters(count, size=size, max_pad=9, max_zoom=2.5, generator=generator)


def _random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("size", "image", "grid", "kernel_size"), SHAPES)
def test_pooling_views_is_pooling_warped_maps(size, image, grid, kernel_size, shared):
    values = _random(3, 2, *size).requires_grad_()
    weights = _random(1 if shared else 6, *grid, kernel_size, kernel_size, seed=1).requires_grad_()
    views = _views(image).matrices(size, dtype=torch.float64)
    found = pool_patches(values, weights, views=views)
    expected = pool_patches(warp(repeat_maps(values, 6), *views), weights)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for own, other in zip(
        torch.autograd.grad(found, (values, weights), grad),
        torch.autograd.grad(expected, (values, weights), grad),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_gradients():
    values = _random(2, 2, 9, 12).requires_grad_()
    weights = _random(4, 3, 4, 3, 3, seed=1).requires_grad_()
    views = _views((9, 12), 4).matrices((9, 12), dtype=torch.float64)
    pool = lambda values, weights: pool_patches(values, weights, views=views)  # noqa: E731
    assert torch.autograd.gradcheck(pool, (values, weights))
    assert torch.autograd.gradgradcheck(pool, (values, weights))


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 2, 1, 0), (0, 2, 3, 1), (1, 0, 2, 3)])
@pytest.mark.parametrize("warped", [False, True])
def test_gradients_of_maps_in_every_order_of_memory(order, warped):
    """A gradient in the order of such a map has no view of whole rows, and once was lost."""
    shape = (2, 3, 8, 10)
    plain = _random(*shape)
    values = plain.permute(order).contiguous()
    values = values.permute([order.index(axis) for axis in range(4)])  # the same map
    weights = _random(2, 2, 3, 4, 4, seed=1)
    views = _views((8, 10), 2).matrices(dtype=torch.float64) if warped else None
    found, expected = (
        torch.autograd.grad(pool_patches(x, weights, views=views).square().sum(), x)[0]
        for x in (values.requires_grad_(), plain.requires_grad_())
    )
    torch.testing.assert_close(found, expected)
    assert expected.any()


@pytest.mark.parametrize("kind", ["attention", "blurred", "simple"])
def test_downsamplers_of_views(kind):
    torch.manual_seed(0)
    if kind == "simple":
        downsampler = SimpleDownsampler(8)
    else:
        downsampler = AttentionDownsampler(5, 8, blur=kind == "blurred")
    downsampler.eval()
    values, jitter = torch.randn(2, 5, 32, 48), _views((32, 48))
    found = downsampler(values, (4, 6), jitter=jitter)
    warped = torch.cat([apply_jitter(values, jitter[i : i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(found, downsampler(warped, (4, 6)), rtol=1e-4, atol=1e-5)


def test_dropout_of_all_views_at_once_draws_what_one_after_the_other_draws():
    downsampler = AttentionDownsampler(5, 8, dropout=0.5, generator=torch.Generator()).train()
    values, jitter = torch.randn(2, 5, 32, 48), _views((32, 48))
    generator = torch.Generator().manual_seed(3)
    found = downsampler(values, (4, 6), jitter=jitter, generator=generator)
    generator.manual_seed(3)
    each = [
        downsampler(values, (4, 6), jitter=jitter[i : i + 2], generator=generator)
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(found, torch.cat(each))


def test_what_does_not_fit_is_refused():
    views = Jitter.identity(3, size=(8, 8)).matrices()
    with pytest.raises(ValueError, match="3 views cannot be of 2 maps"):
        pool_patches(torch.ones(2, 1, 8, 8), torch.ones(1, 2, 2, 4, 4), views=views)
    with pytest.raises(ValueError, match="pixels to fit views"):
        pool_patches(torch.ones(1, 1, 8, 9), torch.ones(1, 2, 2, 4, 4), views=views)


def test_weights_that_are_none_are_refused():
    values = torch.zeros(1, 2, 8, 8)
    with pytest.raises(ValueError, match="k at least 1"):
        pool_patches(values, torch.zeros(1, 2, 2, 0, 0))
    with pytest.raises(TypeError, match="weights is of type list; give a tensor"):
        pool_patches(values, [1.0])
