"""``upfeat fit`` and ``upfeat render`` as a user meets them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import upfeat
from upfeat.cli import main
from upfeat.implicit import files as implicit_files

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
QUICK = ["--views", "2"]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "small.jpg"
    Image.open(PHOTOS / "cat.jpg").resize((64, 48)).save(path)
    return path


@pytest.fixture
def fitted(photo, tmp_path):
    path = tmp_path / "small.safetensors"
    assert main(["fit", str(photo), "-o", str(path), *QUICK]) == 0
    return path


def test_one_photograph_to_one_file(photo, tmp_path, capsys):
    fitted = tmp_path / "new" / "small.safetensors"
    assert main(["fit", str(photo), "-o", str(fitted), *QUICK]) == 0
    assert ", 2 + 48 magnified views, held-out loss" in capsys.readouterr().out
    features = upfeat.ImplicitFeatures.load(fitted)
    assert features.shape == (1, 112, 48, 64)
    assert features.facts["backbone"] == "efficientnet_lite0"
    assert fitted.with_suffix(".features.png").is_file()


def test_rendered_files_agree(fitted, tmp_path, capsys):
    for name in ("a.npy", "a.safetensors", "a.png"):
        arguments = ["render", str(fitted), "--size", "90x70", "-o", str(tmp_path / name)]
        assert main(arguments) == 0
    assert "112×70×90" in capsys.readouterr().out
    values = np.load(tmp_path / "a.npy")
    stored = load_file(tmp_path / "a.safetensors")["features"]
    assert np.array_equal(values, stored.numpy())
    expected = upfeat.ImplicitFeatures.load(fitted).render((70, 90))[0].half()
    assert torch.equal(stored, expected)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (90, 70)


def test_values_that_half_precision_cannot_hold(tmp_path, fitted):
    features = upfeat.ImplicitFeatures.load(fitted)
    features.mean = features.mean + 1e6
    path = tmp_path / "a.npy"
    with pytest.raises(ValueError, match="overflow"):
        implicit_files.write_rendering(features, path)
    assert not path.exists()
    implicit_files.write_rendering(features, path, dtype=torch.float32)
    assert np.load(path).dtype == np.float32


def test_a_folder_is_fitted_once(photo, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.open(photo).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    arguments = ["fit", str(folder), "-o", str(tmp_path / "out"), "--no-picture"]
    assert main([*arguments, *QUICK]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "a.safetensors",
        "b.safetensors",
    ]
    cut = tmp_path / "out" / "b.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    capsys.readouterr()
    assert main([*arguments, *QUICK]) == 0
    assert "done before" not in capsys.readouterr().out
    assert main([*arguments, *QUICK]) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert main([*arguments, "--views", "1"]) == 0
    assert "done before" not in capsys.readouterr().out


def test_an_interrupted_fit_keeps_the_last_file(fitted, photo, monkeypatch, capsys):
    content = fitted.read_bytes()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(implicit_files, "fit_implicit", interrupt)
    assert main(["fit", str(photo), "-o", str(fitted), *QUICK]) == 130
    assert fitted.read_bytes() == content
    assert not list(fitted.parent.glob(".*"))


def test_without_its_image(photo, tmp_path, capsys):
    path, out = tmp_path / "a.safetensors", tmp_path / "a.npy"
    assert main(["fit", str(photo), "-o", str(path), "--no-guidance", *QUICK]) == 0
    assert main(["render", str(path), "-o", str(out)]) == 2
    assert "does not hold its image" in capsys.readouterr().err
    assert main(["render", str(path), "-o", str(out), "--image", str(photo)]) == 0
    other = tmp_path / "other.png"
    Image.new("RGB", (64, 48)).save(other)
    assert main(["render", str(path), "-o", str(out), "--image", str(other)]) == 2
    assert "another image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "none.jpg", "-o", "x.safetensors"], "no such file"),
        (["fit", "small.jpg", "small.jpg", "-o", "x.safetensors"], "give a folder"),
        (["fit", "small.jpg", "-o", "x.safetensors", "--size", "3"], "size=3 must be 16 or more"),
        (
            ["fit", "tiny.png", "-o", "x.safetensors"],
            "image is 12 pixels on its shorter",
        ),
        (["fit", "small.jpg", "-o", "x.safetensors", "--views", "0"], "views=0"),
        (["fit", "empty", "-o", "out"], "no image file"),
        (["render", "none.safetensors", "-o", "x.npy"], "no such file"),
        (["render", "small.jpg", "-o", "x.npy"], "not a whole safetensors file"),
        (["render", "small.safetensors", "-o", "x.txt"], "cannot write .txt"),
        (["render", "small.safetensors", "-o", "no/x.npy"], "there is no folder no"),
        (["render", "small.safetensors", "-o", "x.npy", "--size", "big"], "WIDTHxHEIGHT"),
        (["render", "small.safetensors", "-o", "x.npy", "--size", "0x5"], "WIDTHxHEIGHT"),
    ],
)
def test_bad_input_is_one_line(arguments, words, photo, fitted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (20, 12)).save(tmp_path / "tiny.png")
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "x.safetensors").exists()
    assert not (tmp_path / "x.npy").exists()


def test_zarr_is_optional(fitted, tmp_path):
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "a.zarr"
    features = upfeat.ImplicitFeatures.load(fitted)
    implicit_files.write_rendering(features, path)
    array = np.asarray(zarr.open_array(str(path), mode="r"))
    assert np.array_equal(array, features.render()[0].half().numpy())
    implicit_files.write_rendering(features, path, (20, 30))  # our own is replaced
    assert np.asarray(zarr.open_array(str(path), mode="r")).shape == (112, 20, 30)
    other = tmp_path / "other.zarr"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        implicit_files.write_rendering(features, other)
    assert main(["render", str(fitted), "-o", str(other), "--overwrite"]) == 2
    assert (other / "mine.txt").read_text() == "mine"
