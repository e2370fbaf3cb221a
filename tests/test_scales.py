"""A second scale: linear in both, exact in windows, right on average; refused in one line."""

import pytest
import torch
import torch.nn.functional as F

import upfeat
from upfeat.scales import SecondScale, fit_translation
from upfeat.translation import Translation, learn_translation
from upfeat.upsamplers import create_upsampler


def colours(x):
    """Mean colours of 8×8 cells and of their squares, four channels."""
    pooled = F.avg_pool2d(x, 8)
    return torch.cat([pooled, pooled.square().mean(1, keepdim=True)], dim=1)


def shifted(x):
    """The same, but said otherwise of an enlarged image: channels mixed, and a constant."""
    out = colours(x)
    if x.shape[2] < 100:
        return out
    mix = torch.tensor([[2.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0.5, 0, 1]])
    return (mix @ out.flatten(2)).unflatten(2, out.shape[2:]) + 3


class Fixed(upfeat.Backbone):
    """One grid, whatever the image's size."""

    def extract(self, x):
        return F.adaptive_avg_pool2d(x, 8)

    def grid_size(self, size):
        return 8, 8


def photo(height=64, width=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(1, 3, height // 16, width // 16, generator=generator)
    return F.interpolate(small, size=(height, width), mode="bicubic")


@pytest.fixture
def translation():
    generator = torch.Generator().manual_seed(1)
    weight = torch.eye(4) + 0.1 * torch.randn(4, 4, generator=generator)
    return Translation(weight, torch.randn(4, generator=generator))


def test_five_passes_are_a_model_as_any_other(translation):
    model = upfeat.load(colours, passes=5, translation=translation)
    x = photo(64, 72)
    full = model(x)
    assert (model.passes, model.backbone.stride, full.shape) == (5, 4, (1, 4, 64, 72))
    assert upfeat.load(colours).passes == 1
    lazy = model.lazy(x)
    torch.testing.assert_close(lazy.crop(5, 7, 30, 20), full[:, :, 5:35, 7:27])
    weight, bias = torch.randn(2, 4), torch.randn(2)
    expected = F.conv2d(full, weight[..., None, None], bias)
    torch.testing.assert_close(lazy.project(weight, bias), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x, (30, 41)).shape, torch.Size((1, 4, 30, 41)))


def test_the_last_step_is_that_of_the_detail_upsampler():
    upsampler = create_upsampler("detail_universal")
    guidance, finer = photo(64, 80), torch.randn(1, 3, 16, 20)
    kernels = upsampler.prepare(guidance, (8, 10), (64, 80))
    torch.testing.assert_close(upsampler.last_step()(finer, guidance), kernels.last(finer))


def test_joining_is_linear_in_both_scales(translation):
    scales = SecondScale(upfeat.load_backbone(colours), translation=translation)
    x = photo()
    pairs = [(torch.randn(1, 4, 8, 10), torch.randn(1, 4, 16, 20)) for _ in range(2)]
    zero = scales.join(x, torch.zeros(1, 4, 8, 10), torch.zeros(1, 4, 16, 20))
    first, second = (scales.join(x, *pair) - zero for pair in pairs)
    both = scales.join(x, pairs[0][0] + 2 * pairs[1][0], pairs[0][1] + 2 * pairs[1][1]) - zero
    torch.testing.assert_close(both, first + 2 * second, rtol=1e-4, atol=1e-4)


def test_features_that_know_no_scale_stay_as_they_are():
    """Where the second scale's cells average to the image's, it adds its detail and no more."""
    identity = Translation(torch.eye(4), torch.zeros(4))
    backbone = upfeat.load_backbone(colours)
    scales = SecondScale(backbone, translation=identity, share=1)
    second = torch.randn(1, 4, 16, 20)
    out = scales.join(photo(), F.avg_pool2d(second, 2), second)
    torch.testing.assert_close(out, second, rtol=1e-4, atol=1e-5)


def test_a_quarter_of_what_it_says_of_whole_cells_is_kept():
    identity = Translation(torch.eye(4), torch.zeros(4))
    scales = SecondScale(upfeat.load_backbone(colours), translation=identity, share=1)
    out = scales.join(photo(), torch.zeros(1, 4, 8, 10), torch.ones(1, 4, 16, 20))
    torch.testing.assert_close(out, torch.full_like(out, 0.25))


def test_the_share_leads_from_one_pass_to_the_second_scale(translation):
    x, backbone = photo(), upfeat.load_backbone(colours)
    own, second = torch.randn(1, 4, 8, 10), torch.randn(1, 4, 16, 20)
    ends = [
        SecondScale(backbone, translation=translation, share=share).join(x, own, second)
        for share in (0, 0.25, 1)
    ]
    torch.testing.assert_close(ends[1], 0.75 * ends[0] + 0.25 * ends[2])
    upsampler = create_upsampler("detail_universal")
    kernels = upsampler.prepare(upsampler.guidance_from(x, backbone), (8, 10), (64, 80))
    torch.testing.assert_close(ends[0], kernels.to_finer_grid(own))
    for ratio in (0.5, 2.5):
        with pytest.raises(ValueError, match=f"ratio={ratio} must be"):
            SecondScale(backbone, ratio=ratio)
    with pytest.raises(ValueError, match="share=2"):
        SecondScale(backbone, share=2)


def test_a_translation_is_learnt_from_images():
    backbone = upfeat.load_backbone(shifted)
    images = [photo(64, 80, seed) for seed in range(4)]
    learnt = fit_translation(backbone, images, penalty=1e-8)
    x = photo(64, 80, 9)
    second = backbone(F.interpolate(x, scale_factor=2.0, mode="bicubic"))
    own = backbone(x)
    lost = (learnt(F.avg_pool2d(second, 2)) - own).square().mean() / own.var()
    assert lost < 0.02
    with pytest.raises(ValueError, match="images is empty"):
        fit_translation(backbone, [])
    with pytest.raises(ValueError, match="pairs is empty"):
        learn_translation(iter(()))


def test_without_a_translation_each_image_has_its_own():
    """In a batch as alone."""
    model = upfeat.load(shifted, passes=5)
    x = torch.cat([photo(seed=3), photo(seed=4)])
    both = model(x)
    for index in range(2):
        torch.testing.assert_close(both[index], model(x[index : index + 1])[0])
    near = (F.avg_pool2d(both, 8) - shifted(x)).square().mean() / shifted(x).var()
    assert near < 0.1


def test_translations_are_kept_with_the_weights_they_are_for(tmp_path, translation):
    networks = [upfeat.load_backbone(torch.nn.Conv2d(3, 4, 8, 8)) for _ in range(2)]
    path = tmp_path / "t.safetensors"
    translation.save(path, networks[0])
    model = upfeat.load(networks[0], passes=5, translation=path, early=False)
    assert torch.equal(model.backbone.weight, translation.weight)
    with pytest.raises(ValueError, match="learnt for other weights"):
        upfeat.load(networks[1], passes=5, translation=path)
    upfeat.Bilinear().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a translation"):
        upfeat.load(networks[0], passes=5, translation=tmp_path / "model.safetensors")


def test_the_embedded_backbone_has_one():
    model = upfeat.load(passes=5)
    assert model.backbone.weight.shape == (112, 112)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 112, 64, 64)
    untrained = upfeat.load_backbone("efficientnet_lite0", pretrained=False)
    assert SecondScale(untrained).weight is None


