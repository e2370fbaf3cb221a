"""The training objective: what it equals, what it reaches, and how views are made."""

import pytest
import torch
from torch import nn

import upfeat
from upfeat.downsamplers import AttentionDownsampler
from upfeat.losses import gaussian_reconstruction, random_projection
from upfeat.training import TrainConfig
from upfeat.training.objective import Objective, make_batch
from upfeat.views import apply_jitter

CHANNELS = 12


@pytest.fixture
def backbone():
    torch.manual_seed(1)
    module = nn.Conv2d(3, CHANNELS, 8, stride=8).eval().requires_grad_(False)
    return upfeat.load_backbone(module)


def _config(**changes):
    settings = {"size": 32, "views": 3, "max_pad": 4, "saliency_dropout": 0.0, "crf_weight": 0.0}
    settings |= {"standardize": False, "colour_jitter": 0.0, "max_zoom": 2.0, "source_size": None}
    return TrainConfig(**{**settings, **changes})


def _objective(upsampler, config):
    generator = torch.Generator().manual_seed(5)
    return Objective(upsampler, CHANNELS, 8, config, generator=generator)


def _upsampler(name):
    torch.manual_seed(2)
    if name == "jbu_stack":
        stack = upfeat.JBUStack(CHANNELS, n_stages=3).eval()
        nn.init.normal_(stack.channel_mix.bias, std=0.1)  # initially 0
        return stack
    if name == "detail":
        made = upfeat.DetailUpsampler(CHANNELS, query_dim=8, levels=2, width=4, depth=1).eval()
        torch.nn.init.normal_(made.detail.weight)
        return made
    return upfeat.NeighbourhoodUpsampler(query_dim=8, levels=2).eval()


@pytest.mark.parametrize("downsampler", ["attention", "simple", "cell"])
@pytest.mark.parametrize("name", ["jbu_stack", "neighbourhood", "detail"])
def test_projecting_first_gives_the_loss_of_upsampling_all_channels(backbone, name, downsampler):
    config = _config(downsampler=downsampler, projection_dim=5)
    upsampler = _upsampler(name)
    objective = _objective(upsampler, config)
    batch = make_batch(
        backbone, torch.randn(2, 3, 32, 32), config, torch.Generator().manual_seed(0)
    )
    found = objective(batch, torch.Generator().manual_seed(7))["loss"]

    generator = torch.Generator().manual_seed(7)
    directions = torch.stack([random_projection(CHANNELS, 5, generator=generator) for _ in "ab"])
    full = upsampler(batch.features, batch.guidance)
    losses = []
    for jitter, target in zip(batch.jitters, batch.targets, strict=True):
        guess = objective.downsampler(apply_jitter(full, jitter), (4, 4))
        guess, seen = (torch.einsum("bchw,bcp->bphw", x, directions) for x in (guess, target))
        losses.append(gaussian_reconstruction(guess, seen, objective.uncertainty(target)))
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["jbu_stack", "neighbourhood"])
def test_gradients_reach_everything_that_is_trained(backbone, name):
    config = _config(
        projection_dim=6, crf_weight=1e-3, tv_weight=1e-2, magnitude_weight=1e-2,
        saliency_dropout=0.2, downsampler="attention",
    )  # fmt: skip
    objective = _objective(_upsampler(name), config).train()
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(backbone, torch.randn(2, 3, 32, 32), config, generator)
    terms = objective(batch, generator)
    assert set(terms) == {"loss", "reconstruction", "crf", "tv", "magnitude"}
    terms["loss"].backward()
    for label, parameter in objective.named_parameters():
        assert parameter.grad is not None, label
        assert torch.isfinite(parameter.grad).all(), label
    assert isinstance(objective.downsampler, AttentionDownsampler)


def test_all_channels_when_no_projection_is_asked_for(backbone):
    config = _config(projection_dim=None)
    objective = _objective(_upsampler("neighbourhood"), config)
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(backbone, torch.randn(1, 3, 32, 32), config, generator)
    assert torch.isfinite(objective(batch, generator)["loss"])


def test_standardized_channels_weigh_alike(backbone):
    """Scaling a channel of the backbone changes nothing."""
    config = _config(standardize=True, projection_dim=None)
    objective = _objective(_upsampler("neighbourhood"), config)
    torch.nn.init.zeros_(objective.uncertainty.weight)
    objective.downsampler = upfeat.downsamplers.CellDownsampler()
    images, scale = torch.randn(2, 3, 32, 32), torch.linspace(0.5, 2, CHANNELS)[:, None, None]
    batch = make_batch(backbone, images, config, torch.Generator().manual_seed(0))
    scaled = batch._replace(features=batch.features * scale, targets=batch.targets * scale)
    losses = [objective(one, torch.Generator())["loss"] for one in (batch, scaled)]
    torch.testing.assert_close(*losses)


