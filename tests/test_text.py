"""Dense features of CLIP and SigLIP: in the space of texts, in their places, of any size."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import upfeat
from upfeat.text import TEMPLATES


def letters(texts, length=12):
    """Token ids of texts, in place of a tokenizer that would have to be downloaded."""
    ids = [[1 + ord(letter) % 40 for letter in text[: length - 1]] for text in texts]
    return torch.tensor([[*row, *[0] * (length - 1 - len(row)), 49] for row in ids])


def transformers_tokenizer(texts, **options):
    return {"input_ids": letters(texts)}


def clip():
    transformers = pytest.importorskip("transformers")
    sizes = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 16, "vocab_size": 50, "max_position_embeddings": 12} | sizes
    text |= {"bos_token_id": 48, "eos_token_id": 49}
    vision = {"hidden_size": 16, "image_size": 32, "patch_size": 8} | sizes
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return transformers.CLIPModel(config), transformers_tokenizer


def siglip(kind="Siglip"):
    transformers = pytest.importorskip("transformers")
    sizes = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 16, "vocab_size": 50, "max_position_embeddings": 12} | sizes
    text |= {"bos_token_id": 48, "eos_token_id": 49}
    vision = {"hidden_size": 16, "image_size": 32, "patch_size": 8} | sizes
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    return getattr(transformers, f"{kind}Model")(config), transformers_tokenizer


def naflex():
    return siglip("Siglip2")


def open_clip():
    library = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
    return library.CLIP(12, vision, text), letters


FAMILIES = {"clip": clip, "siglip": siglip, "naflex": naflex, "open_clip": open_clip}


@pytest.fixture(params=FAMILIES)
def backbone(request, torchvision_operators):
    torch.manual_seed(0)
    model, tokenizer = FAMILIES[request.param]()
    return upfeat.load_text_backbone(model, tokenizer)


def test_three_lines_give_a_map_for_every_text(backbone):
    model = upfeat.load(backbone)
    x = model.preprocess(torch.rand(3, 40, 56))
    texts = backbone.encode_text(["a cat", "a sofa"])
    maps = model.lazy(x).similarity(texts)
    assert maps.shape == (1, 2, 40, 56)
    full = F.normalize(model(x), dim=1)
    torch.testing.assert_close(maps, torch.einsum("bchw,kc->bkhw", full, texts))
    one = model.lazy(x).similarity(texts[0])
    torch.testing.assert_close(one, maps[:, :1])


def test_features_are_those_of_one_patch_and_lie_in_their_places(backbone):
    x = torch.randn(2, 3, 32, 32)
    features = backbone(x)
    assert features.shape == (2, backbone.embed_dim, 4, 4)
    torch.testing.assert_close(backbone(x[:1]), features[:1], rtol=1e-4, atol=1e-5)
    for size in ((24, 48), (72, 40)):
        dense = backbone(torch.randn(1, 3, *size))
        assert dense.shape[2:] == (size[0] // 8, size[1] // 8)
        assert torch.isfinite(dense).all()
    changed = x.clone()
    changed[:, :, 8:16, 24:32] += 3  # a bright patch changes most in its own cell
    change = (backbone(changed) - features).norm(dim=1)
    assert (change.flatten(1).argmax(1) == 1 * 4 + 3).all()


@pytest.mark.parametrize("make", [siglip, naflex])
def test_siglip_pools_a_single_patch_to_its_dense_feature(make, torchvision_operators):
    torch.manual_seed(0)
    model, _ = make()
    backbone = upfeat.load_text_backbone(model)
    x, options = torch.randn(1, 3, 8, 8), {"interpolate_pos_encoding": True}
    patch = x
    if make is naflex:  # a row of pixels after the other, colours together
        patch, one = x.permute(0, 2, 3, 1).flatten(1)[:, None], torch.ones(1, 1, dtype=torch.long)
        options = {"pixel_attention_mask": one, "spatial_shapes": one.expand(1, 2)}
    with torch.no_grad():
        pooled = model.vision_model(patch, **options).pooler_output
    torch.testing.assert_close(backbone(x)[:, :, 0, 0], pooled)


def test_clip_features_are_the_values_of_its_last_attention(torchvision_operators):
    torch.manual_seed(0)
    model, _ = clip()
    backbone = upfeat.load_text_backbone(model)
    x, last = torch.randn(1, 3, 32, 32), model.vision_model.encoder.layers[-1]
    kept = []
    handle = last.layer_norm1.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        model.vision_model(x)
        handle.remove()
        values = last.self_attn.out_proj(last.self_attn.v_proj(kept[0][:, 1:]))
        expected = model.visual_projection(model.vision_model.post_layernorm(values))
    torch.testing.assert_close(backbone(x).flatten(2).mT, expected)


def test_texts_are_unit_vectors_and_means_over_templates(backbone):
    plain = backbone.encode_text(["cat", "dog"])
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(2))
    one = backbone.encode_text(["cat"], ["{}", "{}"])
    torch.testing.assert_close(one, plain[:1])
    assert backbone.encode_text(["cat", "dog"], TEMPLATES).shape == plain.shape


@pytest.fixture
def folder(tmp_path, torchvision_operators):
    """A CLIP as transformers saves it, with a tokenizer that does not know its length."""
    torch.manual_seed(0)
    model, _ = clip()
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "cat": 2, "dog": 3, "[E]": 49}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[E]")
    processor = CLIPImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.1])
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_of_transformers_is_loaded_by_name(folder):
    backbone = upfeat.load_text_backbone(f"hf:{folder}")
    assert backbone.normalization == ((0.4, 0.5, 0.6), (0.3, 0.2, 0.1))
    texts = backbone.encode_text(["a cat", "a dog dog"])
    assert texts.shape == (2, 12)
    assert backbone.encode_text(["a dog " * 50]).shape == (1, 12)
    x = torch.randn(1, 3, 32, 40)
    assert upfeat.load(backbone)(x).shape == (1, 12, 32, 40)
    assert torch.equal(pickle.loads(pickle.dumps(backbone))(x), backbone(x))


def test_weights_of_half_precision_are_used_in_single(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: one.half() for name, one in weights.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    backbone = upfeat.load_text_backbone(f"hf:{folder}")
    assert next(backbone.parameters()).dtype == torch.float32


def test_texts_are_padded_as_siglip_was_trained(torchvision_operators):
    model, _ = siglip()
    asked = []

    def tokenizer(texts, **options):
        asked.append(options)
        return {"input_ids": letters(texts)}

    upfeat.load_text_backbone(model, tokenizer).encode_text(["a cat"])
    assert (asked[0]["padding"], asked[0]["max_length"]) == ("max_length", 12)


def test_a_tokenizer_without_words_is_refused(folder):
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        upfeat.load_text_backbone(f"hf:{folder}")
    backbone = upfeat.load_text_backbone(f"hf:{folder}", transformers_tokenizer)
    cat, dog = backbone.encode_text(["cat", "dog"])
    assert (cat - dog).abs().max() > 1e-3


def test_bad_models_and_texts_are_named(backbone):
    for prompts in ("a cat", []):
        with pytest.raises(ValueError, match="in a list"):
            backbone.encode_text(prompts)
    with pytest.raises(ValueError, match="place"):
        backbone.encode_text(["cat"], ["a photo"])
    with pytest.raises(ValueError, match="tokenizer="):
        upfeat.load_text_backbone(backbone.model).encode_text(["cat"])
    with pytest.raises(ValueError, match="no dense features"):
        upfeat.load_text_backbone(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="hf:ID"):
        upfeat.load_text_backbone("clip")
    lazy = upfeat.load(backbone).lazy(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"vectors \(K, "):
        lazy.similarity(torch.ones(2, 3))


def test_a_folder_that_is_not_there_is_one_line(tmp_path, torchvision_operators, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no such folder") as caught:
        upfeat.load_text_backbone(f"hf:{tmp_path / 'none'}")
    assert "\n" not in str(caught.value)
