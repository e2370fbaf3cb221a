"""Guidance of any number of bands: a rule, not an accident of units."""

import math

import pytest
import torch
import torch.nn.functional as F

import upfeat
from upfeat.upsamplers import create_upsampler
from upfeat.upsamplers.bands import even_bands, three_bands

NAMES = ["joint_bilateral", "neighbourhood_universal", "detail_universal", "jbu_stack_universal"]


@pytest.fixture(scope="module", params=NAMES)
def upsampler(request):
    return create_upsampler(request.param)


def scene(size=128):
    """A field border that near infrared alone shows, across smooth colours: bands, true features.

    Red, green and blue vary by something else, in patches that have nothing to do with it.
    """
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    field = (y + 6 * torch.sin(x / 7.0) > size / 2 + 3).float()
    colours = torch.rand(1, 3, 5, 5, generator=generator)
    colours = F.interpolate(colours, size=(size, size), mode="bicubic").clamp(0, 1)[0]
    infrared = 0.2 + 0.5 * field + 0.02 * torch.randn(size, size, generator=generator)
    bands = torch.cat([colours, infrared[None]])[None]
    truth = torch.stack([field, 1 - field, 3 * field - 1])[None]
    return bands, truth


def mean_error(upsampler, bands, truth, cells=16):
    features = F.avg_pool2d(truth, truth.shape[-1] // cells)
    with torch.inference_mode():
        return float((upsampler(features, bands) - truth).abs().mean())


def test_a_border_that_one_band_alone_shows_is_followed(upsampler):
    if upsampler.name == "jbu_stack":
        pytest.skip("its trained weights do not keep constants, whatever the guidance")
    bands, truth = scene()
    seen = mean_error(upsampler, bands, truth)
    assert seen < 0.8 * mean_error(upfeat.Bilinear(), bands, truth)
    assert seen < 0.8 * mean_error(upsampler, bands[:, :3], truth)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 13])
def test_any_number_of_bands_is_no_worse_than_bilinear(upsampler, count):
    if upsampler.name == "jbu_stack":
        pytest.skip("its trained weights do not keep constants, whatever the guidance")
    bands, truth = scene()
    generator = torch.Generator().manual_seed(count)
    # Bands are mixtures of near infrared and the colours, in any units.
    mixture = torch.rand(count, 4, generator=generator) * torch.tensor([0.1, 0.1, 0.1, 1.0])
    units = 10 ** (3 * torch.rand(count, 1, 1, generator=generator))
    mixed = torch.einsum("nb,zbhw->znhw", mixture, bands) * units + units
    assert mean_error(upsampler, mixed, truth) < mean_error(upfeat.Bilinear(), mixed, truth)


def test_constants_stay_and_results_are_the_same_every_time(upsampler):
    bands, _ = scene(32)
    features = torch.randn(1, 5, 4, 4, generator=torch.Generator().manual_seed(1))
    state = torch.random.get_rng_state()
    one = upsampler(features, bands)
    assert torch.equal(state, torch.random.get_rng_state())
    again = create_upsampler(
        f"{upsampler.name}_universal" if upsampler.name != "joint_bilateral" else upsampler.name
    )
    assert torch.equal(one, again(features, bands))
    assert "_for_bands" not in "".join(upsampler.state_dict())
    if upsampler.name != "jbu_stack":
        constant = upsampler(torch.full((1, 2, 4, 4), 3.0), bands)
        torch.testing.assert_close(constant, torch.full((1, 2, 32, 32), 3.0))


def test_units_and_doubled_bands_play_no_part(upsampler):
    bands, truth = scene(32)
    features = F.avg_pool2d(truth, 8)
    gain = torch.tensor([1e4, 1e-4, 3.0, 100.0])[:, None, None]
    expected = upsampler(features, bands)
    torch.testing.assert_close(
        upsampler(features, bands * gain + gain), expected, rtol=0, atol=2e-2
    )
    blank = torch.cat([bands, torch.full((1, 1, 32, 32), 7.0)], 1)
    assert torch.isfinite(upsampler(features, blank)).all()
    assert torch.isfinite(upsampler(features, torch.zeros_like(bands))).all()


def test_crops_points_batches_and_gradients(upsampler):
    bands, truth = scene(32)
    features = F.avg_pool2d(truth, 8)
    lazy = upfeat.UpsampledFeatures(features, bands, upsampler)
    full = lazy.full()
    torch.testing.assert_close(lazy.crop(3, 5, 11, 7), full[:, :, 3:14, 5:12])
    torch.testing.assert_close(lazy.at(torch.tensor([[4.0, 9.0]])), full[:, :, 4, 9])
    two = upsampler(features.expand(2, -1, -1, -1), torch.cat([bands.flip(3), bands]))
    torch.testing.assert_close(two[1:], full)
    leaf = bands.clone().requires_grad_()
    upsampler(features, leaf).square().sum().backward()
    assert torch.isfinite(leaf.grad).all()
    assert leaf.grad.abs().sum() > 0


