"""Fits and their renderings as files: written whole or not at all, refused before the work."""

import sys

import numpy as np
import pytest
import torch
from implicit.test_features import make_features
from PIL import Image

import upfeat
from upfeat.implicit.files import (
    RENDERINGS,
    draw,
    fit_photograph,
    is_fitted,
    write_picture,
    write_rendering,
)
from upfeat.implicit.fit import FitConfig
from upfeat.marks import FEATURES, PICTURE, kind_of, picture_facts
from upfeat.storage import read_tensors

QUICK = FitConfig(views=1, held_out=2, anchors=16, zoomed_views=0)


@pytest.fixture
def backbone():
    return upfeat.load_backbone(torch.nn.Conv2d(3, 4, 8, 8), name="mine", stride=8, embed_dim=4)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def written(path):
    """Values of a rendering, whatever the kind of its file."""
    if path.suffix == ".zarr":
        return np.asarray(pytest.importorskip("zarr").open_array(str(path), mode="r"))
    if path.suffix == ".npy":
        return np.load(path)
    return read_tensors(path)[0]["features"].numpy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".zarr"])
@pytest.mark.parametrize("size", [None, (7, 90), (1, 1)])
def test_values_are_those_of_the_map(tmp_path, suffix, dtype, size, monkeypatch):
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    monkeypatch.setattr("upfeat.implicit.features._POINTS", 200)  # several strips
    features, path = make_features(), tmp_path / f"r{suffix}"
    told = []
    write_rendering(features, path, size, dtype=dtype, on_rows=lambda *rows: told.append(rows))
    expected = features.render(size)[0].to(dtype).numpy()
    np.testing.assert_array_equal(written(path), expected)
    height = expected.shape[1]
    assert told[-1] == (height, height)
    assert told == sorted(told)
    assert kind_of(path) == FEATURES
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg"])
def test_pictures_are_marked_and_of_their_size(tmp_path, suffix):
    features, path = make_features(), tmp_path / f"r{suffix}"
    write_rendering(features, path, (10, 30))
    with Image.open(path) as picture:
        assert picture.size == (30, 10)
        if suffix.lower() == ".png":
            assert np.array_equal(np.array(picture), np.array(draw(features, (10, 30))))
    assert kind_of(path) == PICTURE


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_colours_of_any_number_of_channels_are_alike_at_all_sizes(channels):
    features = make_features(channels=channels)
    once, thrice = (np.array(draw(features, size)).astype(int) for size in ((24, 40), (72, 120)))
    assert once.shape == (24, 40, 3)
    assert abs(thrice[1::3, 1::3] - once).max() <= 1


@pytest.mark.parametrize("fault", ["too small for", "overflow"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".zarr"])
def test_values_that_float16_cannot_hold_leave_what_was_there(tmp_path, suffix, fault):
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    features, path = make_features(), tmp_path / f"r{suffix}"
    write_rendering(features, path)
    before = written(path).copy()
    if fault == "overflow":
        features.mean = features.mean + 1e6
    else:
        features.mean, features.components = 1e-7 * features.mean, 1e-7 * features.components
    with pytest.raises(ValueError, match=f"{fault} float16; write float32"):
        write_rendering(features, path)
    np.testing.assert_array_equal(written(path), before)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    write_rendering(features, path, dtype=torch.float32)
    np.testing.assert_array_equal(written(path), features.render()[0].numpy())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("r.txt", {}, "cannot write .txt; use .safetensors"),
        ("r", {}, "cannot write this; use"),
        ("none/r.npy", {}, "there is no folder .*none; make it first"),
        ("r.npy", {"dtype": torch.bfloat16}, "dtype=torch.bfloat16 must be torch.float16 or"),
        ("r.npy", {"output_size": (0, 4)}, r"output_size=\(0, 4\) must be"),
        ("r.npy", {"output_size": (2, 3, 4)}, r"output_size=\(2, 3, 4\) must be"),
        ("r.png", {"output_size": (4, 0.5)}, r"output_size=\(4, 0.5\) must be"),
        ("r.zarr", {}, r"needs the package zarr: pip install 'upfeat\[zarr\]'"),
    ],
)
def test_renderings_that_cannot_be_leave_nothing(tmp_path, monkeypatch, name, options, words):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ValueError, match=words):
        write_rendering(make_features(), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_a_picture_beyond_the_memory_is_refused_and_values_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr("upfeat.machine.available_memory", lambda device=None: 60 * 20 * 30 - 1)
    features = make_features()
    with pytest.raises(ValueError, match=r"a picture of 30x20 pixels needs about 36\.0 kB"):
        write_rendering(features, tmp_path / "r.png", (20, 30))
    write_rendering(features, tmp_path / "r.npy", (20, 30))
    write_rendering(features, tmp_path / "r.png", (20, 29))


def test_every_ending_is_written_or_told(tmp_path):
    for suffix in RENDERINGS:
        if suffix != ".zarr":
            write_rendering(make_features(), tmp_path / f"r{suffix}", (3, 4))
    assert len(list(tmp_path.iterdir())) == len(RENDERINGS) - 1


def test_what_decides_whether_a_photograph_is_fitted(photo, backbone, tmp_path):
    output, picture = tmp_path / "out" / "f.safetensors", tmp_path / "out" / "f.features.png"
    known = {"picture": picture, "guidance": True}
    assert not is_fitted(photo, backbone, QUICK, output, **known)
    found = fit_photograph(photo, backbone, QUICK, output, picture=picture)
    assert is_fitted(photo, backbone, QUICK, output, **known)
    assert picture_facts(picture)["recipe"] == found.facts["recipe"]
    for changed in ({"seed": 1}, {"views": 2}, {"anchors": 17}):
        config = FitConfig(
            **{"views": 1, "held_out": 2, "anchors": 16, "zoomed_views": 0, **changed}
        )
        assert not is_fitted(photo, backbone, config, output, **known)
    assert not is_fitted(photo, backbone, QUICK, output, guidance=False)
    content = output.read_bytes()
    for damage in (content[:-1], b"", b"text"):
        output.write_bytes(damage)
        assert not is_fitted(photo, backbone, QUICK, output, **known)
    output.write_bytes(content)
    write_picture(found, picture)  # of this fit, but it says nothing of it
    assert not is_fitted(photo, backbone, QUICK, output, **known)
    assert is_fitted(photo, backbone, QUICK, output)
    photo.unlink()
    assert not is_fitted(photo, backbone, QUICK, output)


def test_a_first_picture_comes_early_and_goes_with_a_fit_that_fails(photo, backbone, tmp_path):
    picture = tmp_path / "p.png"
    seen = []

    def stop(progress):
        seen.append(picture.exists())
        if progress.features is not None:
            raise KeyboardInterrupt

    for there in (False, True):
        if there:
            picture.write_bytes(b"before")
        with pytest.raises(KeyboardInterrupt):
            fit_photograph(
                photo, backbone, QUICK, tmp_path / "f.safetensors", picture=picture, on_step=stop
            )
        assert seen[-1]
        assert picture.exists() == there
    assert picture.read_bytes() == b"before"
    assert not (tmp_path / "f.safetensors").exists()


def test_photographs_that_are_none(backbone, tmp_path):
    output = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such file"):
        fit_photograph(tmp_path / "none.png", backbone, QUICK, output)
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        fit_photograph(tmp_path, backbone, QUICK, output)
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(ValueError, match=r"x\.png: not an image"):
        fit_photograph(tmp_path / "x.png", backbone, QUICK, output)
    assert not output.exists()
