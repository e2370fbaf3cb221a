"""Sizes: of tokens, of tiles, of images that a model takes; each for any sides."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import upfeat
from upfeat.backbones.outputs import Layout, concatenate
from upfeat.backbones.sizes import resize, tiled_size, tiles
from upfeat.backbones.tokens import square_grid

CELLS = st.integers(1, 12)


@given(cells=st.integers(2, 40), stride=st.integers(1, 32), prefix=st.integers(0, 16))
def test_the_square_of_tokens_is_found_with_what_stands_before_it(cells, stride, prefix):
    """The fewest tokens before it are believed: a true grid is found, or one more likely."""
    side = cells * stride
    found = square_grid(cells**2 + prefix, side)
    assert found is not None
    assert found[0] ** 2 + found[1] == cells**2 + prefix
    assert found[1] <= prefix
    assert side % found[0] == 0
    assert square_grid(cells**2 + prefix, side, prefix) == (cells, prefix)
    assert square_grid(cells**2 + prefix, side, prefix + 1) in (None, (1, prefix + 1))


@given(rows=CELLS, columns=CELLS, prefix=st.integers(0, 5), stride=st.sampled_from([1, 8, 14]))
def test_tokens_of_any_image_lie_where_they_came_from(rows, columns, prefix, stride):
    layout = Layout("tokens", 16, 16 * stride, prefix)  # as recognised on a square
    maps = torch.arange(2.0 * 3 * rows * columns).view(2, 3, rows, columns)
    tokens = F.pad(maps.flatten(2).mT, (0, 0, prefix, 0), value=-1)
    found = layout.read(tokens, (rows * stride, columns * stride), "net")
    assert torch.equal(found, maps)
    assert torch.equal(upfeat.tokens_to_grid(tokens, (rows, columns)), maps)


@given(rows=CELLS, columns=CELLS, stride=st.integers(2, 16), data=st.data())
def test_cells_that_reach_beyond_the_image_count_or_do_not(rows, columns, stride, data):
    """Of an image that is no whole multiple, all tokens are whole cells, or all are begun ones."""
    layout = Layout("tokens", 14, 14 * stride)
    rests = [data.draw(st.integers(0, stride - 1)) for _ in range(2)]
    image = (rows * stride + rests[0], columns * stride + rests[1])
    for grid in ((rows, columns), tuple(-(-side // stride) for side in image)):
        found = layout.read(torch.zeros(1, grid[0] * grid[1], 4), image, "net")
        assert found.shape[2] * found.shape[3] == grid[0] * grid[1]
        if rests == [0, 0]:
            assert found.shape[2:] == grid


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ((2, 2.0), "two whole numbers"),
        ((0, 3), "two whole numbers"),
        (6, "two whole numbers"),
        ((1, 2, 3), "two whole numbers"),
        (None, "two whole numbers"),
        ("23", "two whole numbers"),
    ],
)
def test_grids_that_are_none_are_refused(grid, words):
    with pytest.raises(ValueError, match=words):
        upfeat.tokens_to_grid(torch.zeros(1, 6, 4), grid)


@pytest.mark.parametrize("prefix", [-1, 1.5, "1", True])
def test_counts_before_the_grid_are_whole(prefix):
    with pytest.raises(ValueError, match="prefix_tokens="):
        upfeat.tokens_to_grid(torch.zeros(1, 7, 4), (2, 3), prefix)
    with pytest.raises(TypeError, match="tokens is of type list"):
        upfeat.tokens_to_grid([[0.0]], (1, 1))


@settings(deadline=None)
@given(
    grid=st.tuples(CELLS, CELLS),
    window=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    stride=st.sampled_from([1, 2, 4]),
)
def test_tiles_of_a_local_model_are_the_whole(grid, window, stride):
    """Blended or not, each cell is a mean of what the model says of it, which is the same."""
    assume(grid[0] >= window[0])
    assume(grid[1] >= window[1])
    seen = []

    def extract(x):
        seen.append(x.shape[2:])
        return F.avg_pool2d(x, stride)

    x = torch.rand(2, 3, grid[0] * stride, grid[1] * stride)
    pixels = (window[0] * stride, window[1] * stride)
    torch.testing.assert_close(tiles(extract, x, pixels, stride), F.avg_pool2d(x, stride))
    assert set(seen) == {pixels}
    least = [-(-whole // part) for whole, part in zip(grid, window, strict=True)]
    assert len(seen) <= 4 * least[0] * least[1]


@given(
    image=st.tuples(CELLS, CELLS),
    window=st.tuples(CELLS, CELLS),
    stride=st.sampled_from([1, 7, 16]),
)
def test_an_image_is_enlarged_until_the_window_fits(image, window, stride):
    pixels, own = ([side * stride for side in sides] for sides in (image, window))
    height, width = tiled_size(pixels, own, stride)
    assert height % stride == width % stride == 0
    assert height >= max(own[0], pixels[0])
    assert width >= max(own[1], pixels[1])
    if pixels[0] >= own[0] and pixels[1] >= own[1]:
        assert (height, width) == tuple(pixels)
    else:  # as much as is needed, and hardly more along either axis
        scale = max(own[0] / pixels[0], own[1] / pixels[1])
        assert height <= max(scale * pixels[0] + stride, own[0])
        assert width <= max(scale * pixels[1] + stride, own[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_resizing_keeps_the_type_and_constants(dtype):
    x = torch.full((1, 3, 9, 13), 0.7, dtype=dtype)
    assert resize(x, (9, 13)) is x
    out = resize(x, (20, 5))
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.full((1, 3, 20, 5), 0.7, dtype=dtype))


def test_maps_are_laid_over_each_other_on_the_finest_grid():
    fine, coarse = torch.randn(1, 2, 8, 12), torch.randn(1, 5, 4, 6)
    found = concatenate([coarse, fine])
    assert torch.equal(found[:, 5:], fine)
    expected = F.interpolate(coarse, size=(8, 12), mode="bilinear", align_corners=False)
    assert torch.equal(found[:, :5], expected)


@settings(max_examples=15, deadline=None)
@given(
    stride=st.sampled_from([3, 8, 14]),
    fit=st.sampled_from(["tile", "resize", None]),
    sides=st.tuples(st.integers(14, 90), st.integers(14, 90)),
)
def test_the_grid_of_a_backbone_is_the_one_that_it_says(stride, fit, sides):
    torch.manual_seed(0)
    backbone = upfeat.load_backbone(
        torch.nn.Conv2d(3, 5, stride, stride), fit=fit, input_size=4 * stride
    )
    x = torch.randn(1, 3, *sides)
    features = backbone(x)
    assert features.shape == (1, 5, *backbone.grid_size(sides))
    height, width = backbone.grid_aligned(sides)
    assert max(abs(height - sides[0]), abs(width - sides[1])) <= stride / 2
    assert (backbone.input_size is None) == (fit is None)
