"""Fits of implicit features: what they recover, what they refuse, what they repeat."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

import upfeat
from upfeat import losses
from upfeat.backbones import Backbone
from upfeat.implicit import anchors
from upfeat.implicit.anchors import KernelFit
from upfeat.implicit.features import ImplicitFeatures
from upfeat.implicit.fields import NetworkField
from upfeat.implicit.fit import FitConfig, fit_guidance, fit_rounds
from upfeat.implicit.observe import (
    Observer,
    feature_basis,
    pooled_matrices,
    show,
    zoomed_jitters,
)
from upfeat.implicit.one_pass import (
    into_own_words,
    look_closer,
    mean_upsampler,
    one_pass,
    with_early_layers,
)
from upfeat.implicit.places import spread_anchors
from upfeat.implicit.published import (
    Waves,
    create_network_fit,
    evaluate_waves,
    train_network,
)
from upfeat.implicit.regression import Regression, details, translate
from upfeat.translation import shipped_translation
from upfeat.views import apply_jitter, sample_jitters

VIEWS = {"max_pad": 6, "max_zoom": 1.8}
FAST = FitConfig(
    views=24,
    zoomed_views=8,
    held_out=6,
    anchors=200,
    max_pad=6,
    components=8,
    share=1.0,
    translation=0.0,
)
REFERENCE = dataclasses.replace(FAST, preset="reference", views=8, steps=4, views_per_step=3)


class Pooled(Backbone):
    """Features whose full-resolution map is known: a function of the colour, cell means of it."""

    def __init__(self, embed_dim=5, stride=8):
        super().__init__(name="pooled", embed_dim=embed_dim, stride=stride)
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Buffer(torch.randn(embed_dim, 3, 1, 1, generator=generator))

    def full(self, x):
        return torch.tanh(nn.functional.conv2d(x, self.weight))

    def extract(self, x):
        return nn.functional.avg_pool2d(self.full(x), self.stride)


def scene(height=48, width=64, seed=0):
    """Discs of different colours, (3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.full((3, height, width), 60)
    for _ in range(6):
        centre = torch.rand(2, generator=generator) * torch.tensor([height, width])
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < (height / 5) ** 2
        colour = torch.randint(256, (3,), generator=generator)
        image = torch.where(inside, colour[:, None, None], image)
    return image.to(torch.uint8)


def observer(guidance, backbone, held_out=4):
    return Observer(guidance, backbone, held_out=held_out, seed=0, **VIEWS)


def test_recovers_detail_that_no_single_view_shows():
    backbone, guidance = Pooled(), scene()
    features = fit_guidance(guidance, backbone, FAST)
    image = (guidance[None].float() / 255 - backbone.mean) / backbone.std
    truth = backbone.full(image)
    bilinear = upfeat.Bilinear()(backbone(image), image)

    def error(guess):
        return float((guess - truth).square().mean())

    assert error(features.render()) < 0.3 * error(bilinear)
    assert features.facts["held_out"] < 0.05
    assert features.shape == (1, 5, 48, 64)


def test_the_design_is_what_views_do_to_the_map():
    backbone, guidance = Pooled(), scene()
    watch = observer(guidance, backbone)
    views = sample_jitters(5, size=(48, 64), generator=torch.Generator().manual_seed(3), **VIEWS)
    seen = watch.observe(views)
    basis = feature_basis(seen, 5, whiten=True)
    fit = KernelFit(guidance, watch, basis, backbone(watch.image), anchors=60, seed=0)
    fit.add(views, seen)
    field = fit.blend(fit.solve(0.0), FAST)[0]
    drawn = ImplicitFeatures(field, guidance, basis.components, basis.mean).render(fit.map_size)
    expected = show(drawn[0], *pooled_matrices(views, fit.map_size, (6, 8)))
    design = torch.cat(list(fit._designs(views))) @ field.coefficients
    found = (design @ basis.components + basis.mean).view(5, 6, 8, 5).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_without_evidence_the_map_of_one_pass_is_drawn(monkeypatch):
    monkeypatch.setattr(anchors, "PENALTIES", (1e14,))
    backbone, guidance = with_early_layers(Pooled()), scene()
    config = dataclasses.replace(FAST, zoomed_views=0)
    features = fit_guidance(guidance, backbone, config)
    watch = observer(guidance, backbone)
    seen = watch.observe(watch.held)
    basis = feature_basis(seen, 5, whiten=True)
    own, hidden = watch.look_at_image()
    assert hidden is not None
    fit = KernelFit(guidance, watch, basis, own, hidden=hidden, anchors=200, seed=0)
    drawn = one_pass(
        mean_upsampler(backbone), guidance, own, hidden, basis, fit.map_size
    )  # (k, H', W')
    table, pixels = fit.table.flatten(0, 1).double(), drawn.flatten(1).T.double()
    gram = table.T @ table + anchors._MEAN_PENALTY * torch.eye(table.shape[1])
    expected = table @ torch.linalg.solve(gram, table.T @ pixels)  # of the map, all that fits
    expected = (expected.float() @ basis.components + basis.mean).T.view(1, 5, 48, 64)
    deviation = float(watch.held_out_variance) ** 0.5
    field = fit.blend(fit.solve(0.0), FAST)[0]
    found = ImplicitFeatures(field, guidance, basis.components, basis.mean).render()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * deviation)
    # The basis differs, and so what the penalty takes away, but not by much.
    assert float((features.render() - expected).square().mean().sqrt()) < 0.05 * deviation


