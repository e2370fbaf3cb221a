"""Settings and files of implicit features from anywhere: right, or refused by name."""

import json
import math
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from hostile import fault
from implicit.test_features import make_features
from training.small import small_backbone

import upfeat
from upfeat.implicit.features import ImplicitFeatures
from upfeat.storage import read_tensors, write_tensors

HOSTILE = [
    *(True, "many", "64", b"1", [], {}, object(), math.nan, math.inf, -math.inf, -1, 10**30),
    *(1e300, 1j, np.True_, torch.ones(2)),
]


@pytest.mark.parametrize("name", [field.name for field in fields(upfeat.FitConfig)])
def test_hostile_values_of_every_setting(name):
    for value in HOSTILE:
        error = fault(upfeat.FitConfig, **{name: value})
        assert error is not None, value
        assert name in error
        assert "\n" not in error
        assert len(error) < 200


@pytest.mark.parametrize("preset", ["fast", "reference"])
@pytest.mark.parametrize(
    "few", [{"views": 1, "held_out": 2}, {"views": 1, "held_out": 1}, {"views": 2, "held_out": 1}]
)
def test_a_fit_to_too_little_is_refused(preset, few):
    """A single cell seen once has no variance: the features were NaN, or their error 1e11."""
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"anchors": 16, "steps": 2, "views_per_step": 1, "zoomed_views": 0, "size": 8}
    try:
        found = upfeat.fit_implicit(image, small_backbone(), preset=preset, **settings, **few)
    except ValueError as error:
        assert "larger size" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert torch.isfinite(found.render()).all()
        assert found.facts["held_out"] < 1e6


@pytest.mark.parametrize("fact", [float("nan"), object()])
def test_facts_that_no_file_holds_are_not_saved(tmp_path, fact):
    features = make_features()
    features.facts["loss"] = fact
    with pytest.raises(ValueError, match="facts must be values of JSON"):
        features.save(tmp_path / "f.safetensors")
    assert not list(tmp_path.iterdir())


def test_nan_is_not_saved(tmp_path):
    features = make_features()
    features.mean = features.mean * math.nan
    with pytest.raises(ValueError, match="mean holds NaN"):
        features.save(tmp_path / "f.safetensors")
    assert not list(tmp_path.iterdir())


def _nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = math.nan
    return tensor


KERNEL = {
    "field.anchor_places": (_nan, "anchor_places holds NaN"),
    "field.anchor_queries": (_nan, "anchor_queries holds NaN"),
    "field.coefficients": (lambda x: _nan(x * 0) * math.inf, "coefficients holds NaN or infinity"),
    "field.scales": (lambda x: x * 0, "scales=0.0 must be"),
    "field.guide.entry.weight": (_nan, "guide.entry.weight holds NaN"),
    "field.guide.entry.bias": (lambda x: x[:1], r"entry.bias is \(1,\), not"),
    "components": (_nan, "components holds NaN"),
    "mean": (lambda x: x.to(torch.int64), "mean holds torch.int64, not floating"),
    "guidance_png": (lambda x: x[:50], "guidance_png is no PNG"),
}
OTHERS = [
    ("field.coefficients", lambda x: x[:3], "anchors, which do not fit"),
    ("field.scales", lambda x: x[:, :2].contiguous(), "scales is"),
    ("components", lambda x: x[:1], r"components is \(1, 6\), not"),
    ("mean", lambda x: x[:5], r"mean is \(5,\), not \(6,\)"),
    ("guidance_png", lambda x: x.float(), "not the bytes of a file"),
]


