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

    @pytest.mark.parametrize(
        "facts", [{"image_std": ["x"] * 3}, {"image_mean": [10**400] * 3}, {"resample": [2]}]
    )
    def test_a_damaged_processor_is_named(self, folder, facts):
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
        with pytest.raises(ValueError, match=f"hf:{folder}: preprocessor_config.json: "):
            upfeat.load_backbone(f"hf:{folder}")

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


@pytest.mark.parametrize("name", ["VideoMAE", "Timesformer"])
def test_models_of_videos_are_refused(name):
    options = {key: value for key, value in VIT.items() if key != "image_size"}
    config = getattr(transformers, f"{name}Config")(**options, num_frames=4)
    with torch.device("meta"):
        network = getattr(transformers, f"{name}Model")(config)
    with pytest.raises(ValueError, match=r"takes videos \(num_frames=4\)"):
        upfeat.load_backbone(network)


@pytest.mark.parametrize("layer", [None, 0])
def test_vjepa_is_given_each_image_as_a_clip(layer):
    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {f"pred_{key}": value for key, value in small.items()}
    network = transformers.VJEPA2Model(transformers.VJEPA2Config(**small, crop_size=64)).eval()
    x = torch.randn(2, 3, 64, 96)
    output = network(torch.stack([x, x], 1), skip_predictor=True, output_hidden_states=True)
    tokens = output.last_hidden_state if layer is None else output.hidden_states[1]
    backbone = upfeat.load_backbone(network, layer=layer)
    torch.testing.assert_close(backbone(x), tokens.mT.unflatten(2, (4, 6)))
    check_backbone(lambda: backbone)


def test_windows_that_exchange_height_and_width_are_given_squares():
    if not hasattr(transformers, "RfDetrDinov2Backbone"):
        pytest.skip("this transformers has no RF-DETR")
    torch.manual_seed(0)
    options = {**DINO, "image_size": 112, "patch_size": 14, "out_features": ["stage3"]}
    config = transformers.RfDetrDinov2Config(**options, num_windows=2)
    backbone = upfeat.load_backbone(transformers.RfDetrDinov2Backbone(config))
    assert backbone.input_size == (112, 112)
    check_backbone(lambda: backbone)


def test_processors_of_models_that_were_loaded_are_read(folder, caplog):
    network = transformers.Dinov2Model.from_pretrained(folder)
    backbone = upfeat.load_backbone(network)
    assert backbone.normalization == ((0.5,) * 3, (0.25,) * 3)
    assert backbone.interpolation == "bilinear"
    (folder / "preprocessor_config.json").unlink()
    assert upfeat.load_backbone(network).normalization == IMAGENET
    assert "has no preprocessor_config.json" in caplog.text


def test_models_that_do_not_see_are_refused():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ValueError, match="takes no pixel_values"):
        upfeat.load_backbone(transformers.BertModel(config))


def _folder(network, path, change=None):
    from safetensors.torch import load_file, save_file

    network.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5, "image_std": 1}))
    if change is not None:
        tensors = change(load_file(path / "model.safetensors"))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return f"hf:{path}"


def test_weights_under_other_names_are_refused(tmp_path, caplog):
    """transformers would fill what it does not find with random values."""
    network = _make("vit")
    other = _folder(network, tmp_path, lambda all: {f"module.{name}": all[name] for name in all})
    with pytest.raises(ValueError, match=r"lack .* of ViTModel, such as embeddings.cls"):
        upfeat.load_backbone(other)
    (tmp_path / "less").mkdir()
    last = "layernorm.weight"
    less = _folder(network, tmp_path / "less", lambda all: {n: all[n] for n in all if n != last})
    upfeat.load_backbone(less)
    assert f"lack 1 of 56 parameters of ViTModel, such as {last}: they are" in caplog.text
    classifier = transformers.ViTForImageClassification(network.config)
    caplog.clear()
    (tmp_path / "head").mkdir()
    upfeat.load_backbone(_folder(classifier, tmp_path / "head"))
    assert "lack" not in caplog.text


