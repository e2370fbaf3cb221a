"""Files of implicit features field by field: each is needed, checked, and refused by name."""

import json

import pytest
import torch
from implicit.test_features import make_features

from upfeat.implicit.features import ImplicitFeatures
from upfeat.implicit.stored import FORMAT, decode, encode
from upfeat.storage import read_tensors, write_tensors

KINDS = ("kernel", "network", "grid")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "f.safetensors"


def stored(path, kind):
    make_features(kind).save(path)
    return read_tensors(path)


def refused(path, tensors, facts):
    """The one line that a file is refused with."""
    write_tensors(path, tensors, facts)
    with pytest.raises(ValueError, match=r"f\.safetensors: ") as raised:
        ImplicitFeatures.load(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_says_what_it_is(path, kind):
    tensors, facts = stored(path, kind)
    assert facts["format"] == FORMAT == "upfeat-implicit-2"
    assert facts["field"] == kind
    assert json.loads(facts["image_size"]) == [24, 40]
    assert tensors["components"].shape == (4, 6)
    before = path.read_bytes()
    ImplicitFeatures.load(path).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_needed(path, kind):
    tensors, facts = stored(path, kind)
    for name in tensors:
        rest = {key: one for key, one in tensors.items() if key != name}
        line = refused(path, rest, facts)
        part = name.removeprefix("field.").removeprefix("guide.").removeprefix("step.")
        assert part in line or (name == "guidance_png" and "give it as image=" in line)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_of_its_shape_and_type(path, kind):
    tensors, facts = stored(path, kind)
    for name, one in tensors.items():
        longer = torch.cat([one, one[-1:]]) if one.dim() else one.repeat(2)
        changes = [one[None].clone(), one.to(torch.int64), longer]
        if name == "guidance_png":
            changes.pop()  # readers of PNG stop where the image ends
        for changed in changes:
            refused(path, {**tensors, name: changed}, facts)


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_is_nan(path, kind):
    tensors, facts = stored(path, kind)
    for name, one in tensors.items():
        if one.is_floating_point():
            for value in (torch.nan, torch.inf):
                spoilt = one.clone()
                spoilt.view(-1)[0] = value
                assert name.rpartition(".")[2] in refused(path, {**tensors, name: spoilt}, facts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [None, "", "[", "3", "[1, 2, 3]", '{"a": 1}', "nonsense"])
def test_every_fact_is_needed_and_checked(path, kind, value):
    tensors, facts = stored(path, kind)
    for name in facts.keys() - {"upfeat_version"}:
        if name == "facts" and value == '{"a": 1}':
            continue  # provenance may be any names and values
        rest = {key: one for key, one in facts.items() if key != name}
        if value is not None:
            rest[name] = value
        refused(path, tensors, rest)


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_of_a_field_is_needed(path, kind):
    tensors, facts = stored(path, kind)
    settings = json.loads(facts["field_facts"])
    for name in settings:
        for value in (None, -1, "x", [], {}):
            rest = {key: one for key, one in settings.items() if key != name}
            if value is not None:
                rest[name] = value
            refused(path, tensors, {**facts, "field_facts": json.dumps(rest)})


@pytest.mark.parametrize("version", ["upfeat-implicit-1", "upfeat-implicit-3", "upfeat-features"])
def test_other_versions_are_named(path, version):
    tensors, facts = stored(path, "kernel")
    line = refused(path, tensors, {**facts, "format": version})
    assert f"not implicit features of this version ({version}, not {FORMAT})" in line
    assert "upfeat fit" in line


def test_tensors_that_nobody_asked_for_are_no_part_of_a_field(path):
    tensors, facts = stored(path, "kernel")
    write_tensors(path, {**tensors, "surplus": torch.zeros(1)}, facts)
    assert ImplicitFeatures.load(path).shape == (1, 6, 24, 40)
    refused(path, {**tensors, "field.guide.surplus": torch.zeros(1)}, facts)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (37, 5)])
def test_images_are_kept_to_the_bit(size):
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    encoded = encode(image)
    assert torch.equal(decode(encoded, size), image)
    with pytest.raises(ValueError, match=f"its image is {size[0]}×{size[1]}, not"):
        decode(encoded, (size[0], size[1] + 1))
    for cut in (0, 8, 40, len(encoded) // 2):
        with pytest.raises(ValueError, match="guidance_png is no PNG file"):
            decode(encoded[:cut], size)


def test_files_of_other_pictures_are_no_guidance():
    """What the file holds is told by its bytes: only PNG, which our own files are."""
    import io

    from PIL import Image

    for kind in ("JPEG", "GIF", "TIFF"):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4)).save(buffer, format=kind)
        encoded = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        with pytest.raises(ValueError, match="no PNG"):
            decode(encoded, (4, 4))