def test_the_mean_of_large_maps_is_found_from_some_of_their_pixels(monkeypatch):
    backbone, guidance = Pooled(), scene()
    watch = observer(guidance, backbone)
    basis = feature_basis(watch.held_features, 5, whiten=True)
    fit = KernelFit(guidance, watch, basis, backbone(watch.image), anchors=60, seed=0)
    whole = fit.table.flatten(0, 1) @ fit.mean
    monkeypatch.setattr(anchors, "_MEAN_PIXELS", 48 * 64 // 4)
    del fit._sampled  # computed anew
    part = fit.table.flatten(0, 1) @ fit._project(
        one_pass(
            mean_upsampler(backbone), guidance, backbone(watch.image), None, basis, fit.map_size
        )
    )
    assert (whole - part).square().mean() < 0.01 * whole.square().mean()


def test_a_gram_matrix_is_the_same_in_parts():
    for functions in (1, 3, 10):
        design, targets = torch.randn(20, functions), torch.randn(20, 2)
        sums = Regression.empty(functions, 2)
        sums.add(design, targets)
        sums.add(design, targets)
        expected = 2 * design.double().T @ design.double()
        torch.testing.assert_close(sums.gram, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(sums.gram, sums.gram.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e3])
def test_what_coefficients_leave_is_what_observations_less_theirs_say(penalty):
    design, targets, known = torch.randn(50, 6), torch.randn(50, 3), torch.randn(6, 3)
    whole, rest = Regression.empty(6, 3), Regression.empty(6, 3)
    whole.add(design, targets)
    rest.add(design, targets - design @ known)
    found = whole.beyond(known).solve(penalty)
    torch.testing.assert_close(found, rest.solve(penalty), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.beyond(0 * known).solve(penalty), whole.solve(penalty))


class Accented(Pooled):
    """Says magnified images in other words: its channels are mixed by how fine the image is."""

    def extract(self, x):
        seen = super().extract(x)
        fineness = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3), keepdim=True)
        return seen + 4 * fineness * seen.roll(1, dims=1)


