"""Heads come back from their files as they were; damage and other backbones are named."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import upfeat
from upfeat import WrappedBackbone
from upfeat.heads import SavedHead, describe_backbone, load_head, save_head
from upfeat.storage import read_tensors, write_tensors


def backbone(seed=0, channels=4, **options):
    torch.manual_seed(seed)
    network = torch.nn.Conv2d(3, channels, 8, 8)
    return WrappedBackbone(network, probe_size=16, name="cells", **options)


GOOD = SavedHead(
    torch.arange(8.0).view(2, 4),
    torch.tensor([0.5, -1]),
    ["a", "b"],
    "classes",
    describe_backbone(backbone()),
    "detail",
)


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.text(max_size=5), min_size=1, max_size=4),
    kind=st.sampled_from(["classes", "values"]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_a_head_comes_back(tmp_path_factory, names, kind, dtype):
    path = tmp_path_factory.getbasetemp() / "head.safetensors"
    weight, bias = torch.randn(len(names), 4, dtype=dtype), torch.randn(len(names), dtype=dtype)
    head = dataclasses.replace(GOOD, weight=weight, bias=bias, names=names, kind=kind)
    save_head(path, head)
    found = load_head(path)
    assert (found.names, found.kind, found.backbone) == (names, kind, GOOD.backbone)
    assert torch.equal(found.weight, weight.float())
    assert torch.equal(found.bias, bias.float())


def damaged(tmp_path, tensors=None, **facts):
    """A good head's file with other tensors and facts; ``None`` leaves one out."""
    path = tmp_path / "head.safetensors"
    save_head(path, GOOD)
    good, metadata = read_tensors(path)
    kept = {name: one for name, one in (good | (tensors or {})).items() if one is not None}
    write_tensors(path, kept, {k: v for k, v in (metadata | facts).items() if v is not None})
    return path


@pytest.mark.parametrize("name", ["kind", "names", "backbone", "upsampler"])
def test_a_fact_that_is_missing_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=rf"head\.safetensors: a damaged head .*{name}"):
        load_head(damaged(tmp_path, **{name: None}))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"format": None}, "not a head; upfeat probe trains one"),
        ({"format": "upfeat-head-2"}, "not a head; upfeat probe trains one"),
        ({"kind": "logits"}, "kind='logits' must be classes or values"),
        ({"names": "a, b"}, "a damaged head"),
        ({"names": "3"}, "its names are no list of texts"),
        ({"names": '["a", 2]'}, "its names are no list of texts"),
        ({"names": "[" * 100_000}, "a damaged head"),
        ({"names": '["a"]'}, r"weight \(2, 4\), bias \(2,\), 1 names"),
        ({"backbone": "[]"}, "backbone: holds list, not an object"),
        ({"backbone": '{"name": NaN}'}, "NaN is no number of JSON"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_fact_that_is_damaged_is_named(tmp_path, facts, words):
    with pytest.raises(ValueError, match=words) as refused:
        load_head(damaged(tmp_path, **facts))
    assert str(refused.value).startswith(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": None}, "a damaged head .*weight"),
        ({"bias": None}, "a damaged head .*bias"),
        ({"weight": torch.ones(2, 4, 1)}, r"weight \(2, 4, 1\)"),
        ({"weight": torch.ones(3, 4)}, r"weight \(3, 4\), bias \(2,\)"),
        ({"weight": torch.ones(2, 4, dtype=torch.int32)}, "a damaged head"),
        ({"bias": torch.ones(2, dtype=torch.bool)}, "a damaged head"),
        ({"bias": torch.tensor([0, torch.inf])}, "holds NaN or infinity"),
        ({"weight": torch.full((2, 4), 1e39, dtype=torch.float64)}, "holds NaN or infinity"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_tensors_that_are_no_head_are_refused(tmp_path, tensors, words):
    with pytest.raises(ValueError, match=words) as refused:
        load_head(damaged(tmp_path, tensors))
    assert str(refused.value).startswith(str(tmp_path))


def test_a_head_of_nothing_is_damaged(tmp_path):
    nothing = {"weight": torch.ones(0, 4), "bias": torch.ones(0)}
    with pytest.raises(ValueError, match=r"weight \(0, 4\), bias \(0,\), 0 names"):
        load_head(damaged(tmp_path, nothing, names="[]"))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (backbone(seed=1), "was trained on cells with another weights"),
        (backbone(mean=(0, 0, 0)), "was trained on cells with another normalization"),
        (WrappedBackbone(torch.nn.Conv2d(3, 4, 8, 8), probe_size=16), "on features of cells, not"),
    ],
    ids=["weights", "normalization", "name"],
)
def test_features_of_another_backbone_are_refused(other, words):
    GOOD.check_backbone(backbone(), "head")
    with pytest.raises(ValueError, match=words):
        GOOD.check_backbone(other, "head")


def test_a_weight_of_other_channels_than_it_says_is_refused(tmp_path):
    head = load_head(damaged(tmp_path, {"weight": torch.ones(2, 5)}))
    with pytest.raises(ValueError, match="its weight is of 5 channels, and cells has 4"):
        head.check_backbone(backbone(), "head")


def test_what_is_kept_of_a_backbone_are_texts():
    told = json.loads(json.dumps(describe_backbone(backbone())))
    assert told == describe_backbone(backbone())
    assert all(isinstance(value, str) for value in told.values())


@pytest.mark.parametrize("options", [{"passes": 2}, {"passes": 5}, {"passes": 8}, {"early": True}])
def test_heads_fit_features_of_several_passes(options):
    """They estimate the same features, so what was learnt on one pass serves."""
    plain = upfeat.load_backbone(torch.nn.Conv2d(3, 4, 8, 8), name="own")
    model = upfeat.load(plain, **options)
    head = SavedHead(
        torch.ones(2, 4), torch.zeros(2), ["a", "b"], "classes", describe_backbone(plain), "detail"
    )
    head.check_backbone(model.backbone, "head")
    assert describe_backbone(model.backbone.origin) == describe_backbone(plain)
    other = upfeat.load_backbone(torch.nn.Conv2d(3, 4, 8, 8), name="own")
    with pytest.raises(ValueError, match="another weights"):
        head.check_backbone(upfeat.load(other, **options).backbone, "head")


@pytest.mark.parametrize(
    "change",
    [{"names": ["one"]}, {"kind": "depth"}, {"weight": torch.full((2, 3), torch.nan)}],
)
def test_a_head_that_could_not_be_read_is_not_written(tmp_path, change):
    head = SavedHead(torch.zeros(2, 3), torch.zeros(2), ["a", "b"], "classes", {}, "bilinear")
    with pytest.raises(ValueError, match=r"head\.safetensors: not written: "):
        save_head(tmp_path / "head.safetensors", dataclasses.replace(head, **change))
    assert not list(tmp_path.iterdir())


def test_heads_of_any_type_have_an_identity_and_arrays_are_refused(tmp_path):
    head = SavedHead(torch.ones(2, 3), torch.zeros(2), ["a", "b"], "classes", {}, "bilinear")
    half = dataclasses.replace(head, weight=head.weight.bfloat16().requires_grad_())
    assert half.identity() == head.identity()
    with pytest.raises(TypeError, match="weight is of type ndarray; give a tensor"):
        save_head(tmp_path / "h.safetensors", dataclasses.replace(head, weight=head.weight.numpy()))
