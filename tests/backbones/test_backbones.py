"""The embedded backbone's weights and levels, the wrapper, and names."""

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import upfeat

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"

# Rows of the ImageNet-1k classifier.
TABBY, TIGER_CAT, EGYPTIAN_CAT, ESPRESSO, CUP = 281, 282, 285, 967, 968


@pytest.mark.parametrize(
    ("photo", "classes"),
    [("cat.jpg", {TABBY, TIGER_CAT, EGYPTIAN_CAT}), ("coffee.jpg", {ESPRESSO, CUP})],
)
def test_classifier_names_the_photograph(photo, classes):
    """So weights, order of channels and normalisation are right."""
    backbone = upfeat.load_backbone("efficientnet_lite0")
    with torch.no_grad():
        logits = backbone.classify(backbone.preprocess(PHOTOS / photo, size=224))
    assert int(logits.argmax()) in classes


@pytest.mark.parametrize(
    ("name", "stride", "embed_dim"),
    [
        ("efficientnet_lite0", 16, 112),
        ("efficientnet_lite0.stride8", 8, 40),
        ("efficientnet_lite0.stride32", 32, 320),
        ("efficientnet_lite0.stride8+16+32", 8, 472),
    ],
)
def test_levels(name, stride, embed_dim):
    backbone = upfeat.load_backbone(name)
    assert (backbone.name, backbone.stride, backbone.embed_dim) == (name, stride, embed_dim)
    assert not backbone.training
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 96, 64))
    assert features.shape == (2, embed_dim, 96 // stride, 64 // stride)


def test_concatenation_holds_each_level():
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        both = upfeat.load_backbone("efficientnet_lite0.stride8+16")(x)
        fine = upfeat.load_backbone("efficientnet_lite0.stride8")(x)
        coarse = upfeat.load_backbone("efficientnet_lite0")(x)
    torch.testing.assert_close(both[:, :40], fine)
    pooled = nn.functional.avg_pool2d(both[:, 40:], 2)
    assert torch.nn.functional.cosine_similarity(pooled, coarse).mean() > 0.9


def test_folded_layers_give_what_the_layers_give():
    """Without gradients, convolution and normalisation are one; only rounding differs."""
    backbone = upfeat.load_backbone("efficientnet_lite0.stride8+16")
    x = torch.randn(2, 3, 72, 104, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        folded = backbone(x)
    layers = backbone(x.requires_grad_())
    assert layers.requires_grad
    layers = layers.detach()
    torch.testing.assert_close(folded, layers, rtol=0, atol=1e-4 * float(layers.max()))
    assert folded.is_contiguous()


@pytest.mark.parametrize("part", ["conv", "norm"])
def test_changed_weights_are_noticed(part):
    """Also those changed by way of ``.data``, of which a tensor keeps no record."""
    backbone = upfeat.load_backbone("efficientnet_lite0.stride8").requires_grad_(False)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = backbone(x)
    layer = backbone.groups[1][0].project
    parameter = layer[0].weight if part == "conv" else layer[1].bias
    parameter.data.mul_(0.5)
    after = backbone(x)
    assert not torch.allclose(before, after)
    assert torch.equal(after, copy.deepcopy(backbone)(x))


def test_backbones_are_copied_and_pickled_after_use():
    backbone = upfeat.load_backbone("efficientnet_lite0.stride8").requires_grad_(False)
    x = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    expected = backbone(x)
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_reaches_the_features(value):
    """Fused layers would turn it into an ordinary number."""
    backbone = upfeat.load_backbone("efficientnet_lite0.stride8").requires_grad_(False)
    x = torch.zeros(1, 3, 64, 64)
    expected = backbone(x)
    x[0, 0, 60, 60] = value
    touched = backbone(x).isnan().any(1)[0]
    assert touched[-1, -1]
    assert not touched[:2, :2].any()
    assert torch.allclose(backbone(torch.zeros(1, 3, 64, 64)), expected)


def test_operations_are_counted_and_cast_as_those_of_other_networks():
    backbone = upfeat.load_backbone("efficientnet_lite0.stride8").requires_grad_(False)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    backbone(x)
    with FlopCounterMode(display=False) as counter:
        backbone(x)
    assert counter.get_total_flops() > 1e7
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone.stem(x).dtype is torch.bfloat16
    half = backbone.to(torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype is torch.bfloat16


def test_sides_are_rounded_to_the_stride():
    backbone = upfeat.load_backbone("efficientnet_lite0")
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 100, 71)).shape[-2:] == (6, 4)
    with pytest.raises(ValueError, match="at least the stride"):
        backbone(torch.randn(1, 3, 8, 640))
    with pytest.raises(ValueError, match="x must be"):
        backbone(torch.randn(3, 64, 64))


def test_wrapper_infers_channels_and_stride():
    module = nn.Sequential(nn.Conv2d(3, 9, 14, stride=14), nn.Dropout(0.5), nn.BatchNorm2d(9))
    backbone = upfeat.load_backbone(module)
    assert (backbone.embed_dim, backbone.stride) == (9, 14)
    backbone.train()
    assert not module.training
    assert backbone.preprocess(PHOTOS / "cat.jpg", size=56).shape == (1, 3, 56, 84)
    model = upfeat.FeatUp(module, upfeat.Bilinear())
    assert model(torch.randn(1, 3, 61, 45)).shape == (1, 9, 61, 45)


def test_wrapper_takes_functions():
    backbone = upfeat.load_backbone(lambda x: nn.functional.avg_pool2d(x, 8), name="pool")
    assert (backbone.name, backbone.embed_dim, backbone.stride) == ("pool", 3, 8)
    assert upfeat.load_backbone(backbone) is backbone


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.flatten(1), "a tensor of shape"),
        (lambda x: {"logits": x.mean((2, 3))}, "no spatial features"),
        (lambda x: x.mean((2, 3)), "a pooled vector or logits"),
        (lambda x: nn.functional.adaptive_avg_pool2d(x, 1), "a pooled vector"),
        (lambda x: x.flatten(2).mT[:, :190], "190 tokens form no square grid"),
        (lambda x: {"a": x, "b": x}, "choose by layer=, one or a list of 'a', 'b'"),
        (lambda x: "text", "returned a str"),
        (lambda x: nn.functional.adaptive_avg_pool2d(x, 9), "no whole stride"),
        (lambda x: nn.functional.adaptive_avg_pool2d(x, (7, 14)), "no whole stride"),
    ],
)
def test_wrapper_says_what_is_wrong(function, words):
    with pytest.raises(ValueError, match=words):
        upfeat.load_backbone(function)


