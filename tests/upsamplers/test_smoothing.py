"""Smoothing of the finer grid among cells that look alike to early layers."""

import json

import pytest
import torch
import torch.nn.functional as F

import upfeat
from upfeat.scales import smooth_on_fine_grid
from upfeat.types import Window
from upfeat.upsamplers import smoothing
from upfeat.upsamplers.maps import Computed, as_map, cut, inside, widened
from upfeat.upsamplers.smoothing import (
    BY_FEATURES_TOO,
    BY_LOOKS,
    ON_A_FINE_GRID,
    PIXEL_SMOOTHINGS,
    Smoothing,
    centred,
    smooth_pixels,
)

SIZE = (9, 12)


class Vectors(Computed):
    """Unit vectors that exist already."""

    def __init__(self, values, whole=True):
        super().__init__(tuple(values.shape[2:]), whole=whole, recorded=values.requires_grad)
        self.values = as_map(values)

    def compute(self, window):
        return self.values.at(window)


def draw(channels, size=SIZE, seed=0):
    return torch.randn(
        2, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def smooth(queries, hidden, features, radius=2, window=None, whole=True):
    made = Smoothing(Vectors(queries, whole), hidden, radius=radius, backend="auto")
    window = window or Window(0, 0, *features.shape[2:])
    around = made.around(window)
    rows, columns = slice(around.top, around.bottom), slice(around.left, around.right)
    return made.smooth(features[:, :, rows, columns], window)


def one_by_one(queries, hidden, features, radius, *, terms=BY_LOOKS):
    """The definition, cell by cell, with replicated edges."""
    centred = F.normalize(features - features.mean((2, 3), keepdim=True), dim=1)
    out, early = torch.empty_like(features), F.normalize(hidden, dim=1)
    looks = [(terms.queries, queries), (terms.early, early), (terms.features, centred)]
    height, width = features.shape[2:]
    reach = range(-radius, radius + 1)
    for image in range(len(features)):
        for y in range(height):
            for x in range(width):
                likeness, seen = [], []
                for down in reach:
                    for right in reach:
                        v, u = min(max(y + down, 0), height - 1), min(max(x + right, 0), width - 1)
                        alike = -(down**2 + right**2) / (2 * radius**2)
                        for factor, of in looks:
                            cosine = of[image, :, y, x] @ of[image, :, v, u]
                            alike = alike + factor * (cosine - 1)
                        likeness.append(alike.exp())
                        seen.append(features[image, :, v, u])
                likeness = torch.stack(likeness)
                bound = terms.highest * likeness[len(likeness) // 2]
                weights = likeness - (terms.threshold * likeness.mean()).clamp(max=bound)
                weights = weights.clamp(min=0)
                weights = weights / weights.sum()
                out[image, :, y, x] = (weights[:, None] * torch.stack(seen)).sum(0)
    return out


@pytest.mark.parametrize("spread", [0.05, 0.3, 3.0])
def test_definition(spread):
    """From images of one colour, where all cells are alike, to those where none are."""
    queries = F.normalize(1 + spread * draw(4), dim=1)
    hidden, features = 1 + spread * draw(3, seed=1), draw(5, seed=2)
    expected = one_by_one(queries, hidden, features, 2)
    torch.testing.assert_close(smooth(queries, hidden, features), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spread", [0.05, 0.3, 3.0])
@pytest.mark.parametrize("kept", [0, 1 << 22])
def test_definition_with_features(monkeypatch, spread, kept):
    """The same weights each time, of the features as they were."""
    monkeypatch.setattr(smoothing, "KEPT", kept)
    queries = F.normalize(1 + spread * draw(4), dim=1)
    hidden, features = 1 + spread * draw(3, seed=1), draw(5, seed=2)
    made = Smoothing(Vectors(queries), hidden, radius=2, backend="auto")
    once = one_by_one(queries, hidden, features, 2, terms=BY_FEATURES_TOO)
    torch.testing.assert_close(made.smooth_among_alike(features, 1), once, rtol=0, atol=1e-9)
    more = made.smooth_among_alike(torch.cat([features, torch.ones_like(features[:, :1])], 1), 3)
    assert more[:, :5].var() < once.var()
    torch.testing.assert_close(more[:, 5], torch.ones_like(more[:, 5]))


@pytest.mark.parametrize("spread", [0.05, 0.3, 3.0])
def test_definition_without_early_layers(spread):
    queries, features = F.normalize(1 + spread * draw(4), dim=1), draw(5, seed=2)
    expected = one_by_one(queries, queries, features, 2, terms=ON_A_FINE_GRID)
    settings = {"likeness": ON_A_FINE_GRID, "features": centred(features)}
    made = Smoothing(Vectors(queries), None, radius=2, backend="auto", **settings)
    torch.testing.assert_close(made.smooth_often(features, 1), expected, rtol=0, atol=1e-9)


def test_outlines_of_the_image_become_those_of_the_features():
    """Features change over some cells where the image has an edge; then they change there."""
    side = torch.zeros(1, 1, 16, 24, dtype=torch.float64)
    side[..., 12:] = 1
    image = Vectors(torch.cat([side, 1 - side], dim=1))
    soft = torch.linspace(-1, 1, 5, dtype=torch.float64)
    soft = torch.cat([-torch.ones(10), soft, torch.ones(9)]).expand(1, 1, 16, 24)
    edge = 2 * side - 1
    smoothed = smooth_on_fine_grid(soft.contiguous(), image, 4, "auto")
    assert (smoothed - edge).square().mean() < 0.5 * (soft - edge).square().mean()


def test_regions_of_pixels_become_flat_and_their_outline_stays():
    side = torch.zeros(1, 1, 20, 30, dtype=torch.float64)
    side[..., 13:] = 1
    image = torch.cat([side, 1 - side], dim=1)
    noisy = 2 * side - 1 + 0.2 * draw(1, size=(20, 30))[:1]
    smoothed = smooth_pixels(noisy, image, centred(noisy), 2)
    for region in (smoothed[..., :13], smoothed[..., 13:]):
        assert region.std() < 0.05
    assert abs(float((smoothed[..., 13:].mean() - smoothed[..., :13].mean()) - 2)) < 0.1


def test_pixels_of_a_window_are_smoothed_as_those_of_the_image():
    size, radius = (60, 77), 3
    queries = F.normalize(1 + 0.1 * draw(4, size=size), dim=1)
    features = draw(5, size=size, seed=2)
    alike = centred(features[:, :3])
    whole = smooth_pixels(features, queries, alike, radius)
    window = Window(20, 30, 9, 12)
    outer = widened(window, PIXEL_SMOOTHINGS * radius, size)
    seen, looks, compared = (cut(one, outer) for one in (features, queries, alike))
    found = smooth_pixels(seen, looks, compared, radius)
    place = inside(window, outer)
    torch.testing.assert_close(cut(found, place), cut(whole, window), rtol=0, atol=1e-9)
    assert float((whole - features).norm()) > 0.1 * float(features.norm())


def test_wider_cells_must_be_more_alike():
    queries = Vectors(F.normalize(1 + 0.3 * draw(4), dim=1))
    features = 1 + 0.3 * draw(5, seed=2)
    cells = (2, 4, 8, 16)
    changes = [smooth_on_fine_grid(features, queries, one, "auto") - features for one in cells]
    below, at, twice, more = (float(one.norm()) for one in changes)
    assert below == at > twice > more > 0


def test_features_tell_apart_what_looks_alike():
    """An edge that only the features show is kept, where smoothing by looks would lose it."""
    same = torch.ones(1, 2, *SIZE, dtype=torch.float64) / 2**0.5
    edge = torch.ones(1, 2, *SIZE, dtype=torch.float64)
    edge[:, :, :, 6:] = -1
    noise = 0.1 * draw(2, seed=3)[:1]
    made = Smoothing(Vectors(same), same, radius=3, backend="auto")
    lost = made.smooth(edge + noise, Window(0, 0, *SIZE))
    kept = made.smooth_among_alike(edge + noise, 3)
    assert (kept - edge).square().mean() < 0.3 * noise.square().mean()
    assert (lost - edge).square().mean() > 5 * noise.square().mean()


def test_unlike_neighbours_count_nothing():
    """A line one cell wide keeps its features, and so does what surrounds it."""
    line = torch.zeros(1, 1, *SIZE, dtype=torch.float64)
    line[..., 5] = 1
    looks = torch.cat([line, 1 - line], dim=1)
    noise = 0.1 * draw(1, seed=3)[:1]
    out = smooth(looks, looks, line + noise, radius=4)
    torch.testing.assert_close(smooth(looks, looks, line, radius=4), line, rtol=0, atol=1e-12)
    assert (out - line).square().mean() < 0.2 * noise.square().mean()


def test_constants_stay_and_the_unit_of_early_layers_has_no_effect():
    queries, hidden, features = F.normalize(draw(4), dim=1), draw(3, seed=1), draw(2, seed=2)
    ones = torch.ones_like(features)
    torch.testing.assert_close(smooth(queries, hidden, ones), ones)
    out = smooth(queries, hidden, features)
    for unit in (1e-12, 1e12):
        torch.testing.assert_close(smooth(queries, unit * hidden, features), out)
    assert smooth(queries, 0 * hidden, features).isfinite().all()


@pytest.mark.parametrize("kept", [0, 1 << 22])
def test_windows_are_those_of_the_whole(monkeypatch, kept):
    monkeypatch.setattr(smoothing, "KEPT", kept)
    monkeypatch.setattr(smoothing, "SIDE", 4)
    queries, hidden, features = F.normalize(draw(4), dim=1), draw(3, seed=1), draw(2, seed=2)
    whole = smooth(queries, hidden, features)
    for window in (Window(0, 0, 3, 4), Window(2, 5, 5, 7), Window(8, 11, 1, 1)):
        rows, columns = slice(window.top, window.bottom), slice(window.left, window.right)
        for computed_whole in (True, False):
            part = smooth(queries, hidden, features, window=window, whole=computed_whole)
            torch.testing.assert_close(part, whole[:, :, rows, columns], rtol=0, atol=1e-12)


def test_gradients():
    queries, hidden, features = (
        F.normalize(draw(2, (3, 4)), dim=1),
        *map(draw, (2, 2), [(3, 4)] * 2),
    )
    inputs = [one[:1].requires_grad_() for one in (queries, hidden, features)]
    assert torch.autograd.gradcheck(lambda *given: smooth(*given, radius=1), inputs)

    def alike(queries, hidden, features):
        made = Smoothing(Vectors(queries), hidden, radius=1, backend="auto")
        return made.smooth_among_alike(features, 2)

    assert torch.autograd.gradcheck(alike, inputs)


def test_only_with_early_layers():
    torch.manual_seed(0)
    settings = {"query_dim": 8, "levels": 2}
    plain = upfeat.DetailUpsampler(**settings).eval()
    up = upfeat.DetailUpsampler(smoothing=4, **settings).eval()
    up.load_state_dict(plain.state_dict())
    features, image, hidden = (
        torch.randn(1, 3, 6, 8),
        torch.rand(1, 3, 48, 64),
        torch.rand(1, 5, 12, 16),
    )
    assert up.config()["smoothing"] == 4
    assert torch.equal(up(features, image), plain(features, image))
    smooth, rough = up(features, image, hidden=hidden), plain(features, image, hidden=hidden)
    assert not torch.allclose(smooth, rough, atol=1e-3)
    assert smooth.var() < rough.var()


def test_settings_out_of_range():
    for wrong in (-1, 17, 2.5):
        with pytest.raises((TypeError, ValueError), match="smoothing="):
            upfeat.DetailUpsampler(smoothing=wrong)


def test_reach_counts_the_smoothing():
    torch.manual_seed(0)
    up = upfeat.DetailUpsampler(query_dim=8, levels=2, smoothing=5, ridge=0).double().eval()
    reach, side = up.reach, 2 * up.reach + 9
    assert reach > upfeat.DetailUpsampler(query_dim=8, levels=2, ridge=0).reach
    features, hidden = torch.randn(1, 2, side, 4).double(), torch.randn(1, 3, 2 * side, 8).double()
    image = torch.rand(1, 3, 8 * side, 32).double()
    out = up(features, image, hidden=hidden)
    own = slice(8 * (reach + 4), 8 * (reach + 5))
    for beyond in (slice(0, 4), slice(2 * reach + 5, side)):
        features[:, :, beyond] += 1
        hidden[:, :, 2 * beyond.start : 2 * beyond.stop] *= -1
    changed = up(features, image, hidden=hidden)
    torch.testing.assert_close(changed[:, :, own], out[:, :, own], rtol=0, atol=1e-12)
    assert not torch.allclose(changed, out)


def test_folders_from_before_are_not_smoothed(tmp_path):
    upfeat.DetailUpsampler(query_dim=8, levels=2, smoothing=4).save_pretrained(tmp_path)
    assert upfeat.load_upsampler(tmp_path).smoothing == 4
    config = json.loads((tmp_path / "config.json").read_text())
    del config["smoothing"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert upfeat.load_upsampler(tmp_path).smoothing == 0


def test_gradients_of_large_maps(monkeypatch):
    """Where weights are not kept, features that record gradients are smoothed at once."""
    monkeypatch.setattr(smoothing, "KEPT", 0)
    queries, hidden, features = F.normalize(draw(4), dim=1), draw(3, seed=1), draw(2, seed=2)
    expected = smooth(queries, hidden, features)
    out = smooth(queries, hidden, features.requires_grad_())
    torch.testing.assert_close(out, expected)
    assert torch.autograd.grad(out.sum(), features)[0].abs().sum() > 0
