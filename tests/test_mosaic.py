"""Tiles of a convolutional backbone equal the whole; windows of a global one blend."""

from functools import partial

import pytest
import torch
from torch import nn

from upfeat import load_backbone
from upfeat.activations import activation_bytes
from upfeat.mosaic import (
    Rows,
    Strip,
    backbone_tiles,
    extract_tile,
    join_tiles,
    see_within,
    strips,
)
from upfeat.receptive_field import receptive_halo
from upfeat.types import Window
from upfeat.upsamplers.maps import cut


class Global(nn.Module):
    """Every cell knows the mean of the image."""

    def forward(self, x):
        cells = nn.functional.avg_pool2d(x, 8)
        return cells + cells.mean((2, 3), keepdim=True)


def convolutional():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 7, 4, 3), nn.ReLU(), nn.Conv2d(5, 6, 3, 2, 1))
    return load_backbone(layers).eval()


def assert_alike(found, expected):
    """Equal but for the order of sums, which convolutions choose by the size of their input."""
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 * largest)


def crops(x):
    return lambda w: x[:, :, w.top : w.bottom, w.left : w.right]


def embedded(name="efficientnet_lite0"):
    return load_backbone(name)


@pytest.mark.parametrize(
    "make", [convolutional, embedded, partial(embedded, "efficientnet_lite0.stride8+16")]
)
@torch.no_grad()
def test_tiles_of_a_convolutional_backbone_equal_the_whole(make):
    backbone = make().eval()
    halo = receptive_halo(backbone)
    assert halo is not None
    grid = (2 * halo + 10, halo + 15)  # even numbers, of which the step is a divisor
    x = torch.randn(1, 3, grid[0] * backbone.stride, grid[1] * backbone.stride)
    parts = list(strips(backbone, crops(x), grid, tile=6, halo=halo))
    assert [part.top for part in parts] == list(range(0, grid[0], 6))
    whole = backbone(x)
    assert_alike(torch.cat([part.features for part in parts], 2), whole)


def test_a_halo_one_cell_short_is_not_exact():
    backbone = convolutional()
    halo = receptive_halo(backbone)
    x = torch.randn(1, 3, 8 * 12, 8 * 12)
    parts = strips(backbone, crops(x), (12, 12), tile=4, halo=halo - 1)
    assert (torch.cat([part.features for part in parts], 2) - backbone(x)).abs().max() > 1e-3


class Strips(nn.Module):
    """Every cell knows the mean of its column (2) or of its row (3)."""

    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        cells = nn.functional.avg_pool2d(x, 8)
        return cells + cells.mean(self.axis, keepdim=True)


class Places(Strips):
    """Every cell knows its own row (2) or column (3)."""

    def forward(self, x):
        cells = nn.functional.avg_pool2d(x, 8)
        return cells + torch.linspace(-1, 1, cells.shape[self.axis]).unsqueeze(3 - self.axis)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("make", [lambda axis: Global(), Strips, Places])
def test_a_backbone_that_sees_everything_has_no_halo(make, axis):
    assert receptive_halo(load_backbone(make(axis))) is None


@pytest.mark.parametrize("kernel", [(9, 3), (3, 9)])
def test_a_halo_is_that_of_the_longer_side(kernel):
    padding = (kernel[0] // 2, kernel[1] // 2)
    layers = nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.Conv2d(5, 5, kernel, padding=padding))
    assert receptive_halo(load_backbone(layers)) == 4


@torch.no_grad()
def test_blended_windows_of_a_constant_image_are_constant_and_rows_come_once():
    backbone = load_backbone(Global())
    x = torch.full((1, 3, 8 * 21, 8 * 17), 0.25)
    parts = list(strips(backbone, crops(x), (21, 17), tile=8, halo=None))
    whole = torch.cat([part.features for part in parts], 2)
    assert whole.shape == (1, 3, 21, 17)
    torch.testing.assert_close(whole, torch.full_like(whole, 0.5))
    tops = [part.top for part in parts]
    assert tops == sorted(set(tops))