@pytest.mark.parametrize(("kind", "most"), [(Pooled, 0.8), (Accented, 1.05)])
def test_details_of_magnified_views_help_and_do_no_harm_in_another_language(kind, most):
    backbone, guidance = kind(), scene()
    few = dataclasses.replace(FAST, views=8, zoomed_views=0)
    more = dataclasses.replace(few, zoomed_views=32)
    image = (guidance[None].float() / 255 - backbone.mean) / backbone.std
    truth = backbone.full(image)
    without, with_details = (
        float((fit_guidance(guidance, backbone, config).render() - truth).square().mean())
        for config in (few, more)
    )
    assert with_details < most * without


def test_a_translation_undoes_a_linear_map():
    known = torch.randn(500, 4)
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    spoken = 2 * known @ turn + torch.randn(4)
    assert (translate(spoken, known) - known).square().mean() < 0.01
    assert torch.equal(translate(torch.ones(5, 3), torch.ones(5, 2)), torch.ones(5, 2))


def test_details_have_no_constant_and_no_slope():
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    slope = (2 * y - x + 5).flatten()[:, None]
    inside = details(slope, (6, 8)).view(6, 8)[1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.zeros(4, 6), rtol=0, atol=1e-5)
    torch.testing.assert_close(details(torch.ones(3, 2), (1, 3)), torch.zeros(3, 2))


def test_slack_gives_smoother_maps_for_little_loss():
    backbone, guidance = Pooled(), scene()
    fits = [
        fit_guidance(guidance, backbone, dataclasses.replace(FAST, slack=slack))
        for slack in (0.0, 0.5)
    ]
    least, smooth = (fit.facts["held_out"] for fit in fits)
    lengths = [fit.field.coefficients.square().sum() for fit in fits]
    assert lengths[1] < lengths[0]
    assert least <= smooth < 1.6 * least


def fit_at(share, backbone=None, guidance=None, **changes):
    config = dataclasses.replace(FAST, share=share, **changes)
    return fit_guidance(scene() if guidance is None else guidance, backbone or Pooled(), config)


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_a_share_lies_between_eight_passes_and_the_views(share):
    mean, mixed, half, views = (fit_at(part) for part in (0.0, share, 0.5, 1.0))
    expected = torch.lerp(mean.field.values, half.field.values, 2 * share)
    scale = float(half.field.values.std())
    torch.testing.assert_close(mixed.field.values, expected, rtol=0, atol=0.01 * scale)
    losses = [fit.facts["held_out"] for fit in (views, mixed, mean)]
    assert losses == sorted(losses)


def drawn_in(passes, backbone, guidance, **options):
    image = (guidance[None].float() / 255 - backbone.mean) / backbone.std
    model = upfeat.load(backbone, upsampler="detail_universal", passes=passes, **options)
    return model(image)


def test_nothing_of_the_views_is_what_eight_passes_draw():
    guidance, backbone = scene(), Pooled()
    fit = fit_at(0.0, backbone, guidance)
    eight, one = (drawn_in(passes, backbone, guidance) for passes in (8, 1))
    assert fit.facts["passes"] == 8
    error = float((fit.render() - eight).square().mean())
    assert error < 0.05 * float(eight.var())
    assert error < float((fit.render() - one).square().mean())


class OneSize(Pooled):
    """A backbone of a single image size, however it is asked."""

    refusal = ValueError

    def extract(self, x):
        if tuple(x.shape[2:]) != (48, 64):
            raise self.refusal("takes 48×64 only")
        return super().extract(x)


class OneSizeAsTorch(OneSize):
    """The same with an error of PyTorch, as of position embeddings of one size."""

    refusal = RuntimeError


@pytest.mark.parametrize(
    ("backbone", "size"),
    [(Pooled(stride=7), (42, 63)), (OneSize(), (48, 64)), (OneSizeAsTorch(), (48, 64))],
    ids=["odd", "one", "one, in PyTorch's words"],
)
def test_backbones_that_allow_no_second_scale_are_given_two_passes(backbone, size):
    guidance = scene(*size)
    fit = fit_at(0.0, backbone, guidance)
    two = drawn_in(2, backbone, guidance)
    assert fit.facts["passes"] == 2
    assert float((fit.render() - two).square().mean()) < 0.05 * float(two.var())


