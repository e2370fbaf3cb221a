"""Early layers beside the queries: linear, exact in windows, better where they know more."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import upfeat
from upfeat import run
from upfeat.activations import activation_bytes
from upfeat.heads import SavedHead, describe_backbone
from upfeat.mosaic import see_within
from upfeat.receptive_field import receptive_halo
from upfeat.scales import CORRECTION, SMOOTHINGS, SecondScale, smooth_on_fine_grid
from upfeat.translation import fit_to_image
from upfeat.upsamplers import create_upsampler
from upfeat.upsamplers.detail import DetailKernels
from upfeat.upsamplers.pretrained import trained_for_early
from upfeat.upsamplers.queries import CellMeans
from upfeat.upsamplers.regression import ImageRegression


class Pattern(upfeat.Backbone):
    """Brightness of 8×8 cells, whose earlier layer has that of 4×4 cells, and a constant."""

    def __init__(self, shape=None):
        super().__init__(name="pattern", embed_dim=2, stride=8)
        self.shape = shape

    def extract(self, x):
        return F.avg_pool2d(self._layer(x), 2)

    def extract_with_hidden(self, x):
        layer = self._layer(x)
        hidden = layer if self.shape is None else layer.new_ones(len(x), *self.shape)
        return F.avg_pool2d(layer, 2), hidden

    def _layer(self, x):
        level = F.avg_pool2d(x.square().mean(1, keepdim=True), 4)
        return torch.cat([level, level.square()], dim=1)


@pytest.fixture
def model():
    return upfeat.load(Pattern(), early=True)


def photo(height=64, width=80, seed=0, count=1):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_early_layers_tell_what_colours_cannot(model):
    """Noise whose mean brightness varies: its colours are alike everywhere, the layer is not."""
    x = photo(128, 128)
    finer = F.avg_pool2d(model.backbone._layer(x), 1)
    lost = {}
    for early in (False, True):
        kernels = upfeat.load(Pattern(), early=early).lazy(x).kernels
        assert isinstance(kernels, DetailKernels)
        made = kernels.to_finer_grid(model.backbone(x))
        lost[early] = float((made - finer).square().mean() / finer.var())
    assert lost[True] < 0.5 * lost[False]


def test_every_way_gives_the_same(model):
    x = photo(64, 72)
    full, lazy = model(x), model.lazy(x)
    assert not torch.allclose(full, upfeat.load(Pattern(), early=False)(x), atol=1e-3)
    torch.testing.assert_close(lazy.full(), full)
    torch.testing.assert_close(lazy.crop(5, 7, 30, 20), full[:, :, 5:35, 7:27])
    weight, bias = torch.randn(3, 2), torch.randn(3)
    expected = F.conv2d(full, weight[..., None, None], bias)
    torch.testing.assert_close(lazy.project(weight, bias), expected, rtol=1e-4, atol=1e-4)
    both = model(torch.cat([x, photo(64, 72, 1)]))
    torch.testing.assert_close(both[:1], full, rtol=1e-4, atol=1e-5)
    again = pickle.loads(pickle.dumps(lazy))
    torch.testing.assert_close(again.full(), full)


def test_linear_in_the_last_layers_features(model):
    lazy, up = model.lazy(photo()), model.upsampler
    a, b = torch.randn(1, 3, 8, 10), torch.randn(1, 3, 8, 10)
    sums = up.render(lazy.kernels, a + 2 * b)
    parts = up.render(lazy.kernels, a) + 2 * up.render(lazy.kernels, b)
    torch.testing.assert_close(sums, parts, rtol=1e-4, atol=1e-4)
    constant = torch.full((1, 1, 8, 10), 3.0)
    torch.testing.assert_close(
        up.render(lazy.kernels, constant), torch.full((1, 1, 64, 80), 3.0), rtol=1e-4, atol=1e-4
    )


def test_masks_hide_early_layers_too(model):
    x, mask = photo(64, 64), torch.zeros(64, 64, dtype=torch.bool)
    mask[16:48, 16:48] = True
    other = torch.where(mask, x + 100, x)
    torch.testing.assert_close(model(x, mask=mask), model(other, mask=mask))


def test_windows_of_a_large_image_are_those_of_the_whole(monkeypatch):
    """Regressions of several windows, each computed where it is asked for."""
    up = create_upsampler("detail_universal")
    image, features, hidden = photo(320, 320), torch.randn(1, 2, 80, 40), torch.randn(1, 3, 160, 80)
    whole = up.render(up.prepare_with(image, (80, 40), (320, 320), hidden=hidden), features)
    monkeypatch.setattr("upfeat.upsamplers.maps.WHOLE", 1)
    kernels = up.prepare_with(image, (80, 40), (320, 320), hidden=hidden)
    window = upfeat.types.Window(150, 100, 40, 50)
    part = up.render(*up.precompute(kernels, features), window=window)
    torch.testing.assert_close(part, whole[:, :, 150:190, 100:150], rtol=1e-3, atol=1e-4)


def test_a_bound_of_memory_does_not_lose_them(tmp_path):
    """The backbone works in tiles, and run writes what the model gives."""
    model, x = upfeat.load(Pattern(), early=True), photo(8 * 45, 8 * 40)
    halo = receptive_halo(model.backbone)
    assert halo == 0
    memory = activation_bytes(model.backbone) * (8 * 17) ** 2
    whole = model.backbone.with_hidden(x)
    parts = see_within(model.backbone, x, memory, early=True)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5 * float(expected.max()))
    path = tmp_path / "photo.png"
    pixels = (40 * photo(64, 72)[0].permute(1, 2, 0) + 99).clamp(0, 255).byte().numpy()
    Image.fromarray(pixels).save(path)
    outputs = run.Outputs(tmp_path / "photo.safetensors", None)
    run.run_photo(model, path, outputs, dtype=torch.float32)
    stored = load_file(outputs.features)["features"]
    expected = model(model.preprocess(path))[0]
    torch.testing.assert_close(stored, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_units_of_early_layers_do_not_matter():
    up, image = create_upsampler("detail_universal"), photo()
    features, hidden = torch.randn(1, 2, 8, 10), torch.randn(1, 3, 16, 20)
    up.smoothing = 0  # an offset does not matter to the regression alone
    expected = up(features, image, hidden=hidden)
    torch.testing.assert_close(
        up(features, image, hidden=50 * hidden + 7), expected, rtol=1e-3, atol=1e-3
    )
    up.smoothing = 8
    expected = up(features, image, hidden=hidden)
    for factor in (2.0**-50, 2.0**50):
        found = up(features, image, hidden=factor * hidden)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    flat = up(features, image, hidden=torch.ones(1, 3, 16, 20))
    assert bool(flat.isfinite().all())
    finer = F.interpolate(hidden, scale_factor=2.0)
    torch.testing.assert_close(up(features, image, hidden=finer), expected, rtol=1e-3, atol=1e-3)


def test_gradients_reach_early_layers():
    up, image = create_upsampler("detail_universal"), photo(32, 32)
    hidden = torch.randn(1, 3, 8, 8, requires_grad=True)
    up(torch.randn(1, 2, 4, 4), image, hidden=hidden).square().sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) > 0


def test_files_carry_them(model, tmp_path):
    lazy = model.lazy(photo())
    assert "early layers 1×2×16×20" in repr(lazy)
    for exact, tolerance in ((True, 1e-6), (False, 2e-2)):
        lazy.save(tmp_path / "lazy.safetensors", exact=exact)
        again = upfeat.UpsampledFeatures.load(tmp_path / "lazy.safetensors", model.upsampler)
        torch.testing.assert_close(again.full(), lazy.full(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_the_embedded_backbones_tell(stride):
    backbone = upfeat.load_backbone(f"efficientnet_lite0.stride{stride}")
    x = photo(64, 96)
    features, hidden = backbone.with_hidden(x)
    torch.testing.assert_close(features, backbone(x))
    assert hidden is not None
    assert hidden.shape[2:] == (2 * 64 // stride, 2 * 96 // stride)
    torch.testing.assert_close(backbone.hidden(x), hidden)
    assert "with early layers" in repr(upfeat.load(backbone, early=True))


def test_a_stage_before_the_last_is_found():
    stages = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(3, 5, 4, 4), torch.nn.GELU()),
        torch.nn.Sequential(torch.nn.Conv2d(5, 6, 3, 1, 1), torch.nn.GELU()),
        torch.nn.Sequential(torch.nn.Conv2d(6, 6, 3, 1, 1), torch.nn.Conv2d(6, 7, 2, 2)),
        torch.nn.Conv2d(7, 8, 1),
    )
    backbone = upfeat.load_backbone(stages)
    x = photo(64, 48)
    for _ in range(2):  # found, and known
        features, hidden = backbone.with_hidden(x)
        torch.testing.assert_close(features, backbone(x))
        torch.testing.assert_close(hidden, stages[:2](x))
    model = upfeat.load(stages, early=True)
    assert model(x).shape == (1, 8, 64, 48)
    assert not any(module._forward_hooks for module in stages.modules())


def test_stages_of_timm_are_found(torchvision_operators):
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    network = timm.create_model("resnet10t", pretrained=False)
    backbone = upfeat.load_backbone(network, layer=3)
    features, hidden = backbone.with_hidden(photo(64, 96))
    assert features.shape == (1, 256, 4, 6)
    assert hidden is not None
    assert hidden.shape == (1, 128, 8, 12)


def test_what_cannot_be_is_said_in_one_line():
    with pytest.raises(ValueError, match="no finer grid"):
        upfeat.load(Pattern((2, 4, 4)), early=True)
    with pytest.raises(ValueError, match=r"hidden must be \(1, channels"):
        create_upsampler("detail_universal")(
            torch.ones(1, 2, 4, 4), photo(32, 32), hidden=photo(count=2)
        )
    with pytest.raises(ValueError, match="bilinear makes no use of early layers"):
        upfeat.load(Pattern(), upsampler="bilinear", early=True)
    with pytest.raises(ValueError, match="bilinear makes no use of hidden"):
        upfeat.Bilinear()(torch.ones(1, 2, 4, 4), photo(32, 32), hidden=photo(8, 8))


def test_regressions_without_them_are_as_they_were():
    up, image = create_upsampler("detail_universal"), photo()
    kernels = up.prepare(image, (8, 10), (64, 80))
    assert isinstance(kernels, DetailKernels)
    assert isinstance(kernels.regression, ImageRegression)
    assert kernels.regression.behind == 0
    assert isinstance(kernels.regression.lacking.finer, CellMeans)


def taught(network_of=3, **options):
    """A network of early layers whose weights are not 0."""
    torch.manual_seed(0)
    up = upfeat.EarlyDetailUpsampler(
        2, hidden_dim=network_of, query_dim=8, levels=2, width=4, depth=1, **options
    )
    with torch.no_grad():
        for parameter in (up.detail.weight, up.early_network[2].last.weight):
            parameter.normal_(std=0.3)
    return up.eval().requires_grad_(False)


def test_a_network_of_early_layers_is_shown_them_unasked():
    model, x = upfeat.load(Pattern(), upsampler=taught(2)), photo(64, 72)
    assert model.early
    full, lazy = model(x), model.lazy(x)
    without = model.upsampler(model.backbone(x), x)
    assert float((full - without).abs().mean()) > 1e-3
    torch.testing.assert_close(lazy.crop(5, 7, 30, 20), full[:, :, 5:35, 7:27])
    weight, bias = torch.randn(3, 2), torch.randn(3)
    expected = F.conv2d(full, weight[..., None, None], bias)
    torch.testing.assert_close(lazy.project(weight, bias), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(lazy)).full(), full)


def test_without_early_layers_it_is_the_detail_upsampler():
    up, image, features = taught(), photo(), torch.randn(1, 2, 8, 10)
    plain = upfeat.DetailUpsampler(query_dim=8, levels=2)
    plain.neighbourhood.load_state_dict(up.neighbourhood.state_dict())
    torch.testing.assert_close(up(features, image), plain.eval()(features, image))


def test_the_network_is_not_left_out_silently(caplog):
    up, image, features = taught(), photo(), torch.randn(1, 2, 8, 10)
    up(features, image, hidden=torch.randn(1, 3, 16, 20))
    assert not caplog.records
    up(features, image)
    up(features, image)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "give hidden=backbone.with_hidden(x)[1]" in caplog.text


def test_files_of_the_former_default(tmp_path):
    """Heads are of the same features; lazy maps are of the upsampler that they were saved with."""
    model, before = upfeat.load(), upfeat.load(early=False)
    assert model.early
    made_by = describe_backbone(before.backbone)
    head = SavedHead(torch.randn(2, 112), torch.zeros(2), ["a", "b"], "classes", made_by, "detail")
    head.check_backbone(model.backbone, "head")
    before.lazy(photo(64, 64)).save(tmp_path / "lazy.safetensors")
    with pytest.raises(
        ValueError, match="made by a detail, and early_detail was given; give the one"
    ):
        upfeat.UpsampledFeatures.load(tmp_path / "lazy.safetensors", model.upsampler)
    upfeat.UpsampledFeatures.load(tmp_path / "lazy.safetensors", before.upsampler)


def test_a_network_sees_windows_as_it_sees_the_whole(monkeypatch):
    up, image = taught(), photo(320, 320)
    features, hidden = torch.randn(1, 2, 80, 40), torch.randn(1, 3, 160, 80)
    whole = up(features, image, hidden=hidden)
    monkeypatch.setattr("upfeat.upsamplers.maps.WHOLE", 1)
    kernels = up.prepare_with(image, (80, 40), (320, 320), hidden=hidden)
    for window in ((150, 100, 40, 50), (0, 0, 20, 30), (300, 290, 20, 30)):
        part = up.render(kernels, features, window=upfeat.types.Window(*window))
        top, left, height, width = window
        expected = whole[:, :, top : top + height, left : left + width]
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-4)


def test_early_layers_of_another_backbone_are_refused():
    with pytest.raises(ValueError, match="hidden has 5 channels but this EarlyDetailUpsampler"):
        taught()(torch.randn(1, 2, 8, 10), photo(), hidden=torch.randn(1, 5, 16, 20))


def test_weights_for_another_backbone_are_refused():
    with pytest.raises(ValueError, match="was trained on early layers of efficientnet_lite1, not"):
        upfeat.load("efficientnet_lite0", upsampler="early_detail_efficientnet_lite1")
    with pytest.raises(ValueError, match="early_detail has no weights for pattern"):
        upfeat.load(Pattern(), upsampler="early_detail")


@pytest.mark.parametrize("passes", [1, 2, 5, 8])
def test_weights_for_another_backbone_are_refused_however_they_are_given(tmp_path, passes):
    # Lite1 has as many channels, early layers included, so that nothing else would tell.
    upsampler = upfeat.load("efficientnet_lite0").upsampler
    upsampler.save_pretrained(tmp_path / "own")
    for given in (upsampler, tmp_path / "own"):
        with pytest.raises(ValueError, match="trained on early layers of efficientnet_lite0, not"):
            upfeat.load("efficientnet_lite1", upsampler=given, passes=passes)
        upfeat.load("efficientnet_lite0", upsampler=given, passes=passes)
    upsampler.trained_for = None
    upfeat.load("efficientnet_lite1", upsampler=upsampler, passes=passes)
    upfeat.load("efficientnet_lite0", early=False).upsampler.save_pretrained(tmp_path / "detail")
    assert "trained_for" not in (tmp_path / "detail" / "config.json").read_text()


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "efficientnet_lite1"])
def test_taught_weights_are_what_early_takes(backbone):
    assert trained_for_early(backbone) == f"early_detail_{backbone}"
    up = create_upsampler(f"early_detail_{backbone}", 112, backbone=backbone)
    assert up.hidden_dim == 40
    assert trained_for_early("pattern") is None


def test_five_passes_take_the_network_too():
    """What one pass tells of the finer grid is the smaller part of them."""
    scales = upfeat.load(Pattern(), upsampler=taught(2), passes=5).backbone
    scales.share = 0.0
    x = photo(64, 72)
    kernels = scales.first.prepare_with(x, (8, 9), (64, 72), hidden=scales.own.with_hidden(x)[1])
    detail = scales.first.detail_on_finer_grid(kernels)
    told = kernels.to_finer_grid(scales.own(x)) + detail
    expected = scales.last(told, x, (32, 36))
    torch.testing.assert_close(scales(x), expected, rtol=1e-4, atol=1e-5)


def test_both_scales_are_smoothed():
    """The enlarged image on its own grid, the sum on that of one pass, the result on its own."""
    scales = upfeat.load(Pattern(), upsampler=taught(2, smoothing=2), passes=5).backbone
    rough = upfeat.load(Pattern(), upsampler=taught(2), passes=5).backbone
    x = photo(64, 72)
    hidden = scales.own.with_hidden(x)[1]
    kernels = scales.first.prepare_with(x, (8, 9), (64, 72), hidden=hidden)
    scales.share = rough.share = 0.0
    expected = kernels.to_finer_grid(scales.own(x)) + scales.first.detail_on_finer_grid(kernels)
    expected = kernels.smoothing.smooth_among_alike(expected, SMOOTHINGS)
    expected = scales.last(expected, x, (32, 36))
    queries = scales.last.prepare(x, (16, 18), (32, 36)).queries
    expected = smooth_on_fine_grid(expected, queries, 2, "auto")
    torch.testing.assert_close(scales(x), expected, rtol=1e-4, atol=1e-5)
    scales.share = rough.share = 1.0
    assert scales(x).var() < rough(x).var()
    constant = torch.full_like(x, 0.3)
    torch.testing.assert_close(scales(constant), rough(constant), rtol=1e-4, atol=1e-4)
    scales.first.smoothing = 0  # switches it off, as the documents say
    torch.testing.assert_close(scales(x), rough(x))


def test_the_network_sees_the_enlarged_image_too():
    """With the whole weight on the second scale, its detail is what the network adds to it."""
    scales = upfeat.load(Pattern(), upsampler=taught(2), passes=5).backbone
    scales.share = 1.0
    assert scales.stride == 2
    x = photo(64, 72)
    larger = F.interpolate(x, size=(13 * 8, 15 * 8), mode="bicubic")
    features, hidden = scales.backbone.with_hidden(larger)
    kernels = scales.first.prepare_with(larger, (13, 15), (104, 120), hidden=hidden)
    finer = kernels.to_finer_grid(features) + scales.first.detail_on_finer_grid(kernels)
    own = scales.own(x)
    translation = fit_to_image(own, F.adaptive_avg_pool2d(features, (8, 9)))
    finer = F.interpolate(translation(finer), size=(32, 36), mode="bilinear")
    first = scales.first.prepare(x, (8, 9), (64, 72)).first(own - F.avg_pool2d(finer, 4))
    expected = finer + scales.last(CORRECTION * first, x, (32, 36))
    torch.testing.assert_close(scales(x), expected, rtol=1e-4, atol=1e-4)


def test_own_layers_are_read_at_both_sizes_without_a_network_too(monkeypatch):
    model, seen = upfeat.load(Pattern(), passes=5), []
    assert isinstance(model.backbone, SecondScale)
    assert (model.backbone.early, model.backbone.stride, model.early) == (True, 2, False)
    prepare = model.backbone.first.prepare_with

    def prepare_with(guidance, grid, size, hidden=None):
        seen.append((grid, hidden is not None))
        return prepare(guidance, grid, size, hidden=hidden)

    monkeypatch.setattr(model.backbone.first, "prepare_with", prepare_with)
    full = model(photo(64, 72))
    assert seen == [((8, 9), True), ((13, 15), True)]
    assert model.upsampler.name == "neighbourhood"
    torch.testing.assert_close(model.lazy(photo(64, 72)).crop(5, 7, 9, 8), full[:, :, 5:14, 7:15])


def test_a_network_without_early_layers_has_no_second_scale():
    plain = upfeat.load_backbone(torch.nn.Conv2d(3, 2, 8, 8))
    scales = SecondScale(plain, taught(2))
    with pytest.raises(ValueError, match="passes=5: early_detail needs early layers, and"):
        scales(photo(64, 72))
    with pytest.raises(TypeError, match="upsampler is of type Bilinear; give a DetailUpsampler"):
        SecondScale(plain, create_upsampler("bilinear"))
    odd = upfeat.load_backbone(torch.nn.Conv2d(3, 2, 6, 6))
    with pytest.raises(ValueError, match="passes=5 needs a backbone of a stride that 4 divides"):
        SecondScale(odd, taught(2))


def test_five_passes_run_the_backbone_three_times(monkeypatch):
    """On the image and its mirror image, early layers included, and on the enlarged one."""
    model, seen = upfeat.load(Pattern(), upsampler=taught(2), passes=5), []
    layer = Pattern._layer
    monkeypatch.setattr(Pattern, "_layer", lambda self, x: seen.append(x.shape) or layer(self, x))
    model(photo(64, 72))
    assert [tuple(shape[2:]) for shape in seen] == [(64, 72), (64, 72), (104, 120)]
