"""What the parts of training do with what is no map, and with maps of every type and layout."""

import numpy as np
import pytest
import torch

from upfeat import downsamplers, losses
from upfeat.views import apply_jitter, apply_jitter_adjoint, sample_jitters

JITTER = sample_jitters(2, size=(16, 24), max_pad=4, generator=torch.Generator().manual_seed(0))


def _map(channels=4, size=(16, 24)):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def _calls():
    attention = downsamplers.AttentionDownsampler(4, 8, dropout=0.0).eval()
    simple, cells = downsamplers.SimpleDownsampler(8), downsamplers.CellDownsampler()
    image, drawn = _map(3), torch.Generator()
    scale = _map(1).abs() + 0.1
    return {
        "attention": lambda x: attention(x, (2, 3)),
        "simple": lambda x: simple(x, (2, 3)),
        "cells": lambda x: cells(x, (2, 3)),
        "gaussian_blur": downsamplers.gaussian_blur,
        "blur_pin": losses.blur_pin,
        "magnitude": losses.magnitude,
        "magnitude_consistency": lambda x: losses.magnitude_consistency(x, _map().to(x)),
        "magnitude_variation": losses.magnitude_variation,
        "total_variation": losses.total_variation,
        "uncertainty": losses.SpatialUncertainty(4, generator=torch.Generator().manual_seed(2)),
        "reconstruction": lambda x: losses.gaussian_reconstruction(
            x, _map().roll(1, 3).to(x), scale.to(x)
        ),
        "crf": lambda x: losses.crf_pairwise(
            x, image.to(x.dtype), n_points=40, generator=drawn.manual_seed(3)
        ),
        "jitter": lambda x: apply_jitter(x, JITTER),
        "adjoint": lambda x: apply_jitter_adjoint(x, JITTER),
    }


CALLS = _calls()


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("reconstruction", "crf")])
def test_what_is_no_map_is_refused(name):
    call, x = CALLS[name], _map()
    if name != "magnitude_consistency":  # whose other map is made to fit
        for value in (None, x.numpy(), [1.0], "map"):
            with pytest.raises(TypeError, match=r"is of type \w+; give a tensor"):
                call(value)
    for value in (x[0], x[None], x[:, :0], x[:, :, :0], x[..., :0]):
        with pytest.raises(ValueError, match="must have shape"):
            call(value)
    for value in (x.int(), x > 0, x.to(torch.complex64)):
        with pytest.raises(ValueError, match=r"must be floating point, got torch\."):
            call(value)
    with pytest.raises(ValueError, match=r"must be dense, got torch\.sparse_coo"):
        call(x.to_sparse())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_types_are_kept_and_agree(name, dtype):
    x = _map()
    expected, found = CALLS[name](x), CALLS[name](x.to(dtype))
    # Losses are in float32 at least.
    assert found.dtype == (dtype if found.ndim else torch.promote_types(dtype, torch.float32))
    scale = float(expected.abs().max().detach()) + 1e-3
    error = float((found.float() - expected).abs().max().detach())
    assert error <= (1e-4 if dtype == torch.float64 else 0.1) * scale


@pytest.mark.parametrize("name", CALLS)
def test_layouts_of_memory_do_not_matter_and_nothing_is_changed(name):
    x = _map()
    expected = CALLS[name](x)
    for other in (
        x.to(memory_format=torch.channels_last),
        torch.stack([x, x], -1)[..., 0],
        x.flip(3).flip(3),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        kept = other.clone()
        torch.testing.assert_close(CALLS[name](other), expected)
        assert torch.equal(other, kept)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_finite_where_maps_are_flat(name):
    x = torch.zeros_like(_map()).requires_grad_()
    out = CALLS[name](x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, allow_unused=True)
    assert gradient is None or torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0},
        {"beta": -1.0},
        {"gamma": float("nan")},
        {"w1": float("inf")},
        {"w2": "3"},
        {"shift": None},
    ],
    ids=str,
)
def test_numbers_of_the_pairwise_term_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r} must be"):
        losses.crf_pairwise(_map(), _map(3), n_points=5, **options)


SIZES = [(0, 3), (2,), (2, 3, 4), 3, None, (2.0, 3.0), (-1, 2), (17, 3), (2, 25), ("2", "3")]


@pytest.mark.parametrize("size", SIZES, ids=repr)
@pytest.mark.parametrize("make", ["AttentionDownsampler", "SimpleDownsampler", "CellDownsampler"])
def test_grids_that_are_none_are_refused(make, size):
    arguments = {"AttentionDownsampler": (4, 8), "SimpleDownsampler": (8,)}.get(make, ())
    with pytest.raises(ValueError, match="output_size"):
        getattr(downsamplers, make)(*arguments)(_map(), size)


@pytest.mark.parametrize("make", ["AttentionDownsampler", "SimpleDownsampler", "CellDownsampler"])
@pytest.mark.parametrize("grid", [(1, 1), (16, 24), (5, 7), (1, 24), (16, 1)])
def test_any_grid_keeps_constants_and_bounds(make, grid):
    arguments = {"AttentionDownsampler": (4, 8), "SimpleDownsampler": (8,)}.get(make, ())
    down = getattr(downsamplers, make)(*arguments).eval()
    constant = torch.full((2, 4, 16, 24), 1.7)
    with torch.no_grad():
        out = down(_map(), grid)
        torch.testing.assert_close(down(constant, grid), constant[:, :, : grid[0], : grid[1]])
    assert out.shape == (2, 4, *grid)
    low, high = _map().aminmax()
    assert low - 1e-5 <= out.min() <= out.max() <= high + 1e-5


def test_arrays_are_told_apart_from_maps():
    with pytest.raises(TypeError, match="target is of type ndarray"):
        losses.gaussian_reconstruction(_map(), np.zeros((2, 4, 16, 24)), torch.ones(1))
    with pytest.raises(TypeError, match="scale is of type float"):
        losses.gaussian_reconstruction(_map(), _map(), 0.5)
