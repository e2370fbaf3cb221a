"""Families of transformers, tiny and with random weights, through the conformance suite."""

import pytest
import torch

from upfeat.testing import check_backbone

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2]}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# Model, configuration, its options in small, stride of the last layer.
FAMILIES = {
    "dinov2": ("Dinov2", {**DINO, "image_size": 56, "patch_size": 14}, 14),
    "dinov2_registers": ("Dinov2WithRegisters", {**DINO, "patch_size": 14}, 14),
    "dinov3": ("DINOv3ViT", {**VIT, "num_register_tokens": 4}, 16),
    "dinov3_convnext": ("DINOv3ConvNext", STAGES, 32),
    "vit": ("ViT", VIT, 16),
    "clip_vision": ("CLIPVision", VIT, 16),
    "clip": ("CLIP", {"vision_config": VIT, "text_config": TEXT}, 16),
    "siglip_vision": ("SiglipVision", VIT, 16),
    "convnextv2": ("ConvNextV2", STAGES, 32),
    "swin": ("Swin", {**SWIN, "window_size": 4}, 16),
    "swinv2": ("Swinv2", {**SWIN, "window_size": 4}, 16),
    "beit": ("Beit", {**VIT, "use_relative_position_bias": True}, 16),
    "mae": ("ViTMAE", VIT, 16),
    "segformer": ("Segformer", {**STAGES, "num_attention_heads": [1, 1, 2, 2]}, 32),
    "resnet": ("ResNet", {**STAGES, "embedding_size": 8}, 32),
    "ijepa": ("IJepa", VIT, 16),
}


def _make(family):
    name, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family):
    # Its float16 normalises padding, which is 0, by an epsilon that is 0 there too.
    backbone = upfeat.load_backbone(_make(family))
    check_backbone(lambda: backbone, without=["float16"] if family == "swinv2" else [])
    assert backbone.stride == FAMILIES[family][2]