def test_wrapper_checks_every_output():
    with pytest.raises(ValueError, match="4 pixels apart; check its embed_dim and stride"):
        upfeat.load_backbone(lambda x: x[:, :, ::4, ::4], stride=8, embed_dim=3)
    for module in (lambda x: x[:, :, ::8, ::8], nn.AvgPool2d(8)):
        with pytest.raises(ValueError, match="embed_dim=4 was given, but its features have 3 chan"):
            upfeat.load_backbone(module, stride=8, embed_dim=4)


def test_unknown_names_suggest_close_ones():
    with pytest.raises(ValueError, match=r"did you mean efficientnet_lite0[? ]"):
        upfeat.load_backbone("efficientnet_lite")
    with pytest.raises(ValueError, match=r"known: .*timm:NAME"):
        upfeat.load_backbone("zzz")
    assert "efficientnet_lite0" in upfeat.list_backbones()


def test_model_is_a_drop_in():
    model = upfeat.load()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    x = model.preprocess(PHOTOS / "cat.jpg", size=64)
    assert model(x).shape == (1, model.embed_dim, *x.shape[-2:])
    assert model(x, output_size=(31, 77)).shape == (1, 112, 31, 77)
    with pytest.raises(ValueError, match="upsampler expects 7 channels"):
        upfeat.FeatUp(model.backbone, upfeat.JBUStack(7))
    with pytest.raises(ValueError, match="device="):
        upfeat.load(device="nonsense")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dynamo detected a call")
@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"upsampler": "bilinear"}, torch.inference_mode),
        ({}, torch.no_grad),
    ],
    ids=["bilinear", "default"],
)
def test_a_model_is_compiled_whole(options, mode):
    """One program for each size: with symbols for sizes, the compiler takes minutes."""
    model = upfeat.load("efficientnet_lite0", **options)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with mode():
        for size in ((1, 3, 49, 66), (2, 3, 64, 48)):
            x = torch.randn(size, generator=torch.Generator().manual_seed(size[2]))
            expected = model(x)
            assert (compiled(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"passes": 8}, {"early": False}])
def test_loading_leaves_the_random_state(options):
    before = torch.get_rng_state()
    upfeat.load(**options)
    assert torch.equal(torch.get_rng_state(), before)


def test_nan_from_a_backbone_is_named():
    model = upfeat.FeatUp(lambda x: x[:, :, ::8, ::8] * torch.nan, upfeat.Bilinear())
    with pytest.raises(ValueError, match="features holds NaN"):
        model(torch.randn(1, 3, 32, 32))


def test_parts_joined_by_hand_record_no_graph():
    module = nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.Dropout(0.5))
    model = upfeat.FeatUp(upfeat.load_backbone(module), upfeat.JBUStack(5).train())
    assert not model.training
    assert not model.upsampler.training
    x = torch.randn(1, 3, 40, 48)
    assert not model(x).requires_grad
    assert torch.equal(model(x), model(x))
    assert model(x.requires_grad_()).requires_grad
    model.upsampler.train().requires_grad_()
    assert model(x.detach()).requires_grad


