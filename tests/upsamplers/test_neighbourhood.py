"""Properties of the neighbourhood upsampler, trained or not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import upfeat
from upfeat.upsamplers import Window
from upfeat.upsamplers.base import Upsampler

SIDES = st.integers(1, 70)


@pytest.fixture
def upsampler():
    torch.manual_seed(0)
    made = upfeat.NeighbourhoodUpsampler().eval().requires_grad_(False)
    # Sharper than at the start, so that the image matters.
    made.log_temperature.fill_(math.log(20.0))
    return made


@given(guidance=st.tuples(SIDES, SIDES), size=st.tuples(SIDES, SIDES), grid=st.tuples(SIDES, SIDES))
@settings(deadline=None, max_examples=30)
def test_any_image_grid_and_output_size(guidance, size, grid):
    grid = (min(grid[0], 7), min(grid[1], 7))
    upsampler = upfeat.NeighbourhoodUpsampler().eval()
    features = torch.randn(1, 2, *grid)
    with torch.no_grad():
        out = upsampler(features, torch.randn(1, 3, *guidance), size)
    assert out.shape == (1, 2, *size)
    assert out.max() <= features.max() + 1e-5
    assert out.min() >= features.min() - 1e-5


def test_constants_stay_constant(upsampler):
    features = torch.arange(1.0, 4.0).view(1, 3, 1, 1).expand(1, 3, 4, 5)
    out = upsampler(features, torch.randn(1, 3, 37, 50))
    torch.testing.assert_close(out, features[:, :, :1, :1].expand(1, 3, 37, 50))


def test_it_is_linear_and_the_weights_depend_on_the_image_alone(upsampler):
    guidance = torch.randn(2, 3, 45, 60)
    a, b = torch.randn(2, 2, 5, 3, 4).unbind(0)
    expected = 2 * upsampler(a, guidance) - 3 * upsampler(b, guidance)
    torch.testing.assert_close(upsampler(2 * a - 3 * b, guidance), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("back_projections", [0, 2])
@pytest.mark.parametrize("size", [(48, 64), (45, 61), (20, 30), (2, 5)])
def test_a_crop_is_the_crop_of_the_whole(upsampler, size, back_projections):
    upsampler.back_projections = back_projections
    features, guidance = torch.randn(1, 4, 3, 4), torch.randn(1, 3, 48, 64)
    kernels = upsampler.prepare(guidance, (3, 4), size)
    whole = kernels(features)
    for window in _windows(*size):
        part = whole[:, :, window.top : window.bottom, window.left : window.right]
        torch.testing.assert_close(kernels.crop(features, window), part, rtol=1e-4, atol=1e-5)


@given(
    size=st.tuples(SIDES, SIDES),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
    back_projections=st.integers(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_any_crop_is_the_crop_of_the_whole(size, grid, shares, back_projections):
    """Also of outputs smaller than the grid, at borders, and in cells of uneven sizes."""
    torch.manual_seed(0)
    up = upfeat.NeighbourhoodUpsampler(query_dim=4, levels=2, back_projections=back_projections)
    up = up.double().requires_grad_(False)
    top, left = (int(share * (side - 1)) for share, side in zip(shares, size, strict=False))
    height = 1 + int(shares[2] * (size[0] - top - 1))
    width = 1 + int(shares[3] * (size[1] - left - 1))
    features = torch.randn(2, 3, *grid, dtype=torch.float64)
    kernels = up.prepare(torch.randn(2, 3, 40, 50, dtype=torch.float64), grid, size)
    window = Window(top, left, height, width)
    expected = kernels(features)[:, :, top : window.bottom, left : window.right]
    torch.testing.assert_close(kernels.crop(features, window), expected)
    precomputed, corrected = kernels.precompute(features)
    torch.testing.assert_close(precomputed.crop(corrected, window), expected)
    torch.testing.assert_close(precomputed(corrected), kernels(features))


def _windows(height, width):
    windows = [Window(0, 0, 5, 7), Window(9, 13, 8, 11), Window(height - 2, 2, 2, 3)]
    return [one for one in windows if one.bottom <= height and one.right <= width]


@pytest.mark.parametrize("size", [(48, 64), (45, 61)])
def test_back_projection_brings_the_mean_over_each_cell_to_the_features(upsampler, size):
    features, guidance = torch.randn(1, 4, 3, 4), torch.rand(1, 3, 48, 64)
    rows, columns = (
        torch.div((2 * torch.arange(length) + 1) * cells, 2 * length, rounding_mode="floor")
        for cells, length in zip((3, 4), size, strict=True)
    )
    cell = (rows[:, None] * 4 + columns).flatten()
    gaps = []
    for count in range(4):
        upsampler.back_projections = count
        out = upsampler(features, guidance, size).flatten(2)
        sums = torch.zeros(1, 4, 12).index_add_(2, cell, out)
        means = (sums / torch.bincount(cell)).view_as(features)
        gaps.append(float((means - features).square().mean()))
    assert gaps[1] < 0.5 * gaps[0]
    assert gaps[3] < gaps[2] < gaps[1]


def test_back_projection_keeps_constants_and_linearity(upsampler):
    upsampler.back_projections = 2
    guidance = torch.rand(1, 3, 37, 50)
    ones = upsampler(torch.ones(1, 1, 4, 5), guidance)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    a, b = torch.randn(2, 1, 3, 4, 5).unbind(0)
    expected = upsampler(a, guidance) + 2 * upsampler(b, guidance)
    torch.testing.assert_close(upsampler(a + 2 * b, guidance), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_is_its_images_one_by_one(upsampler):
    features, guidance = torch.randn(3, 4, 3, 4), torch.randn(3, 3, 48, 64)
    alone = [upsampler(f[None], g[None]) for f, g in zip(features, guidance, strict=True)]
    torch.testing.assert_close(upsampler(features, guidance), torch.cat(alone))


def test_without_training_it_is_a_soft_interpolation():
    """Closer to bilinear than the nearest cell is, whatever the image."""
    torch.manual_seed(0)
    upsampler = upfeat.NeighbourhoodUpsampler().eval()
    features = torch.nn.functional.interpolate(torch.randn(1, 8, 4, 4), 8, mode="bicubic")
    guidance = torch.rand(1, 3, 128, 128)
    smooth = upfeat.Bilinear()(features, guidance)
    nearest = upfeat.Nearest()(features, guidance)
    with torch.no_grad():
        out = upsampler(features, guidance)
    assert (out - smooth).square().mean() < (nearest - smooth).square().mean()


def test_a_step_in_the_image_inside_a_cell_becomes_one_in_the_features(upsampler):
    guidance = torch.full((1, 3, 32, 32), -1.0)
    guidance[..., 13:] = 1.0
    features = torch.zeros(1, 1, 4, 4)
    features[..., 2:] = 1.0
    row = upsampler(features, guidance)[0, 0, 16]
    assert abs((row.diff().abs().argmax() + 1).item() - 13) <= 1
    assert row.diff().abs().max() > 0.3


def test_gradients_reach_every_parameter():
    upsampler = upfeat.NeighbourhoodUpsampler(query_dim=8, levels=3)
    for correction in upsampler.encoder.coarser:
        torch.nn.init.ones_(correction.last.weight)  # 0 at the start, which holds back the rest
    upsampler(torch.randn(1, 4, 3, 4), torch.randn(1, 3, 48, 64)).square().sum().backward()
    for name, parameter in upsampler.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_saved_and_loaded_it_is_the_same(upsampler, tmp_path):
    upsampler.save_pretrained(tmp_path / "weights")
    features, guidance = torch.randn(1, 4, 3, 4), torch.randn(1, 3, 48, 64)
    for cls in (Upsampler, upfeat.NeighbourhoodUpsampler):
        loaded = cls.from_pretrained(tmp_path / "weights")
        with torch.no_grad():
            assert torch.equal(loaded(features, guidance), upsampler(features, guidance))


@pytest.mark.parametrize(
    "options", [{"radius": 0}, {"query_dim": 0}, {"levels": 0}, {"back_projections": -1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        upfeat.NeighbourhoodUpsampler(**options)
