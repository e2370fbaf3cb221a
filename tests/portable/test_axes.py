"""Reads along axes by index arithmetic: pooling and interpolation of PyTorch at any length."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import upfeat
from upfeat.geometry import cell_distances
from upfeat.portable import axes, form_of
from upfeat.portable.form import channel_mix
from upfeat.portable.neighbourhood import cell_means, smallest_side
from upfeat.portable.regression import inverse_of
from upfeat.portable.step import OUT_OF_REACH, Layout, unit
from upfeat.upsamplers.head import Head

CPU = torch.device("cpu")
LENGTHS = st.integers(1, 40)
many = settings(max_examples=80, deadline=None)


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@many
@given(LENGTHS, LENGTHS)
def test_pooling_is_pytorchs(length, cells):
    x = drawn(1, 2, length, 3)
    found = axes.weigh(x, axes.pooled(length, cells, CPU))
    expected = F.adaptive_avg_pool2d(x, (cells, 3))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@many
@given(LENGTHS)
def test_halving_reads_three_values_at_most(length):
    most, free = (axes.pooled(length, (length + 1) // 2, CPU, most=most) for most in (3, None))
    x = drawn(1, 1, length, 1)
    torch.testing.assert_close(axes.weigh(x, most), axes.weigh(x, free))


@many
@given(LENGTHS, LENGTHS)
def test_interpolation_is_pytorchs(length, target):
    x = drawn(1, 2, length, 3)
    taps = axes.bilinear(length, target, CPU)
    torch.testing.assert_close(taps.factors.sum(1), torch.ones(target))
    found = axes.weigh(x, taps)
    expected = F.interpolate(x, (target, 3), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@many
@given(LENGTHS, LENGTHS)
def test_slots_hold_every_pixel_once_in_its_cell(length, cells):
    found = axes.slots(length, cells, CPU)
    assert sorted(found.pixels[found.filled].tolist()) == list(range(length))
    for pixel in range(length):
        cell = (2 * pixel + 1) * cells // (2 * length)
        place = int(found.place[pixel])
        assert int(found.own[pixel]) == cell
        assert int(found.pixels[cell, place]) == pixel
        away = (pixel + 0.5) * cells / length - (cell + 0.5)
        assert int(found.away[cell, place]) / (2 * length) == pytest.approx(away)


@many
@given(LENGTHS, st.integers(0, 3))
def test_cells_around_are_replicated_at_the_ends(cells, radius):
    found = axes.around(cells, radius, CPU)
    for cell in range(cells):
        wanted = [min(max(cell + one, 0), cells - 1) for one in range(-radius, radius + 1)]
        assert found[cell].tolist() == wanted


@many
@given(st.integers(1, 64), st.integers(0, 5000))
def test_sides_are_rounded_as_python_rounds(stride, length):
    assert axes.rounded(length, stride) == round(length / stride)


@many
@given(st.tuples(LENGTHS, LENGTHS), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_a_layout_and_back_is_the_image(size, grid):
    x = drawn(2, 3, *size)
    layout = Layout(x, drawn(2, 1, *grid), 1)
    assert torch.equal(layout.image(layout.pixels(x)), x)
    assert int(layout.filled().sum()) == size[0] * size[1]


@many
@given(LENGTHS, st.integers(1, 9), st.integers(1, 2))
def test_distances_are_those_of_the_library(length, cells, radius):
    """Up to what all cells of a pixel have in common."""
    layout = Layout(drawn(1, 1, length, 1), drawn(1, 1, cells, 1), radius)
    sharpness = torch.tensor(0.7)
    found = layout._along(length, layout.down, sharpness)  # (cells, P, 2r+1)
    found = found[layout.down.own, layout.down.place]  # (length, 2r+1)
    squared, far = cell_distances(cells, length, 0, length, radius, drawn(1))
    assert torch.equal(found.T < OUT_OF_REACH / 2, far)
    apart = (found.T + sharpness * squared).masked_fill(far, 0)  # alike for all cells in reach
    mean = apart.sum(0) / (~far).sum(0)
    assert float(((apart - mean) * ~far).abs().max()) < 1e-5 * (1 + float(squared.max()))


def test_unit_vectors_of_nothing_are_nothing():
    x = torch.tensor([3.0, 4, 0, 0, 1e-20, 0]).view(3, 2, 1, 1)
    expected = [[0.6, 0.8], [0, 0], [1, 0]]
    torch.testing.assert_close(unit(x).flatten(1), torch.tensor(expected))


@pytest.mark.parametrize("penalty", [1e-3, 0.3, 30.0])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_newtons_iteration_inverts(penalty, scale):
    rows = scale * drawn(8, 20, dtype=torch.float32)
    gram = rows @ rows.T
    found = inverse_of(gram, penalty)
    mean = float(gram.diagonal().mean())
    exact = torch.linalg.inv(gram.double() + (penalty * mean + 1e-6) * torch.eye(8))
    error = (found - exact).abs().max() / exact.abs().max()
    assert float(error) < 2e-3


def test_the_smallest_side_uses_every_scale_of_the_encoder():
    for levels in range(1, 6):
        upsampler = upfeat.NeighbourhoodUpsampler(query_dim=4, levels=levels).eval()
        side = smallest_side(upsampler)
        for length in (side, side + 3):
            features, guidance = drawn(1, 2, 2, 3).float(), drawn(1, 3, length, length).float()
            with torch.no_grad():
                found = form_of(upsampler, Head())(features, guidance)
                expected = upsampler(features, guidance)
            assert (found - expected).abs().max() < 3e-5 * expected.abs().max()


def test_the_matrix_of_a_channel_mix():
    stack = upfeat.JBUStack(5).eval()  # without its dropout
    nn.init.normal_(stack.channel_mix.weight)
    matrix = channel_mix(stack)
    features = drawn(1, 5, 2, 3).float()
    expected = torch.einsum("kc,bchw->bkhw", matrix, features)
    torch.testing.assert_close(stack.mix(features), expected)
    assert channel_mix(upfeat.JBUStack()) is None
    assert channel_mix(upfeat.Bilinear()) is None


@pytest.mark.parametrize("grid", [(1, 1), (3, 7), (9, 5)])
def test_means_over_cells_are_pytorchs(grid):
    x = drawn(2, 3, 11, 6)
    expected = F.adaptive_avg_pool2d(x, grid)
    torch.testing.assert_close(cell_means(x, grid), expected, rtol=1e-6, atol=1e-6)