@pytest.mark.parametrize("kind", ["ConvNextBackbone", "BlipVisionModel"])
def test_folders_of_backbones_and_of_models_without_automatic_class(kind, tmp_path):
    torch.manual_seed(0)
    options = {**STAGES, "out_features": ["stage2"]} if "Backbone" in kind else VIT
    config = getattr(transformers, kind.replace("Backbone", "Config").replace("Model", "Config"))
    network = getattr(transformers, kind)(config(**options)).eval()
    x = torch.randn(1, 3, 64, 96)
    found = upfeat.load_backbone(_folder(network, tmp_path))
    torch.testing.assert_close(found(x), upfeat.load_backbone(network)(x))
    assert upfeat.load_backbone(f"hf:{tmp_path}", pretrained=False).stride == found.stride


def _language_model():
    text = {**TEXT, "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 99}
    seeing = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=seeing)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [lambda: _make("clip"), _language_model], ids=["clip", "qwen"])
def test_the_vision_tower_of_a_folder_is_loaded_alone(make, tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = make()
    folder, x = _folder(network, tmp_path), torch.randn(1, 3, 64, 96)
    expected = upfeat.load_backbone(network)(x)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)  # would load all of it
    assert torch.equal(upfeat.load_backbone(folder)(x), expected)


def test_a_tower_under_another_name_is_refused(tmp_path):
    network = _make("clip")
    change = lambda all: {name.replace("vision_model.", "eye."): all[name] for name in all}  # noqa: E731
    with pytest.raises(ValueError, match=r"lack 55 of 55 parameters of CLIPVisionModel"):
        upfeat.load_backbone(_folder(network, tmp_path, change))


def test_layers_are_counted_where_configurations_say_another_number():
    config = transformers.EfficientNetConfig(
        width_coefficient=0.5, depth_coefficient=0.4, image_size=64, hidden_dim=640
    )
    network = transformers.EfficientNetModel(config).eval()
    assert len(network.encoder.blocks) < config.num_hidden_layers
    strides = [upfeat.load_backbone(network, layer=layer).stride for layer in (0, 1, -1)]
    assert strides == [2, 4, 32]
    stages = {"depths": [1, 1, 1, 1], "embed_dims": [8, 12, 16, 24]}
    network = transformers.SwiftFormerModel(transformers.SwiftFormerConfig(**stages)).eval()
    for layer, width in enumerate(stages["embed_dims"]):
        backbone = upfeat.load_backbone(network, layer=layer)
        assert (backbone.embed_dim, backbone.stride) == (width, 4 << layer)


def test_layers_are_counted_in_the_configuration_inside():
    hiera = {"hidden_size": 8, "embed_dim_per_stage": [8, 16, 32, 64], "blocks_per_stage": [1] * 4}
    hiera |= {"num_attention_heads": 1, "num_attention_heads_per_stage": [1, 1, 2, 2]}
    hiera |= {"global_attention_blocks": []}
    options = {"backbone_config": transformers.Sam2HieraDetConfig(**hiera)}
    options |= {"backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 8}
    torch.manual_seed(0)
    network = transformers.Sam2VisionModel(transformers.Sam2VisionConfig(**options)).eval()
    x = torch.randn(1, 3, 256, 384)
    states = network(x, output_hidden_states=True).hidden_states
    assert len(states) == 1 + 4  # of the embedding and the blocks
    for layer in range(3):
        expected = states[1 + layer].permute(0, 3, 1, 2)
        torch.testing.assert_close(upfeat.load_backbone(network, layer=layer)(x), expected)


def test_the_last_hidden_state_of_a_decoder_is_no_map():
    """It has an entry for each object; those of the encoder are cells."""
    from types import SimpleNamespace

    from upfeat.backbones.transformers import TransformersFeatures

    cells, objects = torch.zeros(1, 4, 8), torch.zeros(1, 9, 8)
    output = {"last_hidden_state": objects, "encoder_last_hidden_state": cells}
    assert TransformersFeatures._last(SimpleNamespace(), output) is cells


def test_colours_are_given_in_the_order_of_the_model():
    config = {"neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "hidden_sizes": [8, 8, 8]}
    network = transformers.MobileViTModel(transformers.MobileViTConfig(**config)).eval()
    backbone = upfeat.load_backbone(network)
    x = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(backbone(x), network(x.flip(1)).last_hidden_state)
    assert backbone.normalization == ((0.0,) * 3, (1.0,) * 3)
