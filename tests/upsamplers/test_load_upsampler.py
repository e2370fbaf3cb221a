"""Files of published upsamplers: recognised by their tensors, read without running anything."""

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from published_reference import published_state
from safetensors.torch import save_file

import upfeat
from upfeat.storage import read_tensors
from upfeat.upsamplers import write_checkpoint
from upfeat.upsamplers.tensor_files import file_digest

MAKE = {
    "anyup": lambda: upfeat.AnyUp(),
    "jafar": lambda: upfeat.JAFAR(10),
    "naf": lambda: upfeat.NAF(),
    "uplift": lambda: upfeat.UPLiFT(10),
}
CHECKPOINTS = Path(__file__).parents[2].parent / "shared" / "data" / "checkpoints"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Published layouts, at their size, with random values."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    found = {}
    for name, make in MAKE.items():
        upsampler = make().eval()
        path = folder / f"{name}.pth"
        torch.save(published_state(upsampler), path)
        found[name] = path, upsampler
    return found


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("wrapped", ["plain", "nested", "prefixed", "safetensors"])
def test_recognises_files_by_their_tensors(files, tmp_path, name, wrapped, caplog):
    path, upsampler = files[name]
    state = torch.load(path)
    target = tmp_path / "misleading_name.ckpt"
    if wrapped == "nested":
        torch.save({"epoch": 3, "jafar": state, "optimizer": {"lr": 1e-3}}, target)
    elif wrapped == "prefixed":
        state = {f"module.model.{key}": value for key, value in state.items()}
        torch.save({"state_dict": state, "step": torch.tensor(5)}, target)
    elif wrapped == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, target)
    else:
        target = path
    with caplog.at_level(logging.INFO, logger="upfeat"):
        found = upfeat.load_upsampler(target)
    assert type(found) is type(upsampler)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    for key, value in upsampler.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    assert type(upsampler).__name__ in found.origin
    assert found.origin in caplog.text
    assert file_digest(target) in found.origin


def test_counters_of_norms_are_left_out(files, tmp_path, caplog):
    path, upsampler = files["uplift"]
    counter = {"encoder.block_0.blocks.0.conv.1.num_batches_tracked": torch.tensor(5)}
    torch.save(torch.load(path) | counter, tmp_path / "counted.pth")
    with caplog.at_level(logging.INFO, logger="upfeat"):
        found = upfeat.load_upsampler(tmp_path / "counted.pth")
    assert set(found.state_dict()) == set(upsampler.state_dict())
    assert "left unread" not in caplog.text


@pytest.mark.parametrize("name", MAKE)
def test_a_hash_may_be_asked_for(files, name):
    path, _ = files[name]
    digest = file_digest(path)
    upfeat.load_upsampler(path, sha256=digest.upper())
    with pytest.raises(ValueError, match=f"its sha256 is {digest}, not 0000"):
        upfeat.load_upsampler(path, sha256="0" * 64)
    with pytest.raises(ValueError, match="sha256 is for checkpoint files"):
        upfeat.load_upsampler("detail", sha256=digest)


