"""Families of timm, tiny and with random weights, through the conformance suite."""

import pytest
import torch

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
