"""How far upsamplers look: windows, tiles, and what lies beyond reach.

Small images are computed whole; here they are made to count as large, so that everything is
computed where it is asked for.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import upfeat
from upfeat.types import Window
from upfeat.upsamplers import detail, maps, queries, step

MAKERS = {
    "nearest": upfeat.Nearest,
    "bilinear": upfeat.Bilinear,
    "bicubic": upfeat.Bicubic,
    "joint_bilateral": upfeat.JointBilateral,
    "jbu_stack": lambda: upfeat.JBUStack(n_stages=3, radius=2),
    "neighbourhood": lambda: upfeat.NeighbourhoodUpsampler(
        query_dim=4, levels=3, back_projections=1
    ),
    "detail": lambda: upfeat.DetailUpsampler(3, query_dim=4, levels=3, width=8, depth=1, radius=1),
    "detail_universal": lambda: upfeat.DetailUpsampler(query_dim=4, levels=2, radius=1),
}
# Grid, guidance and output: whole ratios, uneven cells, odd sides, another output size.
CASES = [
    ((11, 13), (88, 104), (88, 104)),
    ((9, 14), (83, 101), (83, 101)),
    ((9, 12), (73, 95), (61, 110)),
    ((10, 9), (40, 36), (120, 99)),
]


@pytest.fixture(autouse=True)
def small_windows_of_the_regression(monkeypatch):
    monkeypatch.setattr(detail, "STEP", 4)


@pytest.fixture
def large(monkeypatch):
    """Makes every image count as large."""
    monkeypatch.setattr(maps, "WHOLE", 0)
    monkeypatch.setattr(step, "TILE", 40)
    monkeypatch.setattr(queries, "TILE", 40)


def make(name, seed=0):
    torch.manual_seed(seed)
    made = MAKERS[name]().double().eval().requires_grad_(False)
    for parameter_name, parameter in made.named_parameters():
        if "coarser" in parameter_name or "detail" in parameter_name or "mix" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def draw(grid, size, channels=3):
    generator = torch.Generator().manual_seed(grid[0])
    shapes = (1, channels, *grid), (1, 3, *size)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def expected(monkeypatch, upsampler, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(maps, "WHOLE", 1 << 20)
        return upsampler(*arguments)


def windows(height, width):
    return [
        Window(0, 0, 5, 7),
        Window(height // 2, width // 3, 9, 3),
        Window(height - 3, width - 2, 3, 2),
        Window(height // 3, 0, 1, width),
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_parts_are_parts_of_the_whole(name, case, large, monkeypatch):
    grid, size, output_size = case
    upsampler, (features, guidance) = make(name), draw(grid, size)
    whole = expected(monkeypatch, upsampler, features, guidance, output_size)
    lazy = upfeat.UpsampledFeatures(features, guidance, upsampler, output_size)
    for window in windows(*output_size):
        part = maps.cut(whole, window)
        torch.testing.assert_close(lazy.crop(*window), part, rtol=0, atol=1e-5)
    points = torch.tensor([[0.0, 0.0], [output_size[0] - 1.5, 7.25], [30.0, output_size[1] - 1.0]])
    found = lazy.at(points)
    torch.testing.assert_close(found[0], whole[0, :, 0, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], whole[0, :, 30, -1], rtol=0, atol=1e-5)
    head = torch.randn(2, 3, dtype=torch.float64)
    headed = torch.einsum("kc,bchw->bkhw", head, whole)
    torch.testing.assert_close(lazy.project(head), headed, rtol=0, atol=1e-4)
    torch.testing.assert_close(lazy.full(), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(lazy.full(torch.float32), whole.float(), rtol=0, atol=1e-5)


@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    ratio=st.tuples(st.floats(1, 9), st.floats(1, 9)),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
)
@settings(deadline=None, max_examples=12)
@example(grid=(5, 2), ratio=(1.0, 9.0), shares=(0.0, 0.0, 0.5, 1.0))  # cells without a pixel
@example(grid=(2, 5), ratio=(9.0, 1.0), shares=(0.0, 0.0, 1.0, 0.5))
def test_any_part_of_any_map_is_part_of_the_whole(grid, ratio, shares):
    size = tuple(max(int(cells * one), 1) for cells, one in zip(grid, ratio, strict=True))
    top, left = (int(share * (side - 1)) for share, side in zip(shares, size, strict=False))
    height = 1 + int(shares[2] * (size[0] - top - 1))
    width = 1 + int(shares[3] * (size[1] - left - 1))
    upsampler, (features, guidance) = make("detail"), draw(grid, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detail, "STEP", 2)
        whole = upsampler(features, guidance)
        patch.setattr(maps, "WHOLE", 0)
        patch.setattr(step, "TILE", 16)
        patch.setattr(queries, "TILE", 16)
        kernels = upsampler.prepare(guidance, grid, size)
        mixed = upsampler.mix(features)
        window = Window(top, left, height, width)
        found = upsampler.render(kernels, mixed, window=window)
        torch.testing.assert_close(found, maps.cut(whole, window), rtol=0, atol=1e-7)
        precomputed = upsampler.render(*upsampler.precompute(kernels, mixed), window=window)
        torch.testing.assert_close(precomputed, found, rtol=0, atol=1e-7)


@pytest.mark.parametrize("pixels", [4, 7, 8])
@pytest.mark.parametrize("name", MAKERS)
def test_what_lies_beyond_reach_does_not_matter(name, pixels):
    upsampler = make(name)
    side = 3 * upsampler.reach + 4
    size = (pixels * side, 5 * pixels)
    features, guidance = draw((side, 5), size)
    out = upsampler(features, guidance)
    cell = side // 2
    own = slice(pixels * cell, pixels * (cell + 1))
    for beyond in (slice(0, cell - upsampler.reach), slice(cell + upsampler.reach + 1, side)):
        seen = slice(pixels * beyond.start, pixels * beyond.stop)
        features[:, :, beyond] += 1 + features[:, :, beyond].flip(3)
        guidance[:, :, seen] = guidance[:, :, seen].flip(3) + 1
    torch.testing.assert_close(
        upsampler(features, guidance)[:, :, own], out[:, :, own], rtol=0, atol=1e-9
    )
    assert not torch.allclose(upsampler(features, guidance)[:, :, :pixels], out[:, :, :pixels])


@pytest.mark.parametrize("pixels", [8, 7])
@pytest.mark.parametrize("name", MAKERS)
def test_tiled_equals_untiled(name, pixels):
    upsampler = make(name)
    period = upsampler.step
    halo = period * -(-upsampler.reach // period)
    side = 2 * halo + 4 * period
    features, guidance = draw((side, 4), (pixels * side, 4 * pixels))
    whole = upsampler(features, guidance)
    for start in (0, period, 2 * period):
        low, high = start, start + 2 * halo + period
        seen = slice(pixels * low, pixels * high)
        part = upsampler(features[:, :, low:high], guidance[:, :, seen])
        own = slice(pixels * (start + halo), pixels * (start + halo + period))
        inside = slice(own.start - seen.start, own.stop - seen.start)
        torch.testing.assert_close(part[:, :, inside], whole[:, :, own], rtol=0, atol=1e-9)


def test_published_upsamplers_see_the_whole_image():
    class Other(upfeat.Bilinear.__mro__[1].__mro__[1]):  # a user's own
        name = "other"

        def prepare(self, guidance, grid_size, output_size, features=None):
            raise NotImplementedError

    assert Other().reach is None
    assert Other().step == 1


def test_gradients_go_through_what_was_first_seen_without_them():
    upsampler = make("detail").requires_grad_()
    features, guidance = draw((5, 6), (40, 48))
    kernels = upsampler.prepare(guidance, (5, 6), (40, 48))
    with torch.no_grad():
        kernels.to_finer_grid(features)
    upsampler.render(kernels, upsampler.mix(features)).square().sum().backward()
    assert upsampler.neighbourhood.encoder.entry.weight.grad.abs().sum() > 0


def test_gradients_of_large_images(large, monkeypatch):
    upsampler, (features, guidance) = make("detail"), draw((5, 6), (40, 48))
    wanted = expected(monkeypatch, upsampler, features, guidance)
    for one in (features, guidance):
        one.requires_grad_()
        out = upsampler(features, guidance)
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-7)
        (gradient,) = torch.autograd.grad(out.square().sum(), one)
        assert gradient.abs().sum() > 0
        one.requires_grad_(False)


def test_a_point_of_a_large_image_computes_little(large, monkeypatch):
    upsampler, (features, guidance) = make("neighbourhood"), draw((60, 60), (480, 480))
    seen = []
    original = queries.Queries.compute

    def compute(self, window):
        seen.append(window)
        return original(self, window)

    monkeypatch.setattr(queries.Queries, "compute", compute)
    upfeat.UpsampledFeatures(features, guidance, upsampler).at(torch.tensor([[240.0, 240.0]]))
    assert 0 < sum(window.height * window.width for window in seen) < 0.25 * 480 * 480
