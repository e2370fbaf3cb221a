"""Families of transformers, tiny and with random weights, through the conformance suite."""

import json

import pytest
import torch

import upfeat
from upfeat.normalization import HALF, IMAGENET
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
    "hiera": ("Hiera", {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}, 32),
    "yolos": ("Yolos", {**VIT, "image_size": [64, 64], "num_detection_tokens": 10}, 16),
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


def test_layers_are_hidden_states():
    network = _make("dinov2")
    x = torch.randn(1, 3, 56, 70)
    states = network(x, output_hidden_states=True).hidden_states
    expected = states[2][:, 1:].mT.unflatten(2, (4, 5))
    torch.testing.assert_close(upfeat.load_backbone(network, layer=1)(x), expected)
    last = network(x).last_hidden_state[:, 1:].mT.unflatten(2, (4, 5))
    for layer in (None, 2, -1):
        torch.testing.assert_close(upfeat.load_backbone(network, layer=layer)(x), last)
    assert upfeat.load_backbone(network, layer=[0, 1]).embed_dim == 64
    with pytest.raises(ValueError, match="layer=3 does not exist; its layers are 0 to 2"):
        upfeat.load_backbone(network, layer=3)


@pytest.mark.parametrize("family", ["convnextv2", "segformer", "swinv2", "dinov3_convnext"])
def test_stages_are_layers(family):
    stages = 3 if family == "swinv2" else 4
    strides = [upfeat.load_backbone(_make(family), layer=n).stride for n in range(stages)]
    assert strides == sorted(strides)
    assert strides[0] < strides[-1]


def test_masked_autoencoders_show_every_patch_in_order():
    network = _make("mae")
    assert network.config.mask_ratio > 0
    backbone = upfeat.load_backbone(network)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone(x), backbone(x))
    assert network.config.mask_ratio > 0, "the model that was given stays as it is"


@pytest.fixture
def folder(tmp_path):
    _make("dinov2").half().save_pretrained(tmp_path)
    processor = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path


class TestFolder:
    def test_model_and_processor(self, folder, caplog):
        backbone = upfeat.load_backbone(f"hf:{folder}", layer=1)
        assert backbone.dtype == torch.float32
        assert backbone.normalization == ((0.5,) * 3, (0.25,) * 3)
        assert backbone.interpolation == "bilinear"
        assert "its processor crops images to 224×224" in caplog.text
        check_backbone(lambda: backbone)

    def test_another_precision(self, folder):
        backbone = upfeat.load_backbone(f"hf:{folder}", dtype="bfloat16")
        assert backbone.dtype == torch.bfloat16
        model = upfeat.load(backbone, upsampler="bilinear")
        assert model(torch.randn(1, 3, 56, 56)).dtype == torch.float32

    def test_what_is_missing_is_named(self, folder, caplog):
        (folder / "preprocessor_config.json").unlink()
        upfeat.load_backbone(f"hf:{folder}")
        assert "has no preprocessor_config.json" in caplog.text
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="holds no weights"):
            upfeat.load_backbone(f"hf:{folder}")
        assert upfeat.load_backbone(f"hf:{folder}", pretrained=False).stride == 14
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
            upfeat.load_backbone(f"hf:{folder}")

    def test_hub_out_of_reach(self, monkeypatch):
        def offline(*args, **kwargs):
            raise OSError("We couldn't connect\nto the hub")

        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
        with pytest.raises(FileNotFoundError, match="into a folder and give hf:FOLDER") as caught:
            upfeat.load_backbone("hf:someone/some-model")
        assert "\n" not in str(caught.value)


def test_processors_without_normalisation():
    from upfeat.backbones.settings import transformers_settings

    config = transformers.ViTConfig(**VIT)
    found = transformers_settings(config, {"do_normalize": False})
    assert found.mean == (0.0,) * 3
    assert found.std == pytest.approx((1.0,) * 3)
    shifted = {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}
    assert transformers_settings(config, shifted).mean == pytest.approx((0.5,) * 3)
    assert transformers_settings(config).mean == HALF.mean
    assert transformers_settings(transformers.Dinov2Config()).mean == IMAGENET.mean


def test_models_with_heads_give_the_model_inside():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VIT, num_labels=3)
    backbone = upfeat.load_backbone(transformers.ViTForImageClassification(config))
    assert (backbone.stride, backbone.embed_dim) == (16, 32)


@pytest.mark.parametrize("layer", [None, 1])
def test_tokens_of_detections_are_no_cells(layer):
    # 16 cells, before them one token, and behind them ten.
    network = _make("yolos")
    x = torch.randn(1, 3, 64, 64)
    output = network(x, output_hidden_states=True)
    tokens = output.last_hidden_state if layer is None else output.hidden_states[1 + layer]
    expected = tokens[:, 1:-10].mT.unflatten(2, (4, 4))
    torch.testing.assert_close(upfeat.load_backbone(network, layer=layer)(x), expected)


def test_models_on_a_backbone_give_that_backbone():
    torch.manual_seed(0)
    options = {**DINO, "image_size": 56, "patch_size": 14, "reshape_hidden_states": False}
    inner = transformers.Dinov2Config(**options, out_features=["stage1", "stage2", "stage3"])
    config = transformers.DepthAnythingConfig(
        backbone_config=inner,
        reassemble_hidden_size=32,
        reassemble_factors=[2, 1, 0.5],
        neck_hidden_sizes=[8, 8, 8],
        fusion_hidden_size=8,
    )
    network = transformers.DepthAnythingForDepthEstimation(config).eval()
    backbone = upfeat.load_backbone(network)
    assert (backbone.stride, backbone.embed_dim) == (14, 32)
    x = torch.randn(1, 3, 56, 56)
    expected = network.backbone(x).feature_maps[-1][:, 1:].mT.unflatten(2, (4, 4))
    torch.testing.assert_close(backbone(x), expected)


@pytest.mark.parametrize("name", ["VideoMAE", "Timesformer", "VJEPA2"])
def test_models_of_videos_are_refused(name):
    options = {key: value for key, value in VIT.items() if key != "image_size"}
    frames = {"frames_per_clip": 4, "crop_size": 64} if name == "VJEPA2" else {"num_frames": 4}
    config = getattr(transformers, f"{name}Config")(**options, **frames)
    with torch.device("meta"):
        network = getattr(transformers, f"{name}Model")(config)
    with pytest.raises(ValueError, match=r"takes videos \((num_frames|frames_per_clip)=4\)"):
        upfeat.load_backbone(network)


def test_models_that_do_not_see_are_refused():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ValueError, match="takes no pixel_values"):
        upfeat.load_backbone(transformers.BertModel(config))