def test_other_upsamplers_and_bands_take_part(translation):
    assert upfeat.load(colours, upsampler="bilinear", passes=5)(photo()).shape == (1, 4, 64, 80)
    many = upfeat.load_backbone(torch.nn.Conv2d(5, 4, 8, 8))
    model = upfeat.load(many, passes=5, bands=(4, 0, 2))
    assert model(torch.randn(1, 5, 64, 64)).shape == (1, 4, 64, 64)


def test_gradients_reach_the_image(translation):
    x = photo().requires_grad_()
    upfeat.load(colours, passes=5, translation=translation)(x).square().mean().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)


class OneSize(torch.nn.Module):
    """A network that takes images of a single size."""

    def forward(self, x):
        assert x.shape[2:] == (64, 64), f"takes 64×64, not {tuple(x.shape[2:])}"
        return colours(x)


def test_a_network_of_one_size_sees_the_enlarged_image_in_tiles():
    backbone = upfeat.load_backbone(OneSize(), fit="tile")
    x = photo(80, 96)
    out = upfeat.load(backbone, passes=5)(x)
    assert out.shape == (1, 4, 80, 96)
    torch.testing.assert_close(out, upfeat.load(colours, passes=5)(x), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_is_one_line(translation):
    with pytest.raises(ValueError, match=r"passes=3 must be one of \(1, 2, 5, 8\)"):
        upfeat.load(colours, passes=3)
    with pytest.raises(ValueError, match=r"even stride.*has 7; use passes=1"):
        upfeat.load(torch.nn.Conv2d(3, 4, 7, 7), passes=5)
    with pytest.raises(ValueError, match=r"grid grows.*\(8, 8\) cells.*\(13, 13\); use passes=1"):
        upfeat.load(Fixed(name="fixed", embed_dim=3, stride=8), passes=5)(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="translation is of 4 channels"):
        upfeat.load(torch.nn.Conv2d(3, 6, 8, 8), passes=5, translation=translation)
    with pytest.raises(ValueError, match="passes=1"):
        upfeat.load(colours, translation=translation)
