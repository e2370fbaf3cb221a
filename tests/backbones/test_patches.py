"""Vision parts of language models and NaFlex models, which take patches and their grid."""

import importlib

import numpy as np
import pytest
import torch

import upfeat
from upfeat.normalization import HALF
from upfeat.testing import check_backbone

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "embed_dim": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 24,
}
# Module and class of a model, its options in small.
GRIDS = {
    "qwen2_vl": ("qwen2_vl.Qwen2VisionTransformerPretrainedModel", TOWER),
    "qwen2_5_vl": (
        "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        {**TOWER, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": ("qwen3_vl.Qwen3VLVisionModel", {**TOWER, "deepstack_visual_indexes": [0]}),
    "glm4v": ("glm4v.Glm4vVisionModel", TOWER),
}


def _make(path, options):
    module, _, name = path.partition(".")
    try:
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        kind = getattr(found, name)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    return kind(kind.config_class(**options)).eval()


def _grid_model(family):
    network = _make(*GRIDS[family])
    with torch.no_grad():
        patches = torch.zeros(4, 3 * 2 * network.config.patch_size**2)
        out = network(patches, grid_thw=torch.tensor([[1, 2, 2]]))
    if isinstance(out, torch.Tensor):
        pytest.skip("this transformers returns merged patches only")
    return network


def _patches_of_a_block(x, patch, merge, frames):
    """Cut one image as Qwen2-VL's processor does, with plain loops."""
    rows, columns = x.shape[2] // (patch * merge), x.shape[3] // (patch * merge)
    found = []
    for row, column, down, across in np.ndindex(rows, columns, merge, merge):
        top, left = (row * merge + down) * patch, (column * merge + across) * patch
        part = x[0, :, top : top + patch, left : left + patch]
        found.append(torch.stack([part] * frames, 1).flatten())
    return torch.stack(found), torch.tensor([[1, rows * merge, columns * merge]])


@pytest.mark.parametrize("family", GRIDS)
def test_towers_of_language_models_are_given_patches(family):
    """The merger joins each square of four tokens of the map to what the model passes on."""
    network = _grid_model(family)
    patch = network.config.patch_size
    x = torch.randn(1, 3, 2 * 3 * patch, 2 * 9 * patch)  # several windows of Qwen2.5-VL
    given, grid = _patches_of_a_block(x, patch, 2, network.config.temporal_patch_size)
    output = network(given, grid_thw=grid)
    backbone = upfeat.load_backbone(network)
    features = backbone(x)
    if family == "glm4v":  # merged before its last norm
        assert backbone.stride == 2 * patch
        expected = output.last_hidden_state.mT.unflatten(1, (3, 9))[None]
        torch.testing.assert_close(features, expected)
    else:
        assert backbone.stride == patch
        blocks = features[0].unflatten(2, (9, 2)).unflatten(1, (3, 2)).permute(1, 3, 2, 4, 0)
        merged = network.merger(blocks.reshape(-1, features.shape[1]))
        torch.testing.assert_close(merged, output.pooler_output)
    check_backbone(lambda: backbone)
    first = upfeat.load_backbone(network, layer=0)
    assert first.stride == patch
    check_backbone(lambda: first)


def _siglip2(**options):
    torch.manual_seed(0)
    return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**VIT)).eval()


@pytest.mark.parametrize("layer", [None, 0])
def test_naflex_is_given_the_grid(layer):
    network = _siglip2()
    x = torch.randn(2, 3, 64, 96)
    cut = x.unflatten(3, (6, 16)).unflatten(2, (4, 16)).permute(0, 2, 4, 3, 5, 1)
    given = {
        "pixel_values": cut.reshape(2, 24, -1),
        "pixel_attention_mask": torch.ones(2, 24, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 6], [4, 6]]),
    }
    output = network(**given, output_hidden_states=True)
    tokens = output.last_hidden_state if layer is None else output.hidden_states[1]
    backbone = upfeat.load_backbone(network, layer=layer)
    torch.testing.assert_close(backbone(x), tokens.mT.unflatten(2, (4, 6)))
    assert backbone.normalization == HALF
    check_backbone(lambda: backbone)


@pytest.mark.parametrize("layer", [None, 0])
def test_a_batch_in_one_row_is_divided(layer):
    torch.manual_seed(0)
    config = transformers.PixtralVisionConfig(**VIT, image_size=256)
    network = transformers.PixtralVisionModel(config).eval()
    x = torch.randn(2, 3, 64, 96)
    output = network(x, image_sizes=[(64, 96)] * 2, output_hidden_states=True)
    tokens = output.last_hidden_state if layer is None else output.hidden_states[1]
    expected = tokens.reshape(2, 24, -1).mT.unflatten(2, (4, 6))
    backbone = upfeat.load_backbone(network, layer=layer)
    torch.testing.assert_close(backbone(x), expected)
    check_backbone(lambda: backbone)


def test_pooled_patches_form_a_map():
    options = {**VIT, "num_key_value_heads": 2, "head_dim": 16}
    network = _make("gemma4.Gemma4VisionModel", options)
    backbone = upfeat.load_backbone(network)
    assert backbone.stride == 3 * network.config.patch_size
    assert backbone.normalization.mean == (0.0,) * 3, "it scales colours itself"
    check_backbone(lambda: backbone, without=["bfloat16", "float16"])
    assert upfeat.load_backbone(network, layer=0).stride == network.config.patch_size


def test_towers_are_found_in_their_models():
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Siglip2Config(text_config={**text, "vocab_size": 9}, vision_config=VIT)
    backbone = upfeat.load_backbone(transformers.Siglip2Model(config))
    assert (backbone.stride, backbone.embed_dim) == (16, 32)
    sam = {**VIT, "image_size": 64, "output_channels": 8, "global_attn_indexes": [1]}
    del sam["intermediate_size"]
    network = transformers.SamModel(transformers.SamConfig(vision_config=sam)).eval()
    x = torch.randn(1, 3, 64, 64)
    found = upfeat.load_backbone(network)
    torch.testing.assert_close(found(x), network.vision_encoder(x).last_hidden_state)


def test_a_grid_of_another_kind_is_asked_for():
    class Odd(_siglip2().__class__):
        def forward(self, pixel_values, grid_thw=None):
            raise NotImplementedError

    odd = Odd(transformers.Siglip2VisionConfig(**VIT))
    with pytest.raises(ValueError, match="Odd needs grid_thw beside the image; wrap it"):
        upfeat.load_backbone(odd)
