"""Properties that every upsampler has, and those of the untrained ones."""

import json
from pathlib import Path

import pytest
import torch
from small_upsamplers import SMALL

import upfeat
from upfeat.linear import unit_vectors
from upfeat.upsamplers import create_upsampler

DETAIL = {
    "efficientnet_lite0": "detail_efficientnet_lite0",
    "efficientnet_lite1": "detail_universal",
}
"""Default weights without early layers."""
UNTRAINED = ["nearest", "bilinear", "bicubic", "joint_bilateral"]


@pytest.mark.parametrize("name", [one for one in SMALL if one != "uplift"])  # as published
@torch.no_grad()
def test_features_may_have_any_unit(name):
    torch.manual_seed(0)
    upsampler = SMALL[name]().eval()
    features, guidance = torch.randn(1, 4, 3, 5), torch.randn(1, 3, 24, 40)
    offset = upsampler(0 * features, guidance)
    expected = upsampler(features, guidance) - offset
    if not offset.any():
        small = upsampler(2.0**-60 * features, guidance) * 2.0**60
        torch.testing.assert_close(small, expected, rtol=1e-5, atol=1e-5)
    large = (upsampler(2.0**80 * features, guidance) - offset) * 2.0**-80
    torch.testing.assert_close(large, expected, rtol=1e-5, atol=1e-5)


def test_unit_vectors_of_any_unit():
    vectors = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(unit_vectors, (vectors,))
    vectors = vectors.detach().float()
    for factor in (1, 2.0**-120, 2.0**120):
        found = unit_vectors(factor * vectors)
        assert torch.equal(found, torch.nn.functional.normalize(vectors, dim=1))
    assert not unit_vectors(torch.zeros(1, 3)).any()


def test_jbu_stack_flip_with_symmetric_filters():
    """The window is symmetric and so are its normalised weights; the fix-up is not, so mute it."""
    torch.manual_seed(0)
    stack = upfeat.JBUStack().eval()
    for stage in stack.stages:
        torch.nn.init.zeros_(stage.fixup_proj[3].weight)
        torch.nn.init.zeros_(stage.fixup_proj[3].bias)
    features, guidance = torch.randn(1, 3, 3, 4), torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        flipped = stack(features.flip(-1), guidance.flip(-1))
        torch.testing.assert_close(
            flipped, stack(features, guidance).flip(-1), rtol=1e-4, atol=1e-5
        )


def test_joint_bilateral_follows_edges():
    """A step in the image inside a cell becomes a step in the features, where bilinear ramps."""
    guidance = torch.full((1, 3, 32, 32), -1.0)
    guidance[..., 13:] = 1.0
    features = torch.zeros(1, 1, 4, 4)
    features[..., 2:] = 1.0
    sharp = upfeat.JointBilateral()(features, guidance)[0, 0, 16]
    smooth = upfeat.Bilinear()(features, guidance)[0, 0, 16]
    assert (sharp.diff().abs().argmax() + 1).item() == 13
    assert sharp.diff().abs().max() > 3 * smooth.diff().abs().max()


def test_joint_bilateral_is_convex():
    features, guidance = torch.randn(1, 4, 5, 6), torch.randn(1, 3, 70, 90)
    out = upfeat.JointBilateral()(features, guidance)
    assert out.max() <= features.max() + 1e-5
    assert out.min() >= features.min() - 1e-5


@pytest.mark.parametrize("options", [{"radius": 0}, {"sigma_range": 0.0}, {"sigma_spatial": -1.0}])
def test_joint_bilateral_refuses_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        upfeat.JointBilateral(**options)


def test_names():
    assert set(UNTRAINED) < set(upfeat.list_upsamplers())
    with pytest.raises(ValueError, match="did you mean bilinear"):
        create_upsampler("biliner")


SHIPPED = [
    f"{cls}_{backbone}"
    for cls in ("jbu_stack", "neighbourhood")
    for backbone in ("efficientnet_lite0", "universal")
] + ["detail_efficientnet_lite0"]