def test_lazy_features_of_bands_are_saved(tmp_path):
    bands, truth = scene(32)
    upsampler = create_upsampler("detail_universal")
    lazy = upfeat.UpsampledFeatures(F.avg_pool2d(truth, 8), bands, upsampler)
    lazy.save(tmp_path / "a.safetensors", exact=True)
    again = upfeat.UpsampledFeatures.load(tmp_path / "a.safetensors", upsampler)
    assert torch.equal(again.full(), lazy.full())


def test_evening_decorrelates_and_leaves_rgb_alone():
    bands, _ = scene(64)
    assert even_bands(bands[:, :3]) is bands[:, :3] or even_bands(bands[:, :3]).equal(bands[:, :3])
    doubled = torch.cat([bands[:, :1]] * 5 + [bands[:, 3:]], 1)
    even = even_bands(doubled)
    total = even.flatten(2).var(2, correction=0).sum()
    assert math.isclose(float(total), 3, rel_tol=0.05)
    # Five copies of red and one infrared: both count alike.
    spread = torch.linalg.eigvalsh(even[0].flatten(1) @ even[0].flatten(1).T)
    assert spread[-1] < 3 * spread[-2]
    for count in (1, 2, 5):
        assert three_bands(doubled[:, :count]).shape == (1, 3, 64, 64)


def test_what_sees_rgb_alone_says_so():
    bands, _ = scene(32)
    own = create_upsampler("detail", 112, backbone="efficientnet_lite0")
    with pytest.raises(ValueError, match=r"guidance has 4 channels.*detail_universal"):
        own(torch.zeros(1, 112, 2, 2), bands)


def test_backbones_of_other_bands_and_chosen_triples():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(4, 6, 8, stride=8)
    model = upfeat.load(network)
    assert model.backbone.in_channels == 4
    scene_of_bytes = torch.randint(0, 256, (40, 48, 4), dtype=torch.uint8).numpy()
    x = model.preprocess(scene_of_bytes)
    torch.testing.assert_close(x[0, :, 3, 5], torch.from_numpy(scene_of_bytes[3, 5] / 255).float())
    assert model(x).shape == (1, 6, 40, 48)
    assert not model.early  # the guide takes three bands
    chosen = upfeat.load(network, bands=(3, 0, 1), early=False)
    expected = chosen.upsampler(
        chosen.backbone(x),
        (x[:, [3, 0, 1]] - torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        / torch.tensor([0.229, 0.224, 0.225])[:, None, None],
    )
    torch.testing.assert_close(chosen(x), expected)
    torch.testing.assert_close(chosen.lazy(x).full(), expected)
    guided = upfeat.load(network, bands=(3, 0, 1))
    assert guided.backbone.bands == [3, 0, 1]
    assert guided(x).shape == expected.shape
    with pytest.raises(ValueError, match="three of the 4 bands"):
        upfeat.load(network, bands=(3, 4, 1))
    with pytest.raises(ValueError, match=r"x must be \(B, 4, H, W\)"):
        model(x[:, :3])


def test_a_mask_has_no_influence_and_leaves_zeros():
    model = upfeat.load("efficientnet_lite0")
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(64, 96, dtype=torch.bool)
    mask[10:44, 20:61] = True
    other = x.masked_fill(mask, math.nan)
    out = model(x, mask=mask)
    assert torch.equal(out, model(other, mask=mask))
    assert (out[..., mask] == 0).all()
    assert (out[..., ~mask] != 0).any(1).all()
    lazy = model.lazy(other, mask=mask)
    torch.testing.assert_close(lazy.full(), out)
    torch.testing.assert_close(lazy.crop(5, 9, 20, 30), out[:, :, 5:25, 9:39])
    points = torch.tensor([[12.0, 30.0], [2.0, 3.0]])
    torch.testing.assert_close(
        lazy.at(points), out[0, :, points[:, 0].long(), points[:, 1].long()].T
    )
    assert (model(x, (30, 50), mask=mask)[..., 13, 20] == 0).all()


def test_masked_lazy_features_are_saved(tmp_path):
    model = upfeat.load("efficientnet_lite0", upsampler="bilinear")
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:9, :7] = True
    lazy = model.lazy(torch.randn(1, 3, 32, 32), mask=mask)
    lazy.save(tmp_path / "a.safetensors", exact=True)
    again = upfeat.UpsampledFeatures.load(tmp_path / "a.safetensors")
    assert torch.equal(again.full(), lazy.full())
