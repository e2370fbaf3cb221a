"""``upfeat run`` and ``upfeat info`` as a user meets them."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import odd_images
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import upfeat
from upfeat.cli import main
from upfeat.heads import SavedHead, describe_backbone, save_head
from upfeat.run import check_memory, plan_outputs

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "small.jpg"
    Image.open(PHOTOS / "cat.jpg").resize((90, 61)).save(path)
    return path


def test_writes_features_and_picture(photo, tmp_path, capsys):
    assert main(["run", str(photo), "-o", str(tmp_path / "new" / "out")]) == 0
    out = tmp_path / "new" / "out"
    assert sorted(p.name for p in out.iterdir()) == ["small.features.png", "small.safetensors"]
    assert str(out / "small.features.png") in capsys.readouterr().out
    with safe_open(out / "small.safetensors", framework="pt") as file:
        features, facts = file.get_tensor("features"), file.metadata()
    assert features.dtype == torch.float16
    assert features.shape == (112, 61, 90)
    assert facts["backbone"] == "efficientnet_lite0"
    assert facts["upsampler"] == upfeat.load().upsampler.name
    assert facts["upfeat_version"] == upfeat.__version__
    assert (facts["image_size"], facts["grid_size"]) == ("61x90", "4x6")
    model = upfeat.load()
    expected = model(model.preprocess(photo))[0]
    torch.testing.assert_close(features.float(), expected, rtol=2e-3, atol=2e-3)


def test_options(photo, tmp_path):
    arguments = ["--upsampler", "bilinear", "--backbone", "efficientnet_lite0.stride8"]
    arguments += ["--size", "40", "--dtype", "fp32", "--device", "cpu", "--no-picture"]
    assert main(["run", str(photo), "-o", str(tmp_path / "out"), *arguments]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["small.safetensors"]
    with safe_open(tmp_path / "out" / "small.safetensors", framework="pt") as file:
        assert file.get_tensor("features").shape == (40, 40, 59)
        assert file.get_tensor("features").dtype == torch.float32


def test_a_head_in_place_of_the_features(photo, tmp_path, capsys):
    model = upfeat.load()
    weight = torch.randn(3, 112, generator=torch.Generator().manual_seed(0))
    made_by, path = describe_backbone(model.backbone), tmp_path / "head.safetensors"
    head = SavedHead(weight, torch.ones(3), ["a", "b", "c"], "classes", made_by, "detail")
    save_head(path, head)
    arguments = ["run", str(photo), "-o", str(tmp_path / "out"), "--head", str(path)]
    assert main([*arguments, "--dtype", "fp32"]) == 0
    assert "3×61×90" in capsys.readouterr().out
    with safe_open(tmp_path / "out" / "small.safetensors", framework="pt") as file:
        said, facts = file.get_tensor("features").clone(), file.metadata()
    expected = model.lazy(model.preprocess(photo)).project(weight, torch.ones(3))[0]
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert (facts["head"], facts["names"]) == ("classes", '["a", "b", "c"]')
    with Image.open(tmp_path / "out" / "small.features.png") as picture:
        assert picture.width > 3 * 90

    assert main([*arguments, "--dtype", "fp32"]) == 0  # done already
    assert "3×61×90" not in capsys.readouterr().out
    save_head(path, dataclasses.replace(head, bias=torch.zeros(3), kind="values"))
    assert main([*arguments, "--dtype", "bf16"]) == 0
    assert "3×61×90" in capsys.readouterr().out
    assert main([*arguments, "--backbone", "efficientnet_lite0.stride8"]) == 2
    assert "was trained on features of" in capsys.readouterr().err


def test_bands_and_the_value_of_white(tmp_path, capsys):
    """As the Python door takes them; results of other ones are not taken for these."""
    values = np.random.default_rng(0).integers(0, 3000, (40, 48, 3), dtype=np.uint16)
    photo = tmp_path / "scene.png"
    photo.write_bytes(odd_images.png(values, colour=2, depth=16))
    arguments = ["run", str(photo), "-o", str(tmp_path), "--upsampler", "bilinear"]
    arguments += ["--dtype", "fp32", "--no-picture"]
    assert main([*arguments, "--bands", "2,1,0", "--max-value", "3000"]) == 0
    model = upfeat.load(upsampler="bilinear")
    with torch.inference_mode():
        expected = model(model.preprocess(photo, bands=(2, 1, 0), max_value=3000))[0]
    with safe_open(tmp_path / "scene.safetensors", framework="pt") as file:
        found = file.get_tensor("features").clone()  # mapped files cannot be replaced on Windows
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert main([*arguments, "--bands", "2,1,0", "--max-value", "3000"]) == 0
    assert "done before" in capsys.readouterr().out
    assert main([*arguments, "--max-value", "3000"]) == 0
    assert "done before" not in capsys.readouterr().out
    assert main([*arguments, "--bands", "2,1,7", "--max-value", "3000"]) == 2
    assert "7" in capsys.readouterr().err


def test_five_passes(photo, tmp_path):
    arguments = ["--passes", "5", "--dtype", "fp32", "--no-picture"]
    assert main(["run", str(photo), "-o", str(tmp_path), *arguments]) == 0
    with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        features, facts = file.get_tensor("features"), file.metadata()
    model = upfeat.load(passes=5)
    torch.testing.assert_close(features, model(model.preprocess(photo))[0], rtol=1e-4, atol=1e-4)
    assert (facts["backbone"], facts["grid_size"]) == ("efficientnet_lite0.passes5", "16x24")


def test_saved_upsampler_by_folder(photo, tmp_path):
    upfeat.JBUStack(112).save_pretrained(tmp_path / "stack")
    arguments = ["--upsampler", str(tmp_path / "stack"), "--no-picture"]
    assert main(["run", str(photo), "-o", str(tmp_path / "out"), *arguments]) == 0


def test_a_bad_photograph_does_not_stop_the_others(photo, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("text")
    paths = [tmp_path / "text.jpg", photo, tmp_path / "none.jpg"]
    assert main(["run", *map(str, paths), "-o", str(tmp_path / "out")]) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "small.features.png",
        "small.safetensors",
    ]
    errors = capsys.readouterr().err.strip().splitlines()
    assert "text.jpg: not an image" in errors[-3]
    assert "none.jpg: no such file" in errors[-2]
    assert "2 of 3" in errors[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backbone", "efficientnet"], "did you mean efficientnet_lite0"),
        (["--upsampler", "bilinaer"], "did you mean bilinear"),
        (["--upsampler", "no/where"], "no such folder"),
        (["--upsampler", "none.ckpt"], "no such file"),
        (["--device", "gpu"], "device"),
        (["--size", "3"], "size=3"),
    ],
)
def test_bad_options_are_one_line(photo, tmp_path, capsys, arguments, words):
    assert main(["run", str(photo), "-o", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""


def test_bad_usage_is_one_line(capsys):
    for arguments in ([], ["nonsense"], ["run"], ["run", "x.jpg", "-o", "y", "--dtype", "int8"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_unwritable_folder(photo, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", str(photo), "-o", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert main(["run", str(photo), "-o", str(tmp_path / "locked")]) == 2


def test_too_large_for_memory(photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("upfeat.machine.available_memory", lambda device=None: 100_000)
    assert main(["run", str(photo), "-o", str(tmp_path / "out")]) == 2
    assert "give a smaller size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_map_of_a_head_counts_against_the_bound(photo, held):
    model, bound = upfeat.load(), held + 2 * 10**9
    check_memory(model, photo, None, bound)
    with pytest.raises(
        ValueError, match=r"give a smaller size, at most about \d+, or max_memory of"
    ):
        check_memory(model, photo, None, bound, held=10**6)


@pytest.mark.parametrize("unit", [1e6, 1e-7])
def test_features_that_half_precision_cannot_hold(photo, tmp_path, capsys, monkeypatch, unit):
    backbone = upfeat.backbones.EfficientNetLite0
    extract = backbone.extract_with_hidden

    def large(self, x):
        features, hidden = extract(self, x)
        return features * unit, hidden

    monkeypatch.setattr(backbone, "extract_with_hidden", large)
    assert main(["run", str(photo), "-o", str(tmp_path / "out")]) == 2
    assert "bf16 or fp32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["run", str(photo), "-o", str(tmp_path / "out"), "--dtype", "bf16"]) == 0


def test_equal_names_are_numbered(tmp_path):
    photos = [tmp_path / "a" / "x.jpg", tmp_path / "b" / "X.jpg", tmp_path / "a" / "x.jpg"]
    plan = plan_outputs(photos, tmp_path / "out")
    assert [outputs.features.name for _, outputs in plan] == ["x.safetensors", "X-2.safetensors"]


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in (upfeat.__version__, torch.__version__, "eager", "efficientnet_lite0", "jbu_stack"):
        assert word in shown


@pytest.mark.slow
def test_installed_command():
    command = shutil.which("upfeat", path=str(Path(sys.executable).parent))
    assert command, "the package is not installed with its command"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"upfeat {upfeat.__version__}"


def test_any_backbone_and_its_layers(photo, tmp_path, capsys):
    code = "from torch import nn\n\n\ndef make():\n    return nn.Conv2d(3, 8, 16, 16)\n"
    (tmp_path / "mine.py").write_text(code)
    out = tmp_path / "out"
    options = ["--backbone", f"{tmp_path / 'mine.py'}:make", "--upsampler", "bilinear"]
    assert main(["run", str(photo), *options, "-o", str(out)]) == 0
    with safe_open(out / "small.safetensors", framework="pt") as file:
        assert file.metadata()["backbone"] == options[1]
    for wrong, words in (
        (["--layer", "8"], "levels are named as efficientnet_lite0.stride8"),
        (["--backbone", "hf:none/of-it/here"], "hf:none/of-it/here"),
        (["--backbone", "tim:resnet18"], "did you mean timm"),
    ):
        assert main(["run", str(photo), *wrong, "-o", str(tmp_path / "none")]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert words in error[-1]


@pytest.mark.parametrize("bands", [1, 2])
def test_backbones_of_other_bands(bands, tmp_path, capsys):
    """The picture shows the first band in grey; what trains on photographs in RGB is refused."""
    code = f"import torch\ndef make(): return torch.nn.Conv2d({bands}, 4, 8, 8)\n"
    (tmp_path / "mine.py").write_text(code + "def none(): return 3\n")
    photo, made = tmp_path / "photo.png", ["--backbone", f"{tmp_path}/mine.py:make"]
    Image.new("L" if bands == 1 else "LA", (24, 16), 100 if bands == 1 else (100, 200)).save(photo)
    some = [] if bands == 1 else ["--bands", "0,0"]
    assert main(["run", str(photo), "-o", str(tmp_path / "out"), *made, *some]) == 0
    with Image.open(tmp_path / "out" / "photo.features.png") as picture:
        assert picture.mode == "RGB"
    assert main(["fit", str(photo), "-o", f"{tmp_path}/f.safetensors", *made]) == 2
    assert f"takes images of {bands} bands, and a fit uses" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"takes images of {bands} bands, and training uses"):
        upfeat.train(made[1], tmp_path, upfeat.TrainConfig(steps=1))
    with pytest.raises(ValueError, match=r"mine.py:none: TypeError: it returns 3; return"):
        upfeat.load_backbone(f"{tmp_path}/mine.py:none")
