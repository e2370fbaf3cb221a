"""Tiles as places on the ground: with a halo, tiles give what the whole gives."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

import upfeat
from upfeat.adapters import TileSampler, stitch
from upfeat.receptive_field import receptive_halo


class Ground(Dataset):
    """Answers queries as geographic data sets do."""

    def __init__(self, values, west, north, resolution):
        self.values, self.west, self.north, self.resolution = values, west, north, resolution

    def __getitem__(self, query):
        x, y = query
        top, bottom, left, right = (
            round(value / self.resolution)
            for value in (self.north - y.stop, self.north - y.start, x.start - self.west,
                          x.stop - self.west)
        )  # fmt: skip
        return {"image": torch.from_numpy(self.values[:, top:bottom, left:right])}


def ground(height, width, resolution=0.6):
    values = np.random.default_rng(0).random((3, height, width), dtype=np.float32)
    west, south = 463_120.2, 5_250_010.8
    bounds = (west, south, west + width * resolution, south + height * resolution)
    return Ground(values, west, bounds[3], resolution), bounds


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 70), st.integers(5, 70), st.integers(4, 40), st.integers(0, 12))
def test_tiles_give_back_the_ground(height, width, tile, halo):
    dataset, bounds = ground(height, width)
    sampler = TileSampler(bounds, 0.6, tile=tile, halo=halo)
    assert sampler.size == (height, width)
    parts = [dataset[query]["image"] for query in sampler]
    assert len(parts) == len(sampler)
    assert torch.equal(stitch(parts, sampler), torch.from_numpy(dataset.values))


def one_layer():
    return torch.nn.Conv2d(3, 5, 8, 8)


def two_layers():
    """Of one grid and of one half as fine, whose cells begin at every second cell."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 8, 8), torch.nn.Conv2d(5, 4, 3, 2, 1))
    return upfeat.load_backbone(layers, layer=["0", "1"])


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (one_layer, {"upsampler": "bilinear"}),
        (two_layers, {"upsampler": "bilinear"}),
        (two_layers, {"upsampler": "neighbourhood"}),
    ],
)
def test_features_of_tiles_are_those_of_the_whole(make, options):
    torch.manual_seed(0)
    model = upfeat.load(make(), **options)
    cells = receptive_halo(model.backbone, early=model.early) + model.upsampler.reach
    stride = model.backbone.stride
    step = stride * math.lcm(model.backbone.step, model.upsampler.step)
    dataset, bounds = ground(4 * step + 2 * stride * cells // step * step, 5 * step)
    sampler = TileSampler(bounds, 0.6, tile=step, halo=stride * cells, step=step)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None)
    with torch.no_grad():
        tiled = stitch((model(batch["image"][None])[0] for batch in loader), sampler)
        whole = model(torch.from_numpy(dataset.values)[None])[0]
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_bad_arguments_are_refused():
    for bounds in (
        (1, 0, 0, 1),
        (0, 1, 1, 1),
        (0, 0, np.inf, 1),
        (0, np.nan, 1, 1),
        (0, 1),
        "abcd",
    ):
        with pytest.raises(ValueError, match="west, south, east, north"):
            TileSampler(bounds, 0.1, tile=4)
    for name, value in (("tile", 0), ("tile", "4"), ("halo", -1), ("halo", 0.5), ("step", 0)):
        with pytest.raises(ValueError, match=f"{name}="):
            TileSampler((0, 0, 8, 8), 1, **{"tile": 4, name: value})
    with pytest.raises(ValueError, match="resolution"):
        TileSampler((0, 0, 1, 1), 0, tile=4)
    sampler = TileSampler((0, 0, 8, 8), 1, tile=4)
    part = torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match="has 4 tiles"):
        stitch([part] * 3, sampler)
    with pytest.raises(ValueError, match="more than the 4 tiles"):
        stitch([part] * 5, sampler)
    with pytest.raises(ValueError, match="not \\(4, 4\\)"):
        stitch([torch.zeros(1, 3, 4)], sampler)
    three = torch.zeros(3, 4, 4)
    for other in (part, three.double()):
        with pytest.raises(ValueError, match=r"part 2 has . channels of .*, and those before 3 of"):
            stitch([three, other, three, three], sampler)


def test_a_resolution_of_another_unit_is_refused_at_once():
    with pytest.raises(
        ValueError, match=r"resolution=1e-05, whose unit must be that of the bounds"
    ):
        TileSampler((500_000.0, 0.0, 510_000.0, 10_000.0), 1e-5, tile=512)