def test_preprocess_keeps_the_photographs_own_pixels(tmp_path):
    Image.open(PHOTOS / "cat.jpg").resize((60, 40)).save(tmp_path / "photo.png")
    model = upfeat.load(upsampler="bilinear")
    assert model.preprocess(tmp_path / "photo.png").shape == (1, 3, 40, 60)
    assert model.preprocess(tmp_path / "photo.png", 32).shape == (1, 3, 32, 48)
    assert model.preprocess(tmp_path / "photo.png", align=True).shape == (1, 3, 32, 64)


def test_a_module_is_changed_in_place_as_said_and_a_copy_is_not():
    """README says so; whoever trains theirs gives a copy."""
    module = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {name: one.clone() for name, one in module.state_dict().items()}
    upfeat.load(copy.deepcopy(module), upsampler="bilinear")
    assert module.training
    assert all(one.training for one in module.modules())
    assert all(one.requires_grad for one in module.parameters())
    backbone = upfeat.load_backbone(module)
    assert not any(one.training for one in module.modules())
    assert all(one.requires_grad for one in module.parameters())
    upfeat.load(backbone, upsampler="bilinear")
    assert not any(one.requires_grad for one in module.parameters())
    for name, one in module.state_dict().items():
        assert torch.equal(one, before[name])
    for text in (upfeat.load.__doc__, upfeat.FeatUp.__init__.__doc__):
        assert "in place" in " ".join(text.split())


def test_a_model_that_upsamples_is_no_backbone(tmp_path):
    model = upfeat.load(upsampler="bilinear")
    for use in (
        lambda: upfeat.load_backbone(model),
        lambda: upfeat.load(model),
        lambda: upfeat.FeatUp(model, upfeat.Bilinear()),
        lambda: upfeat.fit_implicit(torch.rand(3, 64, 64), model),
        lambda: upfeat.train(model, tmp_path, upfeat.TrainConfig(out=tmp_path / "run")),
    ):
        with pytest.raises(ValueError, match=r"upsampled already; give its own backbone") as raised:
            use()
        assert "\n" not in str(raised.value)


def test_a_size_that_memory_cannot_hold_is_refused():
    backbone = upfeat.load_backbone("efficientnet_lite0")
    with pytest.raises(ValueError, match="give a smaller size"):
        backbone.preprocess(torch.rand(3, 40, 60), size=10**7)


class Returning(upfeat.Backbone):
    """Means of cells, as a function returns them."""

    def __init__(self, function, **options):
        super().__init__(**{"name": "returning", "embed_dim": 3, "stride": 8, **options})
        self.function = function

    def extract(self, x):
        return self.function(nn.functional.avg_pool2d(x, 8))


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (lambda maps: maps.permute(0, 2, 3, 1), {}),
        (lambda maps: maps, {"embed_dim": 4}),
        (lambda maps: maps, {"stride": 16}),
        (lambda maps: torch.cat([maps, maps]), {}),
        (lambda maps: maps.flatten(2).mT, {}),
        (lambda maps: maps.to(torch.complex64), {}),
        (lambda maps: maps.to("meta"), {}),
        (lambda maps: (maps,), {}),
        (lambda maps: None, {}),
    ],
)
def test_features_are_what_a_backbone_of_ones_own_promises(function, options):
    backbone = Returning(function, **options)
    for call in (backbone, backbone.with_hidden):
        with pytest.raises((TypeError, ValueError), match=r"^returning: extract returned .*return"):
            call(torch.zeros(1, 3, 32, 48))


@pytest.mark.parametrize("side", [64, 70])
def test_a_network_that_overwrites_its_input_leaves_the_image_alone(side):
    class Overwriting(nn.Module):
        def forward(self, x):
            return nn.functional.avg_pool2d(x.mul_(0), 8)

    model = upfeat.load(Overwriting(), upsampler="neighbourhood")
    x = torch.rand(1, 3, side, side)
    before = x.clone()
    lazy = model.lazy(x)
    assert torch.equal(x, before)
    assert lazy.guidance.std() > 0.1


def test_a_frozen_model_stays_in_eval_mode_in_a_network_that_is_trained():
    model = upfeat.load(upsampler="bilinear")
    network = nn.Sequential(model, nn.Dropout()).train()
    assert network[1].training
    x = torch.rand(2, 3, 32, 32)
    before = model(x)
    assert torch.equal(network.train()[0](x), before)
    assert not any(one.training for one in model.backbone.modules())
    model.backbone.requires_grad_()
    assert all(one.training for one in network.train()[0].backbone.modules())


def test_models_without_values_and_classes_are_refused():
    with pytest.raises(ValueError, match="Conv2d has parameters on meta, without values; load"):
        upfeat.load_backbone(nn.Conv2d(3, 4, 8, 8, device="meta"))
    with pytest.raises(TypeError, match="backbone=Returning is a class; give a model of it"):
        upfeat.load_backbone(Returning)
    with pytest.raises(ValueError, match=r"14×28 cells, .*; cells must be square"):
        upfeat.load_backbone(nn.Conv2d(3, 4, (16, 8), (16, 8)))