@torch.no_grad()
def test_blended_windows_have_no_step_at_their_borders():
    backbone = load_backbone(Global())
    ramp = torch.linspace(0, 1, 8 * 32).expand(1, 3, 8 * 32, 8 * 32)
    parts = strips(backbone, crops(ramp), (32, 32), tile=16, halo=None, overlap=8)
    row = torch.cat([part.features for part in parts], 2)[0, 0, 16]
    assert row.diff().max() < 0.12  # hard borders step by a quarter


@pytest.mark.parametrize(
    ("make", "halo"), [(convolutional, 3), (lambda: load_backbone(Global()), None)]
)
@torch.no_grad()
def test_tiles_that_are_joined_have_the_bits_of_strips(make, halo):
    backbone, x = make(), torch.randn(1, 3, 19 * 8, 27 * 8)
    grid, tile = (19, 27), 8
    whole = torch.cat(
        [s.features for s in strips(backbone, crops(x), grid, tile=tile, halo=halo)], dim=2
    )
    tiles = [(t, extract_tile(backbone, crops(x), t)) for t in backbone_tiles(grid, tile, halo)]
    for region in (Window(0, 0, *grid), Window(5, 9, 11, 7), Window(18, 0, 1, 27)):
        meeting = [
            (t, f)
            for t, f in tiles
            if t.core.top < region.bottom
            and region.top < t.core.bottom
            and t.core.left < region.right
            and region.left < t.core.right
        ]
        joined = join_tiles(meeting, grid, region, tile if halo is None else None)
        assert torch.equal(joined, cut(whole, region))


@pytest.mark.parametrize("halo", [3, None])
@torch.no_grad()
def test_strips_from_a_row_on_are_those_of_all_rows(halo):
    backbone = convolutional()
    x = torch.randn(1, 3, 8 * 23, 8 * 9)
    whole = torch.cat(
        [p.features for p in strips(backbone, crops(x), (23, 9), tile=8, halo=halo)], 2
    )
    parts = list(strips(backbone, crops(x), (23, 9), tile=8, halo=halo, first_row=13))
    late = torch.cat([part.features for part in parts], 2)
    assert 0 < parts[0].top <= 13
    assert torch.equal(late[:, :, 13 - parts[0].top :], whole[:, :, 13:])


def test_rows_are_made_when_asked_for_and_forgotten():
    made = []

    def source():
        for top in range(0, 12, 3):
            made.append(top)
            yield Strip(top, torch.arange(top, top + 3.0).view(1, 1, 3, 1).expand(1, 2, 3, 4))

    rows = Rows(source())
    assert rows(0, 2)[0, 0, :, 0].tolist() == [0, 1]
    assert made == [0]
    assert rows(1, 7)[0, 0, :, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert rows(8, 12)[0, 0, :, 0].tolist() == [8, 9, 10, 11]
    with pytest.raises(ValueError, match="row 2 is no longer kept"):
        rows(2, 9)
    with pytest.raises(ValueError, match="row 12 lies beyond"):
        rows(9, 13)


@torch.no_grad()
def test_a_bound_of_memory_changes_nothing_but_the_tiles():
    backbone = convolutional()
    x = torch.randn(1, 3, 8 * 61 + 3, 8 * 50)
    whole = backbone(x)
    side = 8 * (16 + 2 * receptive_halo(backbone)) + 8
    bound = activation_bytes(backbone) * side**2
    assert_alike(see_within(backbone, x, bound)[0], whole)
    with pytest.raises(ValueError, match=r"too little for Sequential; tiles of 128 pixels need"):
        see_within(backbone, x, bound / 4)
    with pytest.raises(ValueError, match="0 bytes of memory are too little"):
        see_within(backbone, x, -1e9)  # the process holds more than its bound already
    with pytest.raises(ValueError, match="cannot work in tiles"):
        see_within(load_backbone(Global()), x, 1000)
