"""Forms for export: the same numbers as their upsamplers, at any size, with heads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import upfeat
from upfeat.portable import PORTABLE, FixedForm, axes, form_of
from upfeat.upsamplers.base import UPSAMPLERS
from upfeat.upsamplers.head import Head

SMALL = {"query_dim": 8, "levels": 3}


def mixing_jbu():
    stack = upfeat.JBUStack(6, n_stages=2, radius=2)
    torch.nn.init.normal_(stack.channel_mix.weight)
    torch.nn.init.normal_(stack.channel_mix.bias)
    return stack


def mixing_detail():
    upsampler = upfeat.DetailUpsampler(6, width=4, depth=1, **SMALL)
    for layer in (upsampler.detail, upsampler.channel_mix):
        torch.nn.init.normal_(layer.weight, std=0.3)
    torch.nn.init.normal_(upsampler.detail.bias)
    return upsampler


def mixing_early():
    upsampler = upfeat.EarlyDetailUpsampler(6, hidden_dim=5, width=4, depth=1, smoothing=2, **SMALL)
    for layer in (upsampler.detail, upsampler.early_network[2].last):
        torch.nn.init.normal_(layer.weight, std=0.3)
    torch.nn.init.normal_(upsampler.detail.bias)
    return upsampler


MADE = {
    "nearest": upfeat.Nearest,
    "bilinear": upfeat.Bilinear,
    "bicubic": upfeat.Bicubic,
    "joint_bilateral": upfeat.JointBilateral,
    "jbu_stack": mixing_jbu,
    "neighbourhood": lambda: upfeat.NeighbourhoodUpsampler(back_projections=2, **SMALL),
    "detail": lambda: upfeat.DetailUpsampler(**SMALL),
    "detail of a backbone": mixing_detail,
    "of early layers": mixing_early,
    "without regression": lambda: upfeat.DetailUpsampler(ridge=0, **SMALL),
    "of low contrast": lambda: upfeat.DetailUpsampler(smoothing=2, least_contrast=0.1, **SMALL),
}
SMOOTHED = ["detail", "detail of a backbone", "of early layers", "of low contrast"]
"""Those that make use of early layers."""
SIZES = {
    "whole multiples": ((5, 4), (40, 32)),
    "odd": ((6, 7), (75, 58)),
    "smaller than the grid": ((7, 9), (5, 30)),
    "two windows": ((35, 3), (140, 17)),
    "four windows": ((33, 49), (70, 99)),
}
"""Grid and guidance."""


def made(name):
    torch.manual_seed(0)
    return MADE[name]().eval().requires_grad_(False)


def inputs(grid, size, channels=6):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, channels, *grid, generator=generator)
    return features, torch.randn(2, 3, *size, generator=generator)


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 3e-5 * expected.abs().max()


def test_forms_of_every_class_that_serves_any_image():
    assert {type(made(name)).name for name in MADE} == set(PORTABLE)
    assert set(PORTABLE) <= set(UPSAMPLERS)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", MADE)
def test_equal(name, sizes):
    upsampler, (features, guidance) = made(name), inputs(*SIZES[sizes])
    with torch.no_grad():
        close(form_of(upsampler, Head())(features, guidance), upsampler(features, guidance))


@pytest.mark.parametrize("layers", [(2, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", SMOOTHED)
def test_early_layers(name, sizes, layers):
    """On the finer grid, on one finer still, and on one that is finer on one axis alone."""
    upsampler, (grid, size) = made(name), SIZES[sizes]
    features, guidance = inputs(grid, size)
    finer = layers[0] * grid[0], layers[1] * grid[1]
    hidden = torch.randn(2, 5, *finer, generator=torch.Generator().manual_seed(4))
    head = Head(torch.randn(3, 6), torch.randn(3))
    with torch.no_grad():
        kernels = upsampler.prepare_with(guidance, grid, size, hidden=hidden)
        expected = upsampler.render(kernels, upsampler.mix(features), head=head)
        close(form_of(upsampler, head)(features, guidance, None, hidden), expected)


@pytest.mark.parametrize("name", MADE)
def test_heads_and_other_output_sizes(name):
    upsampler, (features, guidance) = made(name), inputs((6, 7), (75, 58))
    head = Head(torch.randn(3, 6), torch.randn(3))
    size = (25, 19)
    with torch.no_grad():
        kernels = upsampler.prepare(guidance, (6, 7), size)
        expected = upsampler.render(kernels, upsampler.mix(features), head=head)
        close(form_of(upsampler, head)(features, guidance, size), expected)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_equal_at_any_size_from_one_cell_on(name, data):
    """Images of one cell and of one row of cells, borders in every window, outputs of any size."""
    upsampler = made(name)
    form = form_of(upsampler, Head())
    grid = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 20)))
    size = tuple(
        data.draw(st.integers(max(cells, form.least_side), 4 * cells + 7)) for cells in grid
    )
    output_size = data.draw(st.tuples(st.integers(1, 30), st.integers(1, 30)))
    features, guidance = inputs(grid, size)
    with torch.no_grad():
        found = form(features, guidance, output_size)
        expected = upsampler(features, guidance, output_size)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("name", MADE)
def test_constants_stay_but_for_what_mixes_channels(name):
    upsampler, (_, guidance) = made(name), inputs((3, 5), (29, 44))
    with torch.no_grad():
        found = form_of(upsampler, Head())(torch.full((2, 6, 3, 5), 2.0), guidance)
        expected = upsampler(torch.full((2, 6, 3, 5), 2.0), guidance)
    close(found, expected)
    if getattr(upsampler, "embed_dim", None) is None:
        close(found, torch.full_like(found, 2.0))


def test_the_nearest_cell_of_pixels_between_two():
    nearest = upfeat.Nearest()
    for cells in range(1, 12):
        for length in range(1, 70):
            features = torch.arange(float(cells)).view(1, 1, cells, 1)
            guidance = torch.zeros(1, 3, length, 1)
            expected = nearest(features, guidance)
            assert torch.equal(form_of(nearest, Head())(features, guidance), expected)


def test_an_image_without_any_colour_has_an_inverse():
    upsampler, (features, _) = made("detail"), inputs((6, 7), (48, 56))
    grey = torch.zeros(2, 3, 48, 56)
    with torch.no_grad():
        found = form_of(upsampler, Head())(features, grey)
        close(found, upsampler(features, grey))


@pytest.mark.parametrize("ridge", [1e-3, 30.0])
def test_penalties(ridge):
    upsampler = upfeat.DetailUpsampler(ridge=ridge, **SMALL).eval()
    features, guidance = inputs((6, 7), (48, 56))
    with torch.no_grad():
        found, expected = form_of(upsampler, Head())(features, guidance), None
        expected = upsampler(features, guidance)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_others_run_their_own_code():
    upsampler = UPSAMPLERS["naf"](width=32).eval().requires_grad_(False)
    features, guidance = inputs((5, 4), (40, 32), channels=8)
    form = form_of(upsampler, Head())
    assert isinstance(form, FixedForm)
    assert upsampler.backend == "auto"  # the model itself stays as it was
    with torch.no_grad():
        close(form(features, guidance), upsampler(features, guidance))


def test_sides_are_rounded_as_python_rounds():
    for stride in (1, 7, 8, 16):
        for side in range(stride, 5 * stride):
            assert axes.rounded(side, stride) == round(side / stride)


@pytest.mark.parametrize("target", [(9, 31), (20, 20), (64, 27), (20, 33)])
def test_interpolation_is_pytorchs(target):
    x = torch.randn(1, 2, 20, 33, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(x, target, mode="bilinear", antialias=True)
    close(axes.resize(x, target), expected)


@pytest.mark.parametrize(("length", "cells"), [(20, 5), (23, 5), (5, 20), (7, 7), (1, 1)])
def test_slots_hold_every_pixel_once(length, cells):
    found = axes.slots(length, cells, torch.device("cpu"))
    assert sorted(found.pixels[found.filled].tolist()) == list(range(length))
    assert torch.equal(found.pixels[found.own, found.place], torch.arange(length))
