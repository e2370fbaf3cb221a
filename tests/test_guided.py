"""Backbones without early layers of their own: a second network's layers guide in their place."""

import pickle

import pytest
import torch
import torch.nn.functional as F

import upfeat
from upfeat.activations import activation_bytes
from upfeat.guided import GUIDE, Guided, has_early_layers
from upfeat.mirrored import Mirrored
from upfeat.mosaic import see_within
from upfeat.receptive_field import receptive_halo
from upfeat.scales import SecondScale
from upfeat.testing import check_backbone
from upfeat.upsamplers.detail import DetailKernels


class Tokens(upfeat.Backbone):
    """Brightness and its square in 14×14 cells, as a transformer gives them: one grid only."""

    def __init__(self, channels=3):
        mean, std = [0.4] * channels, [0.2] * channels
        super().__init__(
            name="tokens", embed_dim=2, stride=14, mean=mean, std=std, in_channels=channels
        )

    def extract(self, x):
        level = F.avg_pool2d(x.square().mean(1, keepdim=True), 14)
        return torch.cat([level, level.square()], dim=1)


class Brightness(upfeat.Backbone):
    """A guide of stride 4: the squares of the image, in its own normalisation."""

    def __init__(self):
        super().__init__(name="brightness", embed_dim=1, stride=4, mean=[0.4] * 3, std=[0.2] * 3)

    def extract(self, x):
        return F.avg_pool2d(x.square().mean(1, keepdim=True), 4)


@pytest.fixture(scope="module")
def guided():
    return Guided(Tokens())


def photo(height=70, width=98, seed=0, count=1, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, height, width, generator=generator)


def hidden_of(backbone, x):
    hidden = backbone.hidden(x)
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("size", [(70, 98), (14, 14), (75, 101), (14, 200)])
def test_features_are_the_backbones_own(guided, size):
    x = photo(*size, count=2)
    features, hidden = guided.with_hidden(x)
    assert torch.equal(features, Tokens()(x))
    assert torch.equal(guided(x), features)
    assert hidden.shape == (2, 24 + 40 + 112, 2 * features.shape[2], 2 * features.shape[3])
    assert guided.grid_size(size) == tuple(features.shape[2:])
    assert torch.equal(guided.hidden(x), hidden)


def test_the_guide_sees_colours_as_it_is_used_to():
    """Layers of strides 4, 8 and 16, of the image in the guide's own normalisation, aligned."""
    backbone = upfeat.load_backbone(GUIDE).aligned(2)
    x = photo(112, 112)
    hidden = hidden_of(Guided(Tokens()), x)
    layers, early = backbone.with_hidden(Tokens().normalization.convert(x, backbone.normalization))
    assert early is not None
    expected = (
        F.adaptive_avg_pool2d(early, (16, 16)),
        F.interpolate(layers, size=(16, 16), mode="bilinear", align_corners=False),
    )
    # 28×28 cells of stride 4 to 16×16, and 14×14 of stride 8.
    torch.testing.assert_close(hidden, torch.cat(expected, 1), rtol=1e-4, atol=1e-4)


def test_the_guide_tells_what_colours_cannot():
    """Noise whose mean brightness varies: its colours are alike everywhere, the guide's are not."""
    x = photo(224, 224)
    finer = F.avg_pool2d(x.square().mean(1, keepdim=True), 7)
    finer = torch.cat([finer, finer.square()], 1)
    lost = {}
    for backbone in (Tokens(), Guided(Tokens(), Brightness())):
        kernels = upfeat.load(backbone, early=isinstance(backbone, Guided)).lazy(x).kernels
        assert isinstance(kernels, DetailKernels)
        found = kernels.to_finer_grid(backbone(x))
        lost[backbone] = float((found - finer)[:, :1].square().mean())
    plain, guided = lost.values()
    assert guided < 0.9 * plain


def test_every_way_gives_the_same():
    model, x = upfeat.load(Tokens(), early=True), photo(112, 70)
    assert isinstance(model.backbone, Guided)
    full, lazy = model(x), model.lazy(x)
    assert full.shape == (1, 2, 112, 70)
    assert float((full - upfeat.load(Tokens(), early=False)(x)).abs().mean()) > 1e-3
    torch.testing.assert_close(lazy.crop(5, 7, 30, 20), full[:, :, 5:35, 7:27])
    weight = torch.randn(3, 2)
    expected = F.conv2d(full, weight[..., None, None])
    torch.testing.assert_close(lazy.project(weight), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(lazy)).full(), full)
    torch.testing.assert_close(model(x[..., :56, :]), model(x[..., :56, :].clone()))


@pytest.mark.parametrize("passes", [1, 2])
def test_layers_guide_by_default(passes):
    """The default upsampler is given early layers; one that is named is not."""
    x = photo(112, 70)
    model = upfeat.load(Tokens(), passes=passes)
    assert isinstance(model.backbone, Guided)
    assert torch.equal(model(x), upfeat.load(Tokens(), passes=passes, early=True)(x))
    named = upfeat.load(Tokens(), passes=passes, upsampler="detail_universal")
    assert not named.early
    assert torch.equal(named(x), upfeat.load(Tokens(), passes=passes, early=False)(x))
    assert torch.equal(model.backbone(x), named.backbone(x))


class Demanding(Tokens):
    """Tokens of images that are not too small, with early layers of no use, or none."""

    def __init__(self, hidden, channels=3):
        super().__init__(channels)
        self.layers = hidden

    def extract_with_hidden(self, x):
        if self.layers == "large":
            raise RuntimeError("images must have 200 pixels")
        return self.extract(x), torch.ones(1, 2, 3, 3)


