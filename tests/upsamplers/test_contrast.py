"""Queries are longer where the keys around them are nearly equal."""

import json

import pytest
import torch
import torch.nn.functional as F

import upfeat
from upfeat.types import Window
from upfeat.upsamplers import contrast
from upfeat.upsamplers.contrast import LONGEST, Lengthened, Lengths, lengths_of
from upfeat.upsamplers.maps import Given, cut


def keys_of(size, spread=1.0, seed=0):
    """Unit vectors that differ from one another by a share of their length."""
    generator = torch.Generator().manual_seed(seed)
    own = spread * torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
    return F.normalize(own + torch.randn(2, 4, 1, 1, generator=generator, dtype=torch.float64))


def one_by_one(keys, radius, least, around):
    """The definition, cell by cell."""
    _, _, height, width = keys.shape

    def near(y, x, distance):
        return [
            (v, u)
            for v in range(max(y - distance, 0), min(y + distance + 1, height))
            for u in range(max(x - distance, 0), min(x + distance + 1, width))
        ]

    apart, lengths = keys.new_empty(2, len(keys), height, width)
    for image, key in enumerate(keys):
        for y in range(height):
            for x in range(width):
                products = [1 - key[:, y, x] @ key[:, v, u] for v, u in near(y, x, radius)]
                apart[image, y, x] = sum(products) / len(products)
        for y in range(height):
            for x in range(width):
                seen = [apart[image, v, u] for v, u in near(y, x, around)]
                lengths[image, y, x] = (least * len(seen) / sum(seen)).clamp(1, LONGEST)
    return lengths[:, None]


def test_definition(monkeypatch):
    monkeypatch.setattr(contrast, "AROUND", 3)
    keys = keys_of((9, 6), spread=0.3)
    expected = one_by_one(keys, 2, 0.1, 3)
    assert expected.min() < expected.max()  # the test is not of the bounds alone
    torch.testing.assert_close(lengths_of(keys, 2, 0.1), expected)


@pytest.mark.parametrize("value", [0.3, -2.0, 0.0])
def test_constant_keys_have_the_largest_length(value):
    keys = F.normalize(torch.full((1, 4, 5, 7), value))
    expected = LONGEST if value else 1.0  # vectors of 0 are at right angles to one another
    torch.testing.assert_close(lengths_of(keys, 2, 0.03), torch.full((1, 1, 5, 7), expected))


def test_windows_equal_those_of_the_whole():
    keys = keys_of((70, 90), spread=0.1)

    class Lazy(Given):
        whole = False

    whole = lengths_of(keys, 2, 0.03)
    lazy = Lengths(Lazy(keys), 2, 0.03)
    for window in (Window(0, 0, 5, 3), Window(60, 31, 10, 59), Window(20, 40, 30, 1)):
        torch.testing.assert_close(lazy.at(window), cut(whole, window))


@pytest.mark.parametrize("size", [(40, 24), (17, 9), (3, 2)])
def test_each_pixel_has_the_length_of_its_cell(size):
    keys, grid = keys_of((5, 4), spread=0.5), (5, 4)
    queries = torch.ones(2, 4, *size, dtype=torch.float64)
    found = Lengthened(Given(queries), Lengths(Given(keys), 1, 0.2))
    lengths = lengths_of(keys, 1, 0.2)
    assert lengths.min() < lengths.max()
    for y in range(size[0]):
        for x in range(size[1]):
            cell = [(2 * p + 1) * n // (2 * s) for p, n, s in zip((y, x), grid, size, strict=True)]
            own = lengths[:, :, cell[0], cell[1]].expand(2, 4)
            torch.testing.assert_close(found.at(Window(y, x, 1, 1))[:, :, 0, 0], own)
    last = Window(size[0] - 1, size[1] - 1, 1, 1)
    torch.testing.assert_close(found.all()[:, :, -1:, -1:], found.at(last))


def outlines(upsampler, image):
    """Mean change from one column to the next, of features that are 1 where the image is bright."""
    features = F.avg_pool2d(image[:, :1], 8) > image[:, :1].mean()
    with torch.no_grad():
        return upsampler(features.float(), image).diff(dim=3).abs().amax(3).mean()


@pytest.mark.parametrize("name", ["neighbourhood_universal", "detail_universal"])
def test_low_contrast_is_upsampled_as_sharply(name):
    """A bright square, also seen through fog."""
    image = -torch.ones(1, 3, 160, 160)
    image[:, :, 59:99, 61:101] = 1.0
    fog = 0.2 * image + 0.6
    plain, raised = upfeat.load_upsampler(name), upfeat.load_upsampler(name)
    getattr(plain, "neighbourhood", plain).least_contrast = 0.0
    assert outlines(plain, fog) < 0.7 * outlines(plain, image)
    assert outlines(raised, fog) > 1.4 * outlines(plain, fog)
    one = torch.ones(1, 2, 20, 20)
    torch.testing.assert_close(plain(one, fog), raised(one, fog))


def test_images_of_contrast_are_not_changed():
    """Bit for bit, and at no cost: the queries themselves are used."""
    queries, keys = Given(torch.randn(1, 4, 16, 16)), Given(keys_of((4, 4), spread=2.0))
    assert Lengthened(queries, Lengths(keys, 2, 0.03)).at(Window(0, 0, 16, 16)) is queries.values


def test_gradients():
    torch.manual_seed(0)
    upsampler = upfeat.NeighbourhoodUpsampler(query_dim=4, levels=2, least_contrast=0.5).double()
    image = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    features = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: upsampler(features, x), image)


@pytest.mark.parametrize("name", ["neighbourhood_universal", "detail_universal"])
def test_transforms_without_gradients(name):
    """Nothing may be decided by values there."""
    upsampler = upfeat.load_upsampler(name)
    features, images = torch.randn(2, 1, 3, 4, 4), torch.randn(2, 1, 3, 32, 32)
    with torch.no_grad():
        expected = torch.stack([upsampler(*one) for one in zip(features, images, strict=True)])
        found = torch.vmap(upsampler)(features, images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "0.03", None])
def test_bad_values(value):
    with pytest.raises((ValueError, TypeError), match="least_contrast"):
        upfeat.NeighbourhoodUpsampler(least_contrast=value)


def test_saved_folders_of_earlier_versions_do_what_they_did(tmp_path):
    upfeat.DetailUpsampler(least_contrast=0.03).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("least_contrast") == 0.03
    path.write_text(json.dumps(config))
    assert upfeat.load_upsampler(tmp_path).neighbourhood.least_contrast == 0
