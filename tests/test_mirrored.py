"""Features of an image and of its mirror image, averaged: the cost, the symmetry, the options."""

import pytest
import torch
import torch.nn.functional as F

import upfeat
from upfeat.evaluation.passes import find_passes
from upfeat.mirrored import Mirrored
from upfeat.scales import SecondScale


def photo(height=64, width=96):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    return upfeat.load_backbone("efficientnet_lite0").eval().requires_grad_(False)


def test_features_do_not_depend_on_left_and_right(network):
    mirrored, x = Mirrored(network), photo()
    for first, second in zip(mirrored.with_hidden(x), mirrored.with_hidden(x.flip(3)), strict=True):
        torch.testing.assert_close(first, second.flip(3))
    torch.testing.assert_close(mirrored(x), (network(x) + network(x.flip(3)).flip(3)) / 2)


def test_an_image_and_its_mirror_image_are_both_aligned(network):
    aligned, x = Mirrored(network).aligned(2), photo()
    assert aligned.displacement == 2
    inner = network.aligned(2)
    torch.testing.assert_close(aligned(x), (inner(x) + inner(x.flip(3)).flip(3)) / 2)


@pytest.mark.parametrize(("passes", "stride"), [(1, 16), (2, 16), (5, 4), (8, 4)])
def test_passes_are_what_the_network_computes(monkeypatch, passes, stride):
    """Sides of the enlarged image are rounded down to whole cells, so that no more are computed."""
    model, x = upfeat.load(passes=passes), photo()
    pixels = []
    extract = upfeat.backbones.EfficientNetLite.extract
    both = upfeat.backbones.EfficientNetLite.extract_with_hidden

    def counted(made):
        def call(self, image):
            pixels.append(image.shape[2] * image.shape[3])
            return made(self, image)

        return call

    monkeypatch.setattr(upfeat.backbones.EfficientNetLite, "extract", counted(extract))
    monkeypatch.setattr(upfeat.backbones.EfficientNetLite, "extract_with_hidden", counted(both))
    assert model(x).shape == (1, 112, 64, 96)
    enlarged = {1: 0, 2: 0, 5: 6 * 10, 8: 2 * 6 * 10}[passes] / (4 * 6)
    assert sum(pixels) / (64 * 96) == min(passes, 2) + enlarged <= passes == model.passes
    assert model.backbone.stride == stride


def test_wrapped_models_of_any_kind_are_mirrored():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 7, 7), torch.nn.ReLU())
    model, x = upfeat.load(network, passes=2, upsampler="nearest"), photo(63, 98)
    expected = (network(x) + network(x.flip(3)).flip(3)) / 2
    torch.testing.assert_close(F.avg_pool2d(model(x), 7), expected, rtol=1e-4, atol=1e-5)


def test_the_second_scale_of_a_mirrored_backbone(network):
    both = SecondScale(network, mirrored=True)
    assert (both.passes, both.name) == (8, "efficientnet_lite0.passes8")
    aligned = both.aligned(2)
    assert aligned.own.displacement == aligned.enlarged.displacement == 2
    assert both.displacement == both.backbone.displacement == both.own.displacement == 0
    method = find_passes("detail_universal@8", network)
    assert method is not None
    assert method.passes == 8


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"passes=3 must be one of \(1, 2, 5, 8\)"):
        upfeat.load(passes=3)
    with pytest.raises(ValueError, match="translation is for passes=5 and 8; with passes=2"):
        upfeat.load(passes=2, translation="translation.safetensors")


@pytest.mark.parametrize("options", [{"passes": 2}, {"passes": 5}, {"passes": 8}, {"early": True}])
def test_images_are_prepared_as_for_the_backbone_itself(options):
    """Five passes once resized by another filter than the backbone's own configuration says."""
    plain = upfeat.load_backbone(torch.nn.Conv2d(3, 4, 8, 8))
    plain.interpolation = "bilinear"
    image = torch.rand(3, 50, 70)
    found = upfeat.load(plain, **options).preprocess(image, 24)
    assert torch.equal(found, plain.preprocess(image, 24))