def test_saved_folders_keep_the_origin(files, tmp_path):
    upsampler = upfeat.load_upsampler(files["naf"][0])
    upsampler.save_pretrained(tmp_path / "naf")
    assert upfeat.load_upsampler(tmp_path / "naf").origin == upsampler.origin
    config = tmp_path / "naf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"origin": 3}))
    with pytest.raises(ValueError, match="origin=3 must be a text"):
        upfeat.load_upsampler(tmp_path / "naf")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_never_runs_code(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.load(files["naf"][0])
    torch.save(state | {"bomb": Bomb()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"image": Bomb()}))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(ValueError, match=r"(?s)^(?!.*\n).*holds more than tensors"):
            upfeat.load_upsampler(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content", [b"<html>404</html>", b"version https://git-lfs", b"\xff\xd8\xff\xe0"]
)
def test_what_was_not_downloaded_is_told_from_code(tmp_path, content):
    (tmp_path / "naf.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"naf\.pth: not a PyTorch checkpoint"):
        upfeat.load_upsampler(tmp_path / "naf.pth")


def test_damaged_files_in_one_line(files, tmp_path):
    path, _ = files["anyup"]
    state = torch.load(path)

    def refused(content, expected):
        target = tmp_path / "x.pth"
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            torch.save(content, target)
        with pytest.raises(ValueError, match=expected) as caught:
            upfeat.load_upsampler(target)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700

    refused(path.read_bytes()[:100_000], "not a whole")
    refused(b"", "not a whole")
    refused(b"plain text", "x.pth")
    refused(torch.zeros(3), "holds Tensor")
    refused({"a": 1}, "none of its 0 tensors")
    refused({"fc.weight": torch.zeros(3)}, "FeatUp, AnyUp, JAFAR, NAF, UPLiFT is known by")
    name = "image_encoder.0.weight"
    refused(state | {name: torch.full((128, 3, 1, 1), torch.nan)}, f"{name} holds NaN")
    refused(state | {name: torch.zeros(64, 3, 1, 1)}, r"is \(64, 3, 1, 1\), not \(128, 3, 1, 1\)")
    refused({key: value for key, value in state.items() if key != name}, f"{name} is missing")
    mixed = torch.load(files["jafar"][0])
    mixed["key_features_encoder.0.basis"] = state["key_features_encoder.0.basis"]
    refused(mixed, r"holds 2 upsamplers \(AnyUp, JAFAR\); save one")
    both = state | {"image_encoder.encoder.0.weight": torch.zeros(4)}
    refused(both, "it also holds image_encoder.encoder.0.weight; two checkpoints")
    naf = torch.load(files["naf"][0])
    key = next(key for key in naf if key.endswith("periods"))
    refused(naf | {key: 0 * naf[key]}, "periods holds 0; magnitudes from")
    uplift = torch.load(files["uplift"][0])
    refused(uplift | {"refiner.blocks.0.conv.0.weight": torch.zeros(3)}, "UPLiFT with a refiner")
    key = "encoder.block_0.blocks.0.conv.1.running_var"
    refused(uplift | {key: -uplift[key]}, r"encoder\.0\..*running_var holds -1, less than 0")
    refused({key: uplift[key] for key in list(uplift)[-2:]}, "UPLiFT as published: .* is missing")
    thin = {key: value[:1] for key, value in state.items()}
    refused(thin, "not AnyUp as published")
    whole = tmp_path / "y.safetensors"
    save_file({"a": torch.zeros(1000)}, whole)
    whole.write_bytes(whole.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        upfeat.load_upsampler(whole)
    with pytest.raises(FileNotFoundError, match="no such file"):
        upfeat.load_upsampler(tmp_path / "none.pth")


def test_names_without_weights():
    for name in MAKE:
        assert name not in upfeat.list_upsamplers()
        with pytest.raises(ValueError, match="has no weights in this package; give the file"):
            upfeat.load_upsampler(name)


def test_shipped_weights_suit_any_features():
    upsampler = upfeat.load_upsampler("detail")
    out = upsampler(torch.randn(1, 7, 4, 4), torch.randn(1, 3, 32, 32))
    assert out.shape == (1, 7, 32, 32)
    assert not out.requires_grad


@pytest.mark.parametrize("name", MAKE)
def test_converted_files(files, tmp_path, name):
    path, upsampler = files[name]
    target = tmp_path / "out.safetensors"
    facts = write_checkpoint(path, target)
    tensors, stored = read_tensors(target)
    assert stored == facts
    assert facts["source"] == path.name
    assert facts["source_sha256"] == file_digest(path)
    assert json.loads(facts["config"]) == upsampler.config()
    assert set(tensors) == set(upsampler.state_dict())
    again = upfeat.load_upsampler(target)
    assert type(again) is type(upsampler)
    assert "whose published weights are" in again.origin
    for key, value in upsampler.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    with pytest.raises(ValueError, match="is the file that is read"):
        write_checkpoint(target, target)
    assert write_checkpoint(target, tmp_path / "again.safetensors") == facts


def test_load_takes_a_file(files):
    path, _ = files["naf"]
    model = upfeat.load(upsampler=path)
    x = torch.randn(1, 3, 64, 96)
    assert model(x).shape == (1, 112, 64, 96)
    assert model.upsampler.name == "naf"
    with pytest.raises(ValueError, match="expects 10 channels"):
        upfeat.load(upsampler=files["jafar"][0])


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="no ../shared beside this checkout")
@pytest.mark.parametrize("path", sorted(CHECKPOINTS.glob("*.pth")), ids=lambda path: path.stem)
def test_published_files(path):
    upsampler = upfeat.load_upsampler(path)
    assert path.stem.startswith(upsampler.name)


def test_hub_entries(files, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    import hubconf

    image, features = torch.randn(1, 3, 36, 36), torch.randn(1, 12, 9, 9)
    module = hubconf.naf(checkpoint=str(files["naf"][0]), device="cpu")
    assert module(image, features, (36, 36)).shape == (1, 12, 36, 36)
    assert hubconf.anyup(checkpoint=str(files["anyup"][0]))(image, features).shape[2:] == (36, 36)
    assert hubconf.anyup_multi_backbone(checkpoint=str(files["anyup"][0])).upsampler.name == "anyup"
    assert hubconf.jafar(checkpoint=str(files["jafar"][0])).upsampler.name == "jafar"
    assert hubconf.uplift(checkpoint=str(files["uplift"][0])).upsampler.name == "uplift"
    with pytest.raises(ValueError, match="holds naf, not jafar"):
        hubconf.jafar(checkpoint=str(files["naf"][0]))
