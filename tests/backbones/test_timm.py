"""Families of timm, tiny and with random weights, through the conformance suite."""

import pytest
import torch

import upfeat
from upfeat.testing import check_backbone

VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
# Architecture, its options in small, stride of the last layer.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", VIT, 16),
    "vit_patch8": ("vit_small_patch8_224", VIT, 8),
    "dinov2": ("vit_small_patch14_dinov2", VIT, 14),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", VIT, 14),
    "dinov3": ("vit_small_patch16_dinov3", VIT, 16),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", VIT, 16),
    "clip": ("vit_base_patch16_clip_224", VIT, 16),
    "siglip": ("vit_base_patch16_siglip_224", VIT, 16),
    "eva": ("eva02_tiny_patch14_224", {**VIT, "num_heads": 2}, 14),
    "beit": ("beit_base_patch16_224", VIT, 16),
    "sam": (
        "samvit_base_patch16",
        {**VIT, "img_size": 64, "global_attn_indexes": (2,), "window_size": 2, "neck_chans": 16},
        16,
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
        32,
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
        32,
    ),
    "swinv2_cr": (
        "swinv2_cr_tiny_224",
        {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
        32,
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 32),
    "resnet": ("resnet18", {"channels": (8, 16, 24, 32)}, 32),
    "efficientnet": ("efficientnet_lite0", {}, 32),
    "mobilenetv3": ("mobilenetv3_small_050", {}, 32),
    "regnet": ("regnetx_002", {}, 32),
    "maxvit": ("maxvit_rmlp_pico_rw_256", {"img_size": 64}, 32),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "stages": (1, 1, 1, 1), "num_heads": 1}, 32),
}

timm = None


@pytest.fixture(autouse=True, scope="module")
def library(torchvision_operators):
    global timm
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)


def _make(family, **more):
    name, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **options, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family):
    backbone = upfeat.load_backbone(_make(family))
    check_backbone(lambda: backbone)
    assert backbone.stride == FAMILIES[family][2]


def test_objects_are_asked_for_features_not_logits():
    network = _make("vit")
    backbone = upfeat.load_backbone(network)
    assert backbone.embed_dim == 32  # not 1000 classes
    x = torch.randn(1, 3, 224, 224)
    expected = network.forward_features(x)[:, 1:].mT.unflatten(2, (14, 14))
    torch.testing.assert_close(backbone(x), expected, rtol=1e-4, atol=1e-5)
    assert not network.dynamic_img_size, "the model that was given stays as it is"
    assert backbone.input_size is None


def test_layers_are_those_of_forward_intermediates():
    network = _make("vit")
    x = torch.randn(1, 3, 224, 224)
    maps = network.eval().forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(upfeat.load_backbone(network, layer=1)(x), maps[1])
    both = upfeat.load_backbone(network, layer=[0, -2])
    torch.testing.assert_close(both(x), torch.cat([maps[0], maps[1]], dim=1))
    with pytest.raises(ValueError, match="layer=3 does not exist; its layers are 0 to 2"):
        upfeat.load_backbone(network, layer=3)
    with pytest.raises(ValueError, match="must be a number"):
        upfeat.load_backbone(network, layer="blocks")


def test_levels_of_a_hierarchy_share_the_finest_grid():
    backbone = upfeat.load_backbone(_make("convnext"), layer=[1, 3])
    assert (backbone.stride, backbone.embed_dim) == (8, 16 + 32)
    check_backbone(lambda: backbone)


def test_settings_are_the_models_own():
    for family, mean in (("vit", 0.5), ("clip", 0.48145466), ("dinov2", 0.485)):
        backbone = upfeat.load_backbone(_make(family))
        assert backbone.normalization.mean[0] == pytest.approx(mean)


def test_by_name():
    backbone = upfeat.load_backbone(
        "timm:test_vit", pretrained=False, device="cpu", dtype=torch.bfloat16
    )
    assert (backbone.name, backbone.stride) == ("timm:test_vit", 16)
    assert backbone(torch.randn(1, 3, 61, 75)).dtype == torch.float32
    with pytest.raises(
        ValueError, match=r'timm model "resnet19" is unknown; did you mean .*resnet18'
    ):
        upfeat.load_backbone("timm:resnet19")
    with pytest.raises(ValueError, match='weights of timm\'s resnet18 "a1_in1q" is unknown; did'):
        upfeat.load_backbone("timm:resnet18.a1_in1q")
    with pytest.raises(ValueError, match="names no model; give timm:NAME"):
        upfeat.load_backbone("timm:")


def test_weights_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match="give pretrained=False for random ones") as caught:
        upfeat.load_backbone("timm:resnet18")
    assert "\n" not in str(caught.value)


def test_networks_of_features_only():
    """Lists of maps of which the last is taken, Swin's with channels last."""
    name, options, _ = FAMILIES["swin"]
    network = timm.create_model(name, pretrained=False, features_only=True, **options)
    backbone = upfeat.load_backbone(lambda x: network(x)[-1], fit="resize")
    assert (backbone.stride, backbone.embed_dim) == (32, 128)
    assert backbone.normalization.mean[0] == pytest.approx(0.485)
    assert upfeat.load_backbone(network, layer=0).stride == 4


def test_models_of_one_size_are_said_to_be(caplog):
    backbone = upfeat.load_backbone(_make("maxvit"))
    if backbone.input_size is not None:
        assert "only" in caplog.text
    fixed = upfeat.load_backbone(_make("vit"), fit="resize")
    assert fixed.input_size == (224, 224)
    assert fixed.grid_size((448, 300)) == (14, 14)


@pytest.mark.parametrize("name", ["vit_pe_spatial_tiny_patch16_512", "eva02_tiny_patch14_224"])
def test_rotary_positions_follow_the_image(name):
    """Objects made for one size compute angles of any grid, as those made for any size do."""
    options = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    fixed = timm.create_model(name, **options).eval()
    free = timm.create_model(name, dynamic_img_size=True, **options).eval()
    free.load_state_dict(fixed.state_dict())
    backbone = upfeat.load_backbone(fixed)
    assert backbone.input_size is None
    patch = backbone.stride
    x = torch.randn(2, 3, 5 * patch, 7 * patch)
    tokens = free.forward_features(x)[:, free.num_prefix_tokens :]
    torch.testing.assert_close(backbone(x), tokens.mT.unflatten(2, (5, 7)))
    with pytest.raises(AssertionError, match="doesn't match model"):
        fixed(x)
