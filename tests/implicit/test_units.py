"""Fits of features of any unit, and in any surroundings: autocast, inference mode."""

import pytest
import torch
import torch.nn.functional as F

import upfeat

SETTINGS = {"views": 6, "zoomed_views": 4, "held_out": 4, "anchors": 64, "max_pad": 6}
UNITS = [1e-8, 1e-5, 1e4]


def image(height=32, width=48):
    small = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1)[0]


def backbone(unit=1.0):
    """Means of colours over cells, and a nonlinear function of them, in a unit of its own."""

    def features(x):
        pooled = F.avg_pool2d(x, 8)
        return unit * torch.cat([pooled, pooled.square() + 1], dim=1)

    return upfeat.load_backbone(features)


def fit(unit=1.0, **settings):
    return upfeat.fit_implicit(image(), backbone(unit), **{**SETTINGS, **settings})


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("preset", ["fast", "reference"])
def test_a_fit_follows_the_unit_of_the_features(preset, unit):
    settings = {"preset": preset, "steps": 3}
    plain, scaled = fit(**settings), fit(unit, **settings)
    expected = plain.render()
    torch.testing.assert_close(scaled.render() / unit, expected, rtol=1e-3, atol=1e-3)
    assert scaled.facts["held_out"] == pytest.approx(plain.facts["held_out"], rel=1e-3)
    vectors = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    cosines = F.cosine_similarity(expected[:, None], vectors[:, :, None, None], dim=2)
    torch.testing.assert_close(scaled.similarity(unit * vectors), cosines, rtol=0, atol=1e-3)


@pytest.mark.parametrize("unit", UNITS)
def test_similarity_follows_the_unit_of_the_features(unit):
    x = backbone().preprocess(image())
    plain, scaled = (upfeat.load(backbone(one), upsampler="bilinear").lazy(x) for one in (1, unit))
    point = torch.tensor([3.0, 20.0])
    full = plain.full()
    cosines = F.cosine_similarity(full, full[:, :, 3:4, 20:21], dim=1)[:, None]
    torch.testing.assert_close(scaled.similarity(point), cosines, rtol=0, atol=1e-5)


@pytest.mark.parametrize("passes", [5, 8])
@pytest.mark.parametrize("unit", UNITS)
def test_further_passes_follow_the_unit_of_the_features(unit, passes):
    x = backbone().preprocess(image())
    plain, scaled = (upfeat.load(backbone(one), passes=passes)(x) for one in (1.0, unit))
    torch.testing.assert_close(scaled / unit, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_a_blank_image_is_fitted_whatever_the_features(constant):
    blank = torch.full((3, 32, 48), 0.3)
    for function in (backbone(), lambda x: constant * F.avg_pool2d(x, 8)):
        found = upfeat.fit_implicit(blank, function, **SETTINGS)
        assert found.facts["held_out"] < 1
        assert float(found.render().std((2, 3)).max()) < 1e-5


@pytest.mark.parametrize("preset", ["fast", "reference"])
def test_autocast_and_inference_mode_change_nothing(preset):
    settings = {"preset": preset, "steps": 3}
    plain, points = fit(**settings), torch.tensor([[3.0, 4.5]])
    head = torch.ones(2, 6)
    expected = plain.render(), plain.at(points), plain.project(head)
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    for surroundings in (half, torch.inference_mode()):
        with surroundings:
            found = fit(**settings)
            again = plain.render(), plain.at(points), plain.project(head)
        assert torch.equal(found.render(), expected[0])
        assert not found.mean.is_inference()
        for one, other in zip(again, expected, strict=True):
            assert torch.equal(one, other)


def test_a_configuration_of_another_type_is_named():
    for given in ({"size": 32}, "fast"):
        with pytest.raises(TypeError, match="config is of"):
            upfeat.fit_implicit(image(), backbone(), given)


@pytest.mark.parametrize(
    "settings", [{"size": 4000}, {"anchors": 4096}, {"preset": "reference", "size": 250}]
)
def test_a_fit_beyond_the_memory_is_refused_before_it_starts(monkeypatch, settings):
    monkeypatch.setattr("upfeat.machine.available_memory", lambda *_: 800 << 20)
    with pytest.raises(ValueError, match=r"image.*: .* of memory are free; give a smaller size"):
        upfeat.fit_implicit(image(), backbone(), **settings)
    fit()