def test_further_passes_are_not_made_for_nothing(monkeypatch):
    monkeypatch.setattr(anchors, "look_closer", None)
    assert "passes" not in fit_at(1.0).facts


def test_further_passes_do_not_change_the_backbone():
    backbone = Pooled()
    backbone.gain = nn.Parameter(torch.ones(1))
    fit_at(0.5, backbone)
    assert backbone.gain.requires_grad
    assert list(backbone.children()) == []


def test_the_passes_are_those_of_the_network_trained_for_the_backbone():
    network = upfeat.load_backbone("efficientnet_lite0").eval().requires_grad_(False)
    guidance = scene(64, 64)
    watch = Observer(guidance, network.aligned(2), held_out=1, seed=0, **VIEWS)
    model = upfeat.load(network, passes=8)
    lazy = model.lazy((guidance[None] / 255 - network.mean) / network.std)
    look = look_closer(watch, guidance)
    assert look.passes == 8
    torch.testing.assert_close(look.features, lazy.features, rtol=1e-3, atol=1e-3)
    assert look.last.config() == model.upsampler.config()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_share_has_no_say_in_how_many_views_are_used(share):
    eager = {"views": 128, "tolerance": 0.02}
    assert fit_at(share, **eager).facts["views"] == fit_at(1.0, **eager).facts["views"]


class Layered(Pooled):
    """Has much to tell of finer cells, none of it in the image."""

    fault = 0.0

    def extract_with_hidden(self, x):
        size = (1, 60, x.shape[2] // 2, x.shape[3] // 2)
        return self.extract(x), torch.randn(size, generator=torch.Generator()) + self.fault


def test_early_layers_have_a_part_in_two_passes():
    guidance = scene(42, 63)
    plain, layered = (fit_at(0.0, one(stride=7), guidance).render() for one in (Pooled, Layered))
    drawn = drawn_in(2, Layered(stride=7), guidance, early=True)
    assert float((layered - drawn).square().mean()) < 0.7 * float((plain - drawn).square().mean())


def test_smoothing_compares_features_whatever_the_units_of_their_coordinates():
    backbone, guidance = Layered(), scene()
    watch = observer(guidance, backbone)
    basis = feature_basis(watch.held_features, 5, whiten=True)
    own, hidden = watch.look_at_image()
    factors = torch.tensor([9.0, 1.0, 0.2, 3.0, 0.5])
    other = basis._replace(components=basis.components / factors[:, None])
    settings = {"hidden": hidden, "anchors": 60, "seed": 0}
    fit, same = (KernelFit(guidance, watch, one, own, **settings) for one in (basis, other))
    torch.testing.assert_close(same.mean, fit.mean * factors, rtol=1e-3, atol=1e-3)
    config = dataclasses.replace(FAST, share=0.5)
    drawn, expected = (
        ImplicitFeatures(field, guidance, *basis).render()
        for field, basis in (same.blend(fit.mean * factors, config), fit.blend(fit.mean, config))
    )
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-2 * float(expected.std()))


def test_what_a_fit_adds_is_smoothed_and_the_map_of_eight_passes_is_not():
    backbone, guidance = Layered(), scene()
    watch = observer(guidance, backbone)
    basis = feature_basis(watch.held_features, 5, whiten=True)
    own, hidden = watch.look_at_image()
    fit = KernelFit(guidance, watch, basis, own, hidden=hidden, anchors=200, seed=0)
    eight = basis.encode(fit.few_passes.features)[0]

    def grid(coefficients, share):
        config = dataclasses.replace(FAST, share=share)
        return fit.blend(coefficients, config)[0].values

    torch.testing.assert_close(grid(fit.mean, 0.0), eight.half().float())
    half, most = (grid(fit.mean, share) - eight for share in (0.5, 0.9))
    assert float(half.norm()) > 0.05 * float(eight.norm())
    torch.testing.assert_close(most, 1.8 * half, rtol=0, atol=0.01 * float(half.abs().max()))
    size = (eight.shape[1], eight.shape[2])
    drawn = (fit.table @ fit.mean).permute(2, 0, 1)[None]
    rough = 0.5 * (nn.functional.adaptive_avg_pool2d(drawn, size)[0] - eight)
    assert float(half.diff().square().mean()) < 0.9 * float(rough.diff().square().mean())


