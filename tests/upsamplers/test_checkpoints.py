"""Reading and writing upsamplers: published checkpoints, safetensors, hostile and broken files."""

import hashlib
import json
import logging
import pickle
import sys
import types
import zipfile
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from jbu_reference import published_state, reference, relative_error
from torch import nn

import upfeat
from upfeat.upsamplers.checkpoints import write_checkpoint

PUBLISHED = sorted(
    (Path(__file__).parents[2].parent / "shared" / "data" / "checkpoints").glob("*.ckpt")
)


def save(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("nested", [True, False])
def test_reads_the_published_layout(tmp_path, nested, caplog):
    state = published_state() | {"downsampler.w": torch.ones(2, 2)}
    content = {"state_dict": state, "epoch": 1} if nested else state
    with caplog.at_level(logging.INFO, logger="upfeat"):
        stack = upfeat.JBUStack.from_featup(save(tmp_path / "x.ckpt", content))
    assert "downsampler.w" in caplog.text
    assert not stack.training
    assert stack.embed_dim == 6
    torch.testing.assert_close(
        stack.stages[2].fixup_proj[3].weight, state["upsampler.up3.fixup_proj.3.weight"]
    )
    features, guidance = torch.randn(2, 6, 3, 2), torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        out = stack(features, guidance)
    assert relative_error(out, reference(stack, features, guidance, (48, 32))) < 1e-5


@pytest.mark.skipif(not PUBLISHED, reason="no published checkpoint lies beside this checkout")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_reads_published_files(path):
    stack = upfeat.JBUStack.from_featup(path)
    raw = torch.load(path, weights_only=True, map_location="cpu")
    raw = raw.get("state_dict", raw)
    assert torch.equal(stack.channel_mix.weight, raw["upsampler.fixup_proj.1.weight"])
    assert torch.equal(stack.stages[3].range_temperature, raw["upsampler.up4.range_temp"])
    features, guidance = torch.randn(1, stack.embed_dim, 3, 4), torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        out = stack(features, guidance)
    assert relative_error(out, reference(stack, features, guidance, (48, 64))) < 1e-5


class Exploit:
    """What a malicious pickle would hold."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran its code')",))


def test_faulty_checkpoints_are_one_clear_line(tmp_path):
    missing = published_state()
    del missing["upsampler.up2.range_temp"], missing["upsampler.fixup_proj.1.bias"]
    wrong = published_state() | {"upsampler.up1.range_proj.0.bias": torch.ones(31)}
    whole = save(tmp_path / "whole.ckpt", published_state()).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "code.ckpt").write_bytes(pickle.dumps({"state_dict": Exploit()}))
    save(tmp_path / "zipped_code.ckpt", {"state_dict": Exploit()})
    cases = {
        save(tmp_path / "missing.ckpt", missing): "upsampler.up2.range_temp",
        save(tmp_path / "wrong.ckpt", wrong): r"range_proj.0.bias is \(31,\)",
        save(tmp_path / "list.ckpt", [1, 2]): "holds list",
        tmp_path / "cut.ckpt": "not a whole",
        tmp_path / "text.ckpt": "text",
        tmp_path / "empty.ckpt": "not a whole",
        tmp_path / "code.ckpt": "code",
        tmp_path / "zipped_code.ckpt": "it could run code",
    }
    for path, words in cases.items():
        with pytest.raises(ValueError, match=words) as caught:
            upfeat.JBUStack.from_featup(path)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nothing.ckpt"):  # noqa: RUF043
        upfeat.JBUStack.from_featup(tmp_path / "nothing.ckpt")


def of_no_memory(state, change):
    return {name: change(value) for name, value in state.items()}


def wide(channels):
    """The mix of many channels, in a file of a few bytes."""
    return {
        "upsampler.fixup_proj.1.bias": torch.zeros(1).expand(channels),
        "upsampler.fixup_proj.1.weight": torch.zeros(1, 1, 1, 1).expand(channels, channels, 1, 1),
    }


def cyclic(state):
    content = {"own": state["upsampler.up1.range_temp"]}
    content["itself"] = content
    return content


def as_naf(state):
    """A state in which NAF is recognised too."""
    return state | {"image_encoder.sem_encoder.0.weight": torch.ones(1)}


HOSTILE = [
    (lambda state: of_no_memory(state, lambda value: value.to("meta")), "meta device"),
    (lambda state: of_no_memory(state, torch.Tensor.to_sparse), "not dense"),
    (
        lambda state: of_no_memory(state, lambda value: value.to(torch.float8_e4m3fn)),
        r"torch\.float8_e4m3fn, not floating point of 16 to 64 bits",
    ),
    (lambda state: state | wide(1_000_000), "repeats its values by strides"),
    (cyclic, "none of its 1 tensors"),
    (as_naf, r"2 upsamplers \(FeatUp, NAF\)"),
    (lambda state: {"model": state, "average": dict(state)}, r"2 upsamplers \(FeatUp, FeatUp\)"),
]


@pytest.mark.parametrize(("change", "words"), HOSTILE)
def test_hostile_and_ambiguous_checkpoints_are_one_clear_line(tmp_path, change, words):
    path = save(tmp_path / "x.ckpt", change(published_state()))
    with pytest.raises(ValueError, match=words) as caught:
        upfeat.load_upsampler(path)
    assert "\n" not in str(caught.value)


def test_an_archive_that_unpacks_to_much_more_is_not_read(tmp_path):
    plain, packed = (
        save(tmp_path / "plain.ckpt", {"x": torch.zeros(1_000_000)}),
        tmp_path / "x.ckpt",
    )
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as to:
        for part in source.infolist():
            to.writestr(part.filename, source.read(part))
    with pytest.raises(ValueError, match=r"unpacks to 4,0.* bytes from "):
        upfeat.load_upsampler(packed)


@pytest.mark.parametrize("sums", [True, False])
def test_bytes_that_changed_on_the_way_are_noticed_by_checksums(tmp_path, sums):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(sums)
    try:
        path = save(tmp_path / "x.ckpt", {"x": torch.full((100,), 7.0)})
    finally:
        torch.serialization.set_crc32_options(before)
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor(7.0).numpy().tobytes()) + 41] ^= 4
    path.write_bytes(content)
    words = "damaged: the checksum of its part" if sums else "none of its 1 tensors"
    with pytest.raises(ValueError, match=words):
        upfeat.load_upsampler(path)


def test_every_way_of_loading_a_stack_normalises_the_image_alike(tmp_path):
    """A backbone of another normalisation shows the difference: the stack sees another image."""
    path = save(tmp_path / "x.ckpt", published_state())
    expected = upfeat.JBUStack.from_featup(path)
    write_checkpoint(path, tmp_path / "x.safetensors")
    backbone = upfeat.load_backbone(
        nn.Conv2d(3, 6, 16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    x = torch.randn(1, 3, 32, 48)
    reference = upfeat.load(backbone, upsampler=expected)(x)
    for source in (path, tmp_path / "x.safetensors"):
        found = upfeat.load_upsampler(source)
        assert (found.mean, found.std) == (expected.mean, expected.std)
        assert torch.equal(upfeat.load(backbone, upsampler=str(source))(x), reference)


def test_loading_a_checkpoint_leaves_the_random_state(tmp_path):
    path = save(tmp_path / "x.ckpt", published_state())
    before = torch.get_rng_state()
    upfeat.load_upsampler(path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sha256", ["", "abc", "z" * 64, "0" * 65, 5])
def test_hashes_that_are_none_are_refused(tmp_path, sha256):
    path = save(tmp_path / "x.ckpt", published_state())
    with pytest.raises(ValueError, match="must be 64 hexadecimal digits"):
        upfeat.load_upsampler(path, sha256=sha256)


def test_hashes_are_taken_as_tools_print_them(tmp_path):
    path = save(tmp_path / "x.ckpt", published_state())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    upfeat.load_upsampler(path, sha256=f" {digest.upper()}\n")


@pytest.mark.parametrize(
    "upsampler",
    [upfeat.JBUStack(5), upfeat.JBUStack(radius=2, n_stages=3), upfeat.JointBilateral(radius=1)],
    ids=["jbu", "universal", "classical"],
)
def test_saved_and_loaded_is_the_same(upsampler, tmp_path):
    upsampler.eval().save_pretrained(tmp_path / "new" / "folder")
    again = type(upsampler).from_pretrained(tmp_path / "new" / "folder")
    assert not again.training
    inputs = torch.randn(1, 5, 2, 3), torch.randn(1, 3, 32, 40)
    assert torch.equal(upsampler(*inputs), again(*inputs))
    loaded = upfeat.load("efficientnet_lite0", upsampler=upfeat.JointBilateral())
    assert loaded.upsampler.name == "joint_bilateral"


def test_faulty_saved_folders_are_one_clear_line(tmp_path):
    from safetensors.torch import load_file, save_file

    upfeat.JBUStack(4).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    state, settings = load_file(weights), json.loads(config.read_text())

    def fails(words, error=ValueError):
        with pytest.raises(error, match=words) as caught:
            upfeat.JBUStack.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)

    save_file({k: v for k, v in state.items() if k != "channel_mix.bias"}, weights)
    fails("missing channel_mix.bias")
    save_file(state | {"surplus": torch.ones(1)}, weights)
    fails("extra surplus")
    save_file(state | {"channel_mix.bias": torch.ones(3)}, weights)
    fails(r"channel_mix.bias is \(3,\), not \(4,\)")
    weights.write_bytes(weights.read_bytes()[:100])
    fails("not a whole safetensors file")
    weights.unlink()
    fails("no such file", FileNotFoundError)
    config.write_text(json.dumps(settings | {"upsampler": "jbu_stak"}))
    fails("did you mean jbu_stack")
    config.write_text(json.dumps(settings | {"colour": 1}))
    fails("colour")
    config.write_text("{")
    fails("not JSON")
    upfeat.Bilinear().save_pretrained(tmp_path)
    fails("holds a Bilinear")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        upfeat.JBUStack.from_pretrained(tmp_path / "nowhere")


def test_hub_names_are_fetched(tmp_path, monkeypatch):
    upfeat.JointBilateral(radius=3).save_pretrained(tmp_path)
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: str(tmp_path)
    hub.errors = types.ModuleType("huggingface_hub.errors")
    hub.errors.HfHubHTTPError = hub.errors.HFValidationError = RuntimeError
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", hub.errors)
    assert upfeat.JointBilateral.from_pretrained("owner/name").radius == 3


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The entries of torch.hub, in a folder of its own, out of reach of any network."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    import hubconf

    def unreachable(url, *_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return hubconf


def test_hub_entries_of_featup(hub, tmp_path):
    names = {"dino16": 384, "dinov2": 384, "vit": 384, "clip": 512, "maskclip": 512}
    for name, channels in names.items():
        stack = getattr(hub, name)(pretrained=False)
        assert isinstance(stack, upfeat.JBUStack)
        assert stack.embed_dim == channels
    path = save(tmp_path / "own.ckpt", {"state_dict": published_state(384)})
    stack = hub.dino16(checkpoint=str(path))
    image, features = torch.randn(1, 3, 32, 48), torch.randn(1, 384, 2, 3)
    assert stack(features, image).shape == (1, 384, 32, 48)
    model = hub.dino16(checkpoint=str(path), backbone=nn.Conv2d(3, 384, 16, 16))
    assert relative_error(model(image), stack(model.backbone(image), image)) < 1e-5
    with pytest.raises(ValueError, match="is for 384 channels; clip has 512"):
        hub.clip(checkpoint=str(path))


def test_hub_entries_say_what_to_download_and_where_to_put_it(hub, tmp_path):
    with pytest.raises(FileNotFoundError) as refused:
        hub.maskclip(use_norm=False)
    line = str(refused.value)
    assert "no_norm/maskclip_jbu_stack_cocostuff.ckpt and put it at" in line
    where = line.partition("put it at ")[2].partition(", or give")[0]
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    save(Path(where), published_state(512))
    assert hub.maskclip(use_norm=False).embed_dim == 512