@pytest.mark.parametrize(
    ("name", "change", "words"), [*((k, *v) for k, v in KERNEL.items()), *OTHERS]
)
def test_damaged_tensors(tmp_path, name, change, words):
    path = tmp_path / "f.safetensors"
    make_features().save(path)
    tensors, facts = read_tensors(path)
    write_tensors(path, {**tensors, name: change(tensors[name])}, facts)
    with pytest.raises(ValueError, match=words) as raised:
        ImplicitFeatures.load(path)
    assert str(raised.value).startswith(f"{path}: damaged: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "name", "content", "words"),
    [
        ("kernel", "image_size", "[1e9, 3]", "height=1000000000 must be"),
        ("kernel", "image_size", "[24]", "image_size is not"),
        ("kernel", "image_size", "[" * 9999, "image_size is not"),
        ("kernel", "image_size", "[24, 31]", "its image is"),
        ("kernel", "image_digest", "abc", "its image is not that of the fit"),
        ("kernel", "field", "module", "field 'module' is unknown"),
        ("kernel", "facts", "[]", "holds list"),
        ("kernel", "facts", '{"a": 1, "a": 2}', "given twice"),
        ("kernel", "facts", "{" * 9999, "facts: not JSON"),
        ("kernel", "grid_size", [10**9, 3], "grid_size=1000000000 must be"),
        ("kernel", "grid_size", [0, 3], "grid_size=0 must be"),
        ("kernel", "grid_size", 3, "do not fit together"),
        ("kernel", "nugget", 0, "nugget=0 must be"),
        ("kernel", "nugget", "1", "nugget='1' must be"),
        ("kernel", "guide", {"width": 10**9, "levels": 2}, "width=1000000000 must be"),
        ("kernel", "guide", {"width": 8, "levels": 10**6}, "levels=1000000 must be"),
        ("kernel", "guide", {"width": 1024, "levels": 16}, "do not fit its configuration"),
        ("kernel", "guide", {}, "width"),
        ("network", "hidden", 10**9, r"first.weight is .*, not \(1000000000, "),
        ("network", "frequencies", 10**8, "phases is"),
        ("network", "width", 10**9, "last.weight is"),
        ("network", "dropout", "x", "dropout='x' must be"),
        ("network", "dropout", 1.0, "dropout=1.0 must be"),
        ("network", "surplus", 1, "do not fit together"),
    ],
)
def test_hostile_metadata_is_refused_at_once(tmp_path, kind, name, content, words):
    path = tmp_path / "f.safetensors"
    make_features(kind).save(path)
    tensors, facts = read_tensors(path)
    if name in facts:
        facts[name] = content
    else:
        facts["field_facts"] = json.dumps({**json.loads(facts["field_facts"]), name: content})
    write_tensors(path, tensors, facts)
    before = time.process_time()
    with pytest.raises(ValueError, match=words) as raised:
        ImplicitFeatures.load(path)
    assert time.process_time() - before < 1
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_an_image_that_fills_the_memory_is_not_decoded(tmp_path):
    """The size that the file names is compared with the picture's before it is decoded."""
    import io

    from PIL import Image

    path = tmp_path / "f.safetensors"
    make_features().save(path)
    tensors, facts = read_tensors(path)
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, format="PNG")
    tensors["guidance_png"] = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    write_tensors(path, tensors, facts)
    with pytest.raises(ValueError, match=r"damaged: .*(20000×20000|no PNG)"):
        ImplicitFeatures.load(path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, "half"])
def test_renderings_are_floating(dtype):
    with pytest.raises(ValueError, match="dtype="):
        make_features().render(dtype=dtype)


def test_an_overflow_is_said():
    features = make_features()
    features.mean = features.mean + 1e5
    with pytest.raises(ValueError, match=r"overflows torch.float16"):
        features.render(dtype=torch.float16)
    assert torch.isfinite(features.render(dtype=torch.bfloat16)).all()


@pytest.mark.parametrize("preset", ["fast", "reference"])
def test_the_default_type_of_numbers_plays_no_part(preset, tmp_path):
    """As scientific code sets it: fits, files and maps stay in float32."""
    image = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
    settings = {"views": 2, "held_out": 2, "anchors": 16, "zoomed_views": 2, "steps": 2}
    weight = torch.ones(2, 3, dtype=torch.float32)
    maps = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            backbone = upfeat.load_backbone(lambda x: torch.nn.functional.avg_pool2d(x, 8))
            found = upfeat.fit_implicit(image, backbone, preset=preset, **settings)
            found.save(tmp_path / "f.safetensors")
            again = ImplicitFeatures.load(tmp_path / "f.safetensors")
            assert torch.equal(again.full(), found.full())
            maps.append((found.full(), found.project(weight)))
        finally:
            torch.set_default_dtype(torch.float32)
    for plain, other in zip(*maps, strict=True):
        assert plain.dtype == other.dtype == torch.float32
        if preset == "fast":  # which draws no weights
            torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)
