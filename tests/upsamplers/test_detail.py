"""Properties of the detail upsampler: neighbourhood steps, and what the image alone adds."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import upfeat
from upfeat.upsamplers import Window
from upfeat.upsamplers.base import Upsampler
from upfeat.upsamplers.detail_network import _Block

SIDES = st.integers(1, 70)


def _make(channels=4, *, detail=True, **options):
    torch.manual_seed(0)
    options = {"query_dim": 8, "levels": 3, "width": 8, "depth": 1, **options}
    made = upfeat.DetailUpsampler(channels, **options)
    if detail and channels is not None:
        for parameter in (made.detail.weight, made.detail.bias, made.channel_mix.weight):
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval().requires_grad_(False)


@given(guidance=st.tuples(SIDES, SIDES), size=st.tuples(SIDES, SIDES), grid=st.tuples(SIDES, SIDES))
@settings(deadline=None, max_examples=20)
def test_any_image_grid_and_output_size(guidance, size, grid):
    grid = (min(grid[0], 5), min(grid[1], 5))
    out = _make(2)(torch.randn(1, 2, *grid), torch.randn(1, 3, *guidance), size)
    assert out.shape == (1, 2, *size)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("back_projections", [0, 1])
@pytest.mark.parametrize("channels", [3, None])
def test_untrained_it_keeps_constants(channels, back_projections):
    features = torch.arange(1.0, 4.0).view(1, 3, 1, 1).expand(1, 3, 4, 5)
    up = _make(channels, detail=False, back_projections=back_projections)
    out = up(features, torch.randn(1, 3, 37, 50))
    torch.testing.assert_close(out, features[:, :, :1, :1].expand(1, 3, 37, 50))


def test_it_is_affine_in_the_features():
    up, guidance = _make(3), torch.randn(2, 3, 45, 60)
    a, b = torch.randn(2, 2, 3, 3, 4).unbind(0)
    zero = up(torch.zeros_like(a), guidance)
    expected = up(a, guidance) + 2 * (up(b, guidance) - zero)
    torch.testing.assert_close(up(a + 2 * b, guidance), expected, rtol=1e-4, atol=1e-4)


def _finer(up, features, guidance):
    grid = (features.shape[2], features.shape[3])
    size = (guidance.shape[2], guidance.shape[3])
    return up.prepare(guidance, grid, size).to_finer_grid(features)


def test_features_that_follow_the_queries_are_found_on_the_finer_grid():
    guidance = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    up = _make(None, ridge=1e-9).double()
    queries = up.neighbourhood.queries(guidance, (64, 96))
    maps = torch.randn(5, 8, dtype=torch.float64)
    fine = F.adaptive_avg_pool2d(torch.einsum("kd,bdhw->bkhw", maps, queries), (16, 24)) + 3
    coarse = F.avg_pool2d(fine, 2)
    torch.testing.assert_close(_finer(up, coarse, guidance), fine, rtol=1e-3, atol=1e-3)
    # The first step alone is far from it, and so is a penalty that holds the map down.
    for least, ridge in ((0.05, 0.0), (0.04, 1e3)):
        error = _finer(_make(None, ridge=ridge).double(), coarse, guidance) - fine
        assert error.std() > least * fine.std()


def test_an_image_without_anything_in_it_adds_nothing():
    features, guidance = torch.randn(1, 4, 3, 4), torch.full((1, 3, 48, 64), 0.3)
    with_it, without = (_finer(_make(None, ridge=r), features, guidance) for r in (0.3, 0.0))
    torch.testing.assert_close(with_it, without, rtol=0, atol=1e-4)


def test_without_channels_of_its_own_it_serves_any_and_is_linear():
    up, guidance = _make(None), torch.randn(1, 3, 45, 60)
    assert {name.partition(".")[0] for name in up.state_dict()} == {"neighbourhood"}
    for channels in (1, 7):
        a, b = torch.randn(2, 1, channels, 3, 4).unbind(0)
        expected = up(a, guidance) + 2 * up(b, guidance)
        torch.testing.assert_close(up(a + 2 * b, guidance), expected, rtol=1e-4, atol=1e-4)
    up.scale_mix(0.5)  # there is none to scale


def test_a_block_of_the_network_starts_as_the_identity():
    block, x = _Block(4), torch.randn(2, 4, 5, 6)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    up, features, guidance = _make(), torch.randn(1, 4, 3, 4), torch.randn(1, 3, 48, 64)
    exact = up(features, guidance)
    for found in (
        up.to(dtype)(features.to(dtype), guidance.to(dtype)),
        _autocast(_make(), features, guidance, dtype),
    ):
        assert (found.float() - exact).std() < 0.1 * exact.std()


def _autocast(up, features, guidance, dtype):
    with torch.autocast("cpu", dtype=dtype):
        return up(features, guidance)


def test_what_the_image_adds_does_not_depend_on_the_features():
    up, guidance = _make(3), torch.randn(1, 3, 48, 64)
    plain = _make(3)
    for parameter in (plain.detail.weight, plain.detail.bias):
        torch.nn.init.zeros_(parameter)
    a, b = torch.randn(2, 1, 3, 3, 4).unbind(0)
    added = [up(x, guidance) - plain(x, guidance) for x in (a, b)]
    assert added[0].std() > 0.01
    torch.testing.assert_close(*added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(48, 64), (45, 61), (20, 30), (2, 5)])
@pytest.mark.parametrize("channels", [4, None])
def test_parts_of_the_map_are_parts_of_the_whole(size, channels):
    up, features, guidance = _make(channels), torch.randn(1, 4, 3, 4), torch.randn(1, 3, 48, 64)
    whole = up(features, guidance, size)
    lazy = upfeat.UpsampledFeatures(features, guidance, up, size)
    for window in (Window(0, 0, 5, 7), Window(9, 13, 8, 11), Window(size[0] - 2, 2, 2, 3)):
        if window.bottom <= size[0] and window.right <= size[1]:
            part = whole[:, :, window.top : window.bottom, window.left : window.right]
            torch.testing.assert_close(lazy.crop(*window), part, rtol=1e-4, atol=1e-5)
    weight, bias = torch.randn(2, 4), torch.randn(2)
    headed = torch.einsum("kc,bchw->bkhw", weight, whole) + bias[:, None, None]
    torch.testing.assert_close(lazy.project(weight, bias), headed, rtol=1e-4, atol=1e-4)
    half = lazy.full(torch.float64)
    torch.testing.assert_close(half, whole.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("back_projections", [0, 1])
def test_settled_it_gives_the_same_with_any_head_and_window(back_projections):
    up = _make(back_projections=back_projections)
    features, guidance = torch.randn(2, 4, 3, 4), torch.randn(2, 3, 48, 64)
    kernels, mixed = up.prepare(guidance, (3, 4), (48, 64)), up.mix(features)
    precomputed = up.precompute(kernels, mixed)
    for head in (None, slice(1, 3), torch.randn(2, 4), torch.randn(5, 4)):
        for window in (None, Window(0, 0, 48, 64), Window(9, 13, 8, 11)):
            expected = up.render(kernels, mixed, head=head, window=window)
            found = up.render(*precomputed, head=head, window=window)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_is_its_images_one_by_one():
    up = _make()
    features, guidance = torch.randn(3, 4, 3, 4), torch.randn(3, 3, 48, 64)
    alone = [up(f[None], g[None]) for f, g in zip(features, guidance, strict=True)]
    torch.testing.assert_close(up(features, guidance), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    up = upfeat.DetailUpsampler(4, query_dim=8, levels=3, width=8, depth=1)
    for parameter in up.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # 0 holds back what comes before
    up(torch.randn(1, 4, 3, 4), torch.randn(1, 3, 48, 64)).square().sum().backward()
    for name, parameter in up.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("options", [{}, {"channels": None, "ridge": 0.7}])
def test_saved_and_loaded_it_is_the_same(tmp_path, options):
    up = _make(**options)
    up.save_pretrained(tmp_path / "weights")
    features, guidance = torch.randn(1, 4, 3, 4), torch.randn(1, 3, 48, 64)
    for cls in (Upsampler, upfeat.DetailUpsampler):
        loaded = cls.from_pretrained(tmp_path / "weights")
        with torch.no_grad():
            found, expected = loaded(features, guidance), up(features, guidance)
        # Where tensors lie in memory may change the last bits.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for name, value in up.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


def test_it_starts_from_a_trained_neighbourhood_upsampler(tmp_path):
    given = upfeat.NeighbourhoodUpsampler(query_dim=8, levels=3)
    given.save_pretrained(tmp_path / "n")
    up = upfeat.DetailUpsampler(4, query_dim=8, levels=3, start=tmp_path / "n")
    for name, value in given.state_dict().items():
        assert torch.equal(up.neighbourhood.state_dict()[name], value)
    assert "start" not in up.config()
    with pytest.raises(ValueError, match=r"query_dim=32 but .* has 8; give the same"):
        upfeat.DetailUpsampler(4, levels=3, start=tmp_path / "n")
    with pytest.raises(ValueError, match="holds a Bilinear; give a neighbourhood upsampler"):
        upfeat.DetailUpsampler(4, start="bilinear")


def test_other_features_and_bad_options_are_refused():
    up = _make()
    with pytest.raises(ValueError, match="features has 5 channels but this DetailUpsampler is"):
        up(torch.randn(1, 5, 3, 4), torch.randn(1, 3, 48, 64))
    wrong = {
        "width": 1,
        "depth": -1,
        "widening": 0.0,
        "ridge": -0.1,
        "radius": 0,
        "back_projections": -1,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            upfeat.DetailUpsampler(4, **{name: value})
    with pytest.raises(ValueError, match="embed_dim=0"):
        upfeat.DetailUpsampler(0)