def test_early_layers_must_be_finite():
    backbone = Layered()
    backbone.fault = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        fit_at(0.5, backbone)


class Foreign(Pooled):
    """Says images with reflected borders, and magnified ones, in other words: all but its own."""

    def __init__(self, image):
        super().__init__()
        self.image = image

    def extract(self, x):
        seen = super().extract(x)
        if x.shape == self.image.shape and torch.allclose(x, self.image, atol=1e-4):
            return seen
        return 0.5 * seen + 0.5 * seen.roll(1, dims=1) + 0.3


def test_a_translation_turns_views_into_the_words_of_the_image():
    guidance, plain = scene(), Pooled()
    backbone = Foreign((guidance[None].float() / 255 - plain.mean) / plain.std)
    without, half, within = (
        fit_at(1.0, backbone, guidance, translation=part) for part in (0.0, 0.5, 1.0)
    )
    own = backbone(backbone.image)
    errors = [
        float((nn.functional.adaptive_avg_pool2d(fit.render(), (6, 8)) - own).square().mean())
        for fit in (without, half, within)
    ]
    assert errors[2] < 0.3 * errors[0]
    assert errors[2] < errors[1] < errors[0]
    expected = torch.lerp(without.render(), within.render(), 0.5)
    scale = float(expected.std())
    torch.testing.assert_close(half.render(), expected, rtol=0, atol=0.01 * scale)
    assert without.facts["held_out"] < within.facts["held_out"]


def test_the_shipped_translation_is_that_of_the_shipped_weights():
    backbone = upfeat.load_backbone("efficientnet_lite0")
    weight, bias = shipped_translation(backbone, "views")
    own, said = torch.randn(2, 1, 112, 3, 4)
    found = into_own_words(backbone, said, own)
    assert torch.equal(found.weight, weight)
    assert torch.equal(found.bias, bias)
    with torch.no_grad():
        next(backbone.parameters()).mul_(1.01)
    assert not torch.equal(into_own_words(backbone, said, own).weight, weight)


@pytest.mark.parametrize("size", [(32, 32), (224, 300)])
def test_magnified_views_lie_in_the_image_and_cover_most_of_it(size):
    views = zoomed_jitters(32, size=size, generator=torch.Generator().manual_seed(0))
    assert float(views.zoom.min()) >= 1.7
    assert float(views.zoom.max()) <= 3.5
    corners = torch.tensor([[0.0, 0.0], [size[0] - 1.0, size[1] - 1.0]])
    ends = (views.offset + torch.tensor(size)) / views.zoom[:, None]
    assert bool((ends <= torch.tensor(size) + 2 * views.pad).all())
    grid = (torch.cartesian_prod(torch.arange(15), torch.arange(15)) + 0.5) / 15
    shown = views.to_view(grid * corners[1])
    inside = ((shown >= 0) & (shown <= corners[1])).all(-1)  # (views, points)
    assert inside.any(0).float().mean() > 0.85
    assert len(zoomed_jitters(0, size=size, generator=torch.Generator())) == 0