class TestShippedWeights:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_they_load_by_name_and_are_small(self, name):
        assert name in upfeat.list_upsamplers()
        upsampler = create_upsampler(name)
        assert name.startswith(upsampler.name)
        assert not upsampler.training
        folder = Path(upfeat.__file__).parent / "weights" / name
        assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
        history = json.loads((folder / "training.json").read_text())
        assert history["photographs"]["images"] > 0

    @pytest.mark.parametrize("cls", ["jbu_stack", "neighbourhood"])
    def test_a_class_stands_for_the_weights_that_suit_the_backbone(self, cls):
        for backbone, weights in (
            ("efficientnet_lite0", f"{cls}_efficientnet_lite0"),
            ("efficientnet_lite0.stride32", f"{cls}_universal"),
            (None, f"{cls}_universal"),
        ):
            found = create_upsampler(cls, 112, backbone=backbone).state_dict()
            expected = create_upsampler(weights).state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)

    @pytest.mark.parametrize("cls", ["jbu_stack", "neighbourhood", "detail"])
    def test_weights_of_another_backbone_are_warned_of(self, cls, caplog):
        name = f"{cls}_efficientnet_lite0"
        create_upsampler(name, 112, backbone="efficientnet_lite1")
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.getMessage() == (
            f"upsampler='{name}' was trained for efficientnet_lite0, not for efficientnet_lite1; "
            f"'{cls}' takes the weights that suit it best"
        )

    def test_weights_that_suit_are_not_warned_of(self, caplog):
        own = "detail_efficientnet_lite0"
        create_upsampler(own, 112, backbone="efficientnet_lite0")
        create_upsampler(own)
        create_upsampler("detail", 112, backbone="efficientnet_lite1")
        create_upsampler("detail_universal", 112, backbone="efficientnet_lite1")
        upfeat.load_upsampler(own)
        with pytest.raises(ValueError, match="expects 112 channels"):
            upfeat.load(torch.nn.Conv2d(3, 6, 16, 16), upsampler=own)
        assert not caplog.records

    def test_universal_weights_serve_any_channels_and_stride(self):
        for name in ("jbu_stack_universal", "neighbourhood_universal", "detail_universal"):
            upsampler = create_upsampler(name)
            for channels, grid in ((3, (6, 8)), (7, (3, 4))):
                features = torch.ones(1, channels, *grid)
                with torch.no_grad():
                    out = upsampler(features, torch.rand(1, 3, 48, 64))
                assert out.shape == (1, channels, 48, 64)

    def test_the_default_is_trained(self):
        for backbone in ("efficientnet_lite0", "efficientnet_lite1"):
            for options, name in (
                ({}, f"early_detail_{backbone}"),
                ({"upsampler": "detail"}, DETAIL[backbone]),
                ({"early": False}, DETAIL[backbone]),
            ):
                model = upfeat.load(backbone, **options)
                expected = create_upsampler(name).state_dict()
                found = model.upsampler.state_dict()
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[key], expected[key]) for key in expected)
                assert model.early == (not options)
                assert model.backbone.displacement == (0 if options else 2)
                assert (model.embed_dim, model.backbone.stride) == (112, 16)

    def test_what_only_bears_the_name_gets_no_network_of_early_layers(self):
        other = upfeat.load_backbone(torch.nn.Conv2d(3, 112, 16, 16), name="efficientnet_lite0")
        assert upfeat.load(other).upsampler.name == "detail"
        level = upfeat.load("efficientnet_lite0.stride8")
        assert (level.upsampler.name, level.early) == ("detail", True)

    def test_no_early_layers_in_any_number_of_passes(self):
        for passes, name in ((2, "detail"), (5, "neighbourhood")):
            model = upfeat.load(passes=passes, early=False)
            assert (model.upsampler.name, model.early) == (name, False)
            assert model.backbone.displacement == 0
        assert upfeat.load(passes=2).early

    def test_a_module_of_ones_own_gets_the_universal_default(self):
        module = torch.nn.Conv2d(3, 6, 16, 16)
        model = upfeat.load(module)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert model(torch.rand(1, 3, 32, 48)).shape == (1, 6, 32, 48)
        expected = create_upsampler("detail_universal").state_dict()
        found = model.upsampler.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_other_backbones_get_the_universal_default(self):
        found = create_upsampler(None, 320, backbone="efficientnet_lite0.stride32")
        expected = create_upsampler("detail_universal").state_dict()
        assert all(torch.equal(found.state_dict()[key], expected[key]) for key in expected)
        # Weights that belong to a backbone are no good for another number of channels.
        found = create_upsampler(None, 7, backbone="efficientnet_lite0")
        assert found.embed_dim is None