@pytest.mark.parametrize("hidden", ["large", "coarse"])
def test_the_default_goes_without_layers_that_cannot_be_had(hidden):
    assert not upfeat.load(Demanding(hidden)).early
    assert not upfeat.load(Tokens(channels=4)).early
    with pytest.raises((RuntimeError, ValueError)):
        upfeat.load(Demanding(hidden), early=True)


def test_it_is_said_whose_layers_are_used():
    assert f"with early layers of {GUIDE}: 2 channels" in repr(upfeat.load(Tokens(), early=True))
    own = upfeat.load("efficientnet_lite0", upsampler="detail_universal", early=True)
    assert not isinstance(own.backbone, Guided)
    assert "with early layers: 112 channels" in repr(own)


def test_bands_of_other_images():
    x, bands = photo(channels=5), (3, 1, 0)
    model = upfeat.load(Tokens(5), bands=bands, early=True)
    assert isinstance(model.backbone, Guided)
    three = x[:, list(bands)]
    expected = hidden_of(Guided(Tokens()), three)
    torch.testing.assert_close(hidden_of(model.backbone, x), expected, rtol=1e-3, atol=1e-3)
    assert model(x).shape == (1, 2, 70, 98)
    with pytest.raises(ValueError, match=r"early=True: tokens takes images of 5 bands, and effici"):
        upfeat.load(Tokens(5), early=True)


def test_a_bound_of_memory_does_not_change_the_guides_layers():
    """The guide sees farther than the backbone, and its coarsest cells are two of these."""
    guided = Guided(upfeat.load_backbone(torch.nn.Conv2d(3, 2, 8, 8)))
    assert (guided.step, receptive_halo(guided)) == (2, 0)
    halo = receptive_halo(guided, early=True)
    assert halo is not None
    x, side = photo(8 * 100, 8 * 90), 8 * (17 + 2 * (halo + 2))
    memory = activation_bytes(guided, early=True) * side**2
    assert activation_bytes(guided, early=True) > activation_bytes(guided)
    with pytest.raises(ValueError, match="cannot work in tiles; give a smaller size, or more mem"):
        see_within(guided, photo(8 * 101, 8 * 90), memory, early=True)
    with torch.no_grad():
        whole = guided.with_hidden(x)
    for part, expected in zip(see_within(guided, x, memory, early=True), whole, strict=True):
        assert expected is not None
        largest = float(expected.abs().max())
        torch.testing.assert_close(part, expected, rtol=0, atol=3e-5 * largest)


def test_two_passes_and_alignment():
    x = photo()
    model = upfeat.load(Tokens(), passes=2, early=True)
    assert isinstance(model.backbone, Guided)
    assert isinstance(model.backbone.backbone, Mirrored)
    assert model.passes == 2
    moved = Guided(Tokens()).aligned(3)
    assert moved.displacement == 3
    assert torch.equal(moved(x), Tokens().aligned(3)(x))
    assert torch.equal(hidden_of(moved, x), hidden_of(Guided(Tokens()), x))


def test_upsamplers_trained_on_early_layers_are_not_given_the_guides():
    up = upfeat.EarlyDetailUpsampler(2, hidden_dim=3, query_dim=8, levels=2, width=4, depth=1)
    with pytest.raises(ValueError, match="early_detail was trained on early layers, and tokens ha"):
        upfeat.load(Tokens(), upsampler=up)
    assert not has_early_layers(Tokens())
    made = upfeat.EarlyDetailUpsampler(2, hidden_dim=176, query_dim=8, levels=2, width=4, depth=1)
    assert upfeat.load(Guided(Tokens()), upsampler=made).early


def test_it_conforms(guided):
    check_backbone(lambda: guided)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    model, x = upfeat.load(torch.nn.Conv2d(3, 4, 14, 14), early=True), photo(56, 70)
    exact = model(x)
    rounded = model.to(dtype)(x.to(dtype))
    assert rounded.dtype == dtype
    assert float((rounded.float() - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("passes", [5, 8])
def test_five_passes_are_guided_too(passes):
    """Both steps of the upsampler follow the second scale, the first with the guide's layers."""
    model, x = upfeat.load(Tokens(), passes=passes, early=True), photo(112, 98)
    assert isinstance(model.backbone, Guided)
    assert isinstance(model.backbone.backbone, SecondScale)
    assert (model.passes, model.backbone.stride) == (passes, 7)
    full, plain = model(x), upfeat.load(Tokens(), passes=passes, early=False)
    assert hidden_of(model.backbone, x).shape == (1, 176, 32, 28)
    assert torch.equal(model.backbone(x), plain.backbone(x))
    assert 1e-3 < float((full - plain(x)).abs().mean()) < float(full.std())
    torch.testing.assert_close(model.lazy(x).crop(5, 7, 30, 20), full[:, :, 5:35, 7:27])


@pytest.mark.parametrize(("channels", "factor"), [(40, 1), (48, 1), (96, 2)])
def test_many_channels_are_penalised_more(channels, factor):
    """The coefficients are fitted from an image's cells, however many regressors there are."""
    up, hidden = upfeat.load_upsampler("detail_universal"), torch.randn(1, channels, 16, 20)
    kernels = up.prepare_with(photo(64, 80), (8, 10), (64, 80), hidden=hidden)
    assert isinstance(kernels, DetailKernels)
    assert kernels.regression is not None
    assert kernels.regression.penalty == pytest.approx(factor * up.ridge)
