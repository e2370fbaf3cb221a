"""Parts of maps of any size, with pixels without data too, are those of the whole."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_features import UPSAMPLERS

import upfeat
from upfeat import budget

SIDES = st.integers(1, 70)


def make_lazy(name, grid, size, *, batch=1, missing=True):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, 7, *grid, generator=generator)
    guidance = torch.rand(batch, 3, *size, generator=generator)
    hidden = torch.rand(batch, 1, *size, generator=generator) < 0.2
    return upfeat.UpsampledFeatures(
        features, guidance, UPSAMPLERS[name], missing=hidden if missing else None
    )


def close(found, expected):
    scale = max(float(expected.abs().max()), 1e-3) if expected.numel() else 1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("name", UPSAMPLERS)
@settings(max_examples=8, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(SIDES, SIDES),
    places=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5),
)
def test_windows_and_points_of_any_map(name, grid, size, places):
    lazy = make_lazy(name, grid, size)
    whole = lazy.full()
    last = torch.tensor(size) - 1
    points = torch.tensor(places) * last
    for first, second in zip(points.long(), points.long().flip(0), strict=True):
        (top, left), (bottom, right) = torch.minimum(first, second), torch.maximum(first, second)
        height, width = int(bottom - top) + 1, int(right - left) + 1
        found = lazy.crop(int(top), int(left), height, width)
        close(found, whole[:, :, top : top + height, left : left + width])
    plain = make_lazy(name, grid, size, missing=False)
    grid_sampled = F.grid_sample(  # between centres of pixels, as at() reads
        plain.full(), (2 * points / last.clamp(min=1) - 1).flip(1)[None, None], align_corners=True
    )
    close(plain.at(points), grid_sampled[0, :, 0].T)
    rows, columns = points.round().long().unbind(1)
    close(lazy.at(points.round()), whole[0, :, rows, columns].T)


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_heads_and_bounds_know_pixels_without_data(name, monkeypatch):
    """Their features are 0, so what a head says of them is its bias, however the map is made."""
    monkeypatch.setattr(budget, "_ROWS", (16,))
    lazy = make_lazy(name, (4, 5), (37, 51), batch=2)
    whole, hidden = lazy.full(), lazy.missing.expand(-1, 7, -1, -1)
    assert not whole[hidden].any()
    assert whole[~hidden].all()
    close(lazy.full(max_memory="100GB"), whole)
    close(lazy.full(torch.float64), whole.double())
    weight, bias = torch.randn(3, 7), torch.randn(3)
    expected = F.conv2d(whole, weight[..., None, None], bias)
    close(lazy.project(weight, bias), expected)
    close(lazy.project(weight, bias, max_memory="100GB"), expected)
    close(lazy.project(weight, bias, out=torch.empty(expected.shape)), expected)
    close(lazy.project(weight), expected - bias[:, None, None])
    found = lazy.pca(2)
    centred = whole - found.mean[:, None, None]
    close(found.map, torch.einsum("bchw,kc->bkhw", centred, found.components))


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_similarity_is_that_of_the_whole(name):
    lazy = make_lazy(name, (4, 5), (37, 51))
    whole, targets = lazy.full(), torch.randn(3, 7)
    close(
        lazy.similarity(targets),
        F.cosine_similarity(whole[:, None], targets[:, :, None, None], dim=2),
    )
    product = torch.einsum("bchw,kc->bkhw", whole, targets)
    close(lazy.similarity(targets, cosine=False), product)
    close(lazy.similarity(targets[0], cosine=False), product[:, :1])


@pytest.mark.parametrize(
    ("window", "words"),
    [
        ((-1, 0, 2, 2), "does not lie in the map of 37×51"),
        ((0, 0, 38, 51), "does not lie in the map of 37×51"),
        ((0, 50, 1, 2), "does not lie in the map of 37×51"),
        ((0, 0, 0, 5), "does not lie in the map of 37×51"),
        ((0.5, 0, 1, 1), "top=0.5 must be a whole number"),
        ((0, 0, 1, True), "width=True must be a whole number"),
        ((0, "1", 1, 1), "left='1' must be a whole number"),
    ],
)
def test_windows_that_do_not_lie_in_the_map_are_refused(window, words):
    with pytest.raises(ValueError, match=words):
        make_lazy("bilinear", (4, 5), (37, 51)).crop(*window)


@pytest.mark.parametrize(
    ("points", "error", "words"),
    [
        (torch.tensor([[37.0, 0.0]]), ValueError, "y from 0 to 36, x from 0 to 50"),
        (torch.tensor([[0.0, -0.1]]), ValueError, "y from 0 to 36, x from 0 to 50"),
        (torch.tensor([[float("nan"), 0.0]]), ValueError, "y from 0 to 36, x from 0 to 50"),
        (torch.tensor([0.0, 0.0]), ValueError, r"points must be \(N, 2\)"),
        (torch.zeros(1, 2, dtype=torch.bool), ValueError, "give numbers of pixels"),
        (torch.zeros(1, 2, dtype=torch.complex64), ValueError, "give numbers of pixels"),
        (torch.zeros(1, 2, device="meta"), ValueError, "on meta"),
        ([[0.0, 0.0]], TypeError, "points is of type list"),
    ],
)
def test_points_that_do_not_lie_in_the_map_are_refused(points, error, words):
    with pytest.raises(error, match=words):
        make_lazy("bilinear", (4, 5), (37, 51)).at(points)


@pytest.mark.parametrize("channels", [0, 3, 9])
def test_targets_of_other_channels_are_refused(channels):
    lazy = make_lazy("bilinear", (4, 5), (37, 51))
    for target in (torch.zeros(channels), torch.zeros(2, channels), torch.zeros(1, 1, channels)):
        with pytest.raises(ValueError, match=r"target must be a point \(2,\), a vector \(7,\)"):
            lazy.similarity(target)