class TestMakeBatch:
    def test_views_without_jitter_are_the_image(self, backbone):
        config = _config(max_pad=0, max_zoom=1.0, flip_probability=0.0)
        batch = make_batch(backbone, torch.randn(2, 3, 32, 32), config, torch.Generator())
        assert batch.targets.shape == (3, 2, CHANNELS, 4, 4)
        for target in batch.targets:
            torch.testing.assert_close(target, batch.features)

    def test_each_image_has_views_of_its_own(self, backbone):
        image = torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1)
        batch = make_batch(backbone, image, _config(), torch.Generator().manual_seed(0))
        assert not torch.allclose(batch.targets[0, 0], batch.targets[0, 1])

    def test_views_of_a_finer_image_show_its_detail(self, backbone):
        config = _config(size=32, source_size=64, max_zoom=2.0, zoom_probability=1.0)
        source = torch.randn(2, 3, 64, 64)
        batch = make_batch(backbone, source, config, torch.Generator().manual_seed(0))
        assert batch.guidance.shape == (2, 3, 32, 32)
        coarse = make_batch(
            backbone, batch.guidance, _config(max_zoom=2.0, zoom_probability=1.0),
            torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert batch.targets.std() > 1.2 * coarse.targets.std()

    def test_the_upsampler_may_see_other_colours_than_the_backbone(self, backbone):
        images, draw = torch.randn(4, 3, 32, 32), torch.Generator().manual_seed
        mean = std = (0.5, 0.5, 0.5)
        backbone = upfeat.load_backbone(backbone.module, mean=mean, std=std)
        plain = make_batch(backbone, images, _config(), draw(0))
        mixed = make_batch(backbone, images, _config(mixed_normalization=True), draw(0))
        torch.testing.assert_close(plain.features, mixed.features)
        torch.testing.assert_close(plain.targets, mixed.targets)
        same = [torch.equal(a, b) for a, b in zip(plain.guidance, mixed.guidance, strict=True)]
        assert {True, False} == set(same)
        jittered = make_batch(backbone, images, _config(colour_jitter=0.1), draw(0))
        torch.testing.assert_close(plain.features, jittered.features)
        assert not torch.allclose(plain.guidance, jittered.guidance)

    def test_nothing_of_it_has_a_gradient(self, backbone):
        batch = make_batch(backbone, torch.randn(1, 3, 32, 32), _config(), torch.Generator())
        assert not batch.features.requires_grad
        assert not batch.targets.requires_grad


@pytest.mark.parametrize("name", ["jbu_stack", "neighbourhood"])
def test_a_blank_image_weighs_no_more_than_others(backbone, name):
    config = _config(standardize=True, projection_dim=5)
    objective = _objective(_upsampler(name), config)
    images = torch.randn(2, 3, 32, 32)
    images[1] = 0.5  # features without any variance
    batch = make_batch(backbone, images, config, torch.Generator().manual_seed(0))
    assert objective(batch, torch.Generator().manual_seed(7))["loss"] < 10


@pytest.mark.parametrize("factor", [1e3, 1e6])
def test_the_loss_does_not_depend_on_the_unit_of_large_features(backbone, factor):
    config = _config(standardize=True, projection_dim=5)
    objective = _objective(_upsampler("neighbourhood"), config)
    batch = make_batch(
        backbone, torch.randn(2, 3, 32, 32), config, torch.Generator().manual_seed(0)
    )

    def loss(unit):
        scaled = batch._replace(features=unit * batch.features, targets=unit * batch.targets)
        return objective(scaled, torch.Generator().manual_seed(7))["loss"]

    torch.testing.assert_close(loss(factor), loss(100.0))


def test_magnitudes_along_one_direction_have_no_sign(backbone):
    config = _config(projection_dim=1, magnitude_weight=1.0)
    objective = _objective(upfeat.load_upsampler("nearest"), config)
    batch = make_batch(
        backbone, torch.randn(1, 3, 32, 32), config, torch.Generator().manual_seed(0)
    )
    constant = batch.features.mean((2, 3), keepdim=True)
    batch = batch._replace(
        features=constant.expand_as(batch.features), targets=constant.expand_as(batch.targets)
    )
    for seed in range(4):  # directions on both sides
        terms = objective(batch, torch.Generator().manual_seed(seed))
        assert terms["magnitude"] < 1e-8