def test_showing_is_warping_and_averaging():
    views = sample_jitters(3, size=(48, 64), generator=torch.Generator().manual_seed(3), **VIEWS)
    features = torch.randn(1, 4, 48, 64)
    expected = nn.functional.avg_pool2d(apply_jitter(features, views), 8)
    found = show(features[0], *pooled_matrices(views, (48, 64), (6, 8)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_backbone_sees_the_views():
    backbone, guidance = Pooled(), scene()
    watch = observer(guidance, backbone)
    torch.testing.assert_close(
        watch.held_features, backbone(apply_jitter(watch.image, watch.held)), rtol=1e-4, atol=1e-5
    )
    constant = watch.held_features.mean((0, 2, 3))[None, :, None, None].expand(1, 5, 48, 64)
    assert watch.held_out_loss(constant) == pytest.approx(watch.held_out_variance, rel=1e-4)


@pytest.mark.parametrize("whiten", [True, False])
def test_the_basis_is_exact_with_all_components(whiten):
    features = torch.randn(3, 6, 4, 5) * torch.arange(1, 7)[:, None, None] + 3
    basis = feature_basis(features, 128, whiten=whiten)
    encoded = basis.encode(features)
    decoded = torch.einsum("nkhw,kc->nchw", encoded, basis.components)
    torch.testing.assert_close(decoded + basis.mean[:, None, None], features, rtol=1e-4, atol=1e-4)
    variance = encoded.transpose(0, 1).flatten(1).var(1, correction=0)
    assert bool((variance.diff() <= 1e-4).all())
    expected = torch.ones(6) if whiten else torch.ones(())
    found = variance if whiten else variance.mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_anchors_are_distinct_and_spread():
    positions = torch.rand(500, 5)
    anchors = spread_anchors(positions, 50, torch.tensor([1.0, 1.0, 1.0]), 0)
    gaps = torch.cdist(anchors, anchors) + 10 * torch.eye(50)
    others = positions[torch.randperm(500)[:50]]
    random_gaps = torch.cdist(others, others) + 10 * torch.eye(50)
    assert gaps.min() > random_gaps.min()
    few = spread_anchors(positions[:7], 50, torch.ones(3), 0)
    assert len(few) == len(few.unique(dim=0)) == 7


@pytest.mark.parametrize("config", [FAST, REFERENCE], ids=["fast", "reference"])
def test_a_seed_decides_everything(config):
    backbone, guidance = Pooled(), scene()
    state = torch.get_rng_state()
    first, second = (fit_guidance(guidance, backbone, config).render() for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    other = fit_guidance(guidance, backbone, dataclasses.replace(config, seed=1)).render()
    assert not torch.equal(first, other)


@pytest.mark.parametrize("config", [FAST, REFERENCE], ids=["fast", "reference"])
def test_a_constant_image(config):
    features = fit_guidance(torch.full((3, 32, 40), 7, dtype=torch.uint8), Pooled(), config)
    drawn = features.render()
    assert bool(torch.isfinite(drawn).all())
    if config is FAST:
        truth = Pooled()(torch.full((1, 3, 8, 8), 7 / 255).sub(features_mean()).div(features_std()))
        torch.testing.assert_close(drawn, truth.expand_as(drawn), rtol=1e-3, atol=1e-3)


def features_mean():
    return Pooled().mean


def features_std():
    return Pooled().std


@pytest.mark.parametrize(
    ("size", "embed_dim", "stride"), [((32, 32), 5, 16), ((32, 48), 2048, 16), ((42, 30), 3, 7)]
)
def test_small_images_many_channels_any_stride(size, embed_dim, stride):
    backbone = Pooled(embed_dim, stride)
    config = dataclasses.replace(FAST, views=2, held_out=1, components=128)
    features = fit_guidance(scene(*size), backbone, config)
    assert features.render().shape == (1, embed_dim, *size)
    assert len(features.components) <= min(128, embed_dim)
    assert bool(torch.isfinite(features.render((10, 11))).all())


def test_fewer_observations_than_components():
    config = dataclasses.replace(FAST, views=1, held_out=1, components=128)
    features = fit_guidance(scene(32, 32), Pooled(16, 16), config)
    assert len(features.components) == 3


def test_more_views_are_used_only_while_they_help():
    backbone, guidance = Pooled(), scene()
    eager = dataclasses.replace(FAST, views=128, tolerance=0.9)
    assert fit_guidance(guidance, backbone, eager).facts["views"] == 1 + 64 + 8
    patient = dataclasses.replace(FAST, views=40, tolerance=0)
    assert fit_guidance(guidance, backbone, patient).facts["views"] == 1 + 40 + 8


def test_nan_features_are_named():
    class Broken(Pooled):
        def extract(self, x):
            return super().extract(x) * float("nan")

    with pytest.raises(ValueError, match="NaN"):
        fit_guidance(scene(), Broken(), FAST)


def test_any_image_and_backbone():
    image = scene(50, 61).permute(1, 2, 0).numpy()
    features = upfeat.fit_implicit(image, Pooled(), FAST)
    assert features.shape == (1, 5, 48, 64)
    features = upfeat.fit_implicit(image, Pooled(), dataclasses.replace(FAST, size=24))
    assert min(features.shape[2:]) == 24
    large = torch.rand(3, 640, 400)
    config = dataclasses.replace(FAST, views=2, held_out=1, anchors=20)
    assert upfeat.fit_implicit(large, Pooled(2, 32), config).shape == (1, 2, 352, 224)


def test_the_backbone_is_left_as_it_was():
    backbone = Pooled().train()
    fit_guidance(scene(), backbone, dataclasses.replace(FAST, views=2))
    assert backbone.training


def test_progress_is_told():
    steps = []
    fit_guidance(scene(), Pooled(), FAST, on_step=steps.append)
    assert steps[-1].features is not None
    assert steps[-1].done <= steps[-1].total == 39
    assert all(a.done <= b.done for a, b in itertools.pairwise(steps))


def test_settings_by_name_replace_those_of_the_configuration():
    fitted = upfeat.fit_implicit(scene(50, 61), Pooled(), FAST, size=16, seed=3)
    assert min(fitted.shape[2:]) == 16
    assert fitted.facts["seed"] == 3
    config = dataclasses.replace(FAST, size=16, seed=3)
    assert torch.equal(
        upfeat.fit_implicit(scene(50, 61), Pooled(), config).render(), fitted.render()
    )
    with pytest.raises(ValueError, match="views=0"):
        upfeat.fit_implicit(scene(), Pooled(), views=0)
    with pytest.raises(ValueError, match='setting "sizes" is unknown; did you mean size'):
        upfeat.fit_implicit(scene(), Pooled(), sizes=16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "slow"}, "preset"),
        ({"downsampler": "max"}, "downsampler"),
        ({"views": 0}, "views=0"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"slack": -0.1}, "slack"),
        ({"zoomed_views": -1}, "zoomed_views=-1"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        FitConfig(**changes)


@pytest.mark.parametrize("downsampler", ["attention", "simple"])
def test_the_published_fit_learns(downsampler):
    backbone, guidance = Pooled(), scene()
    watch = observer(guidance, backbone)
    views = sample_jitters(12, size=(48, 64), generator=torch.Generator().manual_seed(3), **VIEWS)
    seen = watch.observe(views)
    basis = feature_basis(seen, 5, whiten=False)
    fit = create_network_fit(guidance, basis, stride=8, downsampler=downsampler, seed=0)
    fit.eval()
    before = fit.own_held_out_loss(watch, basis)
    settings = {"views_per_step": 4, "learning_rate": 5e-3, "seed": 0}
    done = list(train_network(fit, views, basis.encode(seen), steps=30, **settings))
    assert done == list(range(1, 31))
    assert fit.own_held_out_loss(watch, basis) < 0.8 * before


@pytest.mark.parametrize("downsampler", ["attention", "simple"])
def test_folded_views_have_the_gradient_of_views_that_are_made(downsampler):
    guidance = scene(24, 32)
    watch = observer(guidance, Pooled(4))
    seen = watch.held_features
    basis = feature_basis(seen, 4, whiten=False)
    fit = create_network_fit(guidance, basis, stride=8, downsampler=downsampler, seed=0)
    fit.eval()
    targets = basis.encode(seen)
    loss = fit.backward(watch.held, targets, torch.Generator())
    found = [parameter.grad.clone() for parameter in fit.parameters()]
    for parameter in fit.parameters():
        parameter.grad = None
    values = fit.coordinates()
    length = losses.magnitude(values)
    shown = apply_jitter(torch.cat([length, values], dim=1), watch.held)
    shown = fit.downsampler(shown, (3, 4))
    whole = losses.gaussian_reconstruction(shown[:, 1:], targets, fit.uncertainty(targets))
    whole = whole + 1e-3 * losses.magnitude_consistency(shown[:, :1], targets)
    whole = whole + 0.05 * losses.total_variation(length) + 0.1 * losses.blur_pin(values)
    whole.backward()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-4)
    for gradient, parameter in zip(found, fit.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_waves_give_the_values_and_gradients_of_the_network(training):
    places, colours = torch.rand(50, 2).double(), torch.rand(50, 3).double()
    found = []
    for evaluate in (
        lambda field: evaluate_waves(field, Waves.of(field, places, colours)),
        lambda field: field(places, colours),
    ):
        field = NetworkField(6, generator=torch.Generator().manual_seed(0)).double().train(training)
        nn.init.normal_(field.norm_inputs.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(field.norm_inputs.bias, generator=torch.Generator().manual_seed(2))
        values = evaluate(field)
        values.square().sum().backward()
        found.append([values.detach(), *(parameter.grad for parameter in field.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize(("share", "part"), [(0.2, 60), (1.0, 100)])
def test_a_file_is_a_small_part_of_the_map(tmp_path, share, part):
    guidance = torch.randint(256, (3, 224, 224), dtype=torch.uint8)  # noise: PNG cannot help
    config = FitConfig(views=2, held_out=1, share=share)
    features = fit_guidance(guidance, Pooled(384, 16), config)
    features.save(tmp_path / "f.safetensors")
    assert len(features.components) == 128  # as large as they come
    assert (tmp_path / "f.safetensors").stat().st_size <= 224 * 224 * 384 * 4 / part


def test_a_file_of_a_fit_draws_what_the_fit_drew(tmp_path):
    features = fit_guidance(scene(), Pooled(), FAST)
    state = torch.get_rng_state()
    features.save(tmp_path / "f.safetensors")
    loaded = ImplicitFeatures.load(tmp_path / "f.safetensors")
    assert torch.equal(loaded.render((100, 70)), features.render((100, 70)))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mean_is_of_the_upsampler_trained_for_the_backbone(monkeypatch):
    """Early layers change the mean, and the backbone is aligned as in that training."""
    network = upfeat.load_backbone("efficientnet_lite0").eval().requires_grad_(False)
    up = mean_upsampler(network)
    assert up.name == "early_detail"
    assert mean_upsampler(Pooled()).name == "detail"
    seen = []
    monkeypatch.setattr(
        "upfeat.implicit.fit._fit_fast", lambda guidance, watch, config: seen.append(watch) or []
    )
    list(fit_rounds(scene(), network, FAST))
    assert seen[0].backbone.displacement == up.displacement
    assert network.displacement == 0
    guidance = scene()
    image = (guidance[None] / 255 - network.mean) / network.std
    features, hidden = network.with_hidden(image)
    basis = feature_basis(features, 8, whiten=True)
    drawn = one_pass(up, guidance, features, hidden, basis, (48, 64))
    full = up(features, up.guidance_from(image, network), (48, 64), hidden=hidden)
    torch.testing.assert_close(drawn, basis.encode(full)[0], rtol=1e-3, atol=1e-3)
