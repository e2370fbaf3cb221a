"""Commands and the user's files: none is overwritten, none done twice, one failure is one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import upfeat
from upfeat.cli import main
from upfeat.marks import kind_of
from upfeat.storage import read_tensors

QUICK_FIT = ["--views", "1"]


def _photo(path, size=(40, 32), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def _command(name, photo, out, *more):
    quick = QUICK_FIT if name == "fit" else ["--upsampler", "bilinear"]
    return main([name, str(photo), "-o", str(out), *quick, *more])


@pytest.mark.parametrize("command", ["run", "fit"])
@pytest.mark.parametrize("out", [".", "../photos", "link", "photo.safetensors"])
def test_a_photograph_survives_results_in_its_own_folder(tmp_path, monkeypatch, command, out):
    if command == "run" and out == "photo.safetensors":
        pytest.skip("run takes folders")
    folder = tmp_path / "photos"
    _photo(folder / "photo.png")
    (folder / "link").symlink_to(folder)
    before = _contents(folder)
    monkeypatch.chdir(folder)
    assert _command(command, "photo.png", out) == 0
    after = _contents(folder)
    assert {path: after[path] for path in before} == before
    assert sorted(map(str, set(after) - set(before))) == [
        "photo.features.png",
        "photo.safetensors",
    ]


@pytest.mark.parametrize("command", ["run", "fit"])
def test_inputs_named_as_results_are_refused(tmp_path, monkeypatch, capsys, command):
    """By their own names, by links of both kinds, in a folder onto itself; the others are done."""
    folder = tmp_path / "photos"
    _photo(folder / "a.png")
    _photo(folder / "a.features.png", seed=1)
    _photo(folder / "b.png", seed=2)
    (folder / "b.safetensors").symlink_to(folder / "b.png")
    _photo(folder / "c.png", seed=3)
    os.link(folder / "c.png", folder / "c.features.png")
    before = _contents(folder)
    monkeypatch.chdir(folder)
    for overwrite in ([], ["--overwrite"]):
        assert _command(command, ".", ".", *overwrite) == 2
        after = _contents(folder)
        assert {path: after[path] for path in before} == before
        assert capsys.readouterr().err.count("is the input") == 3


@pytest.mark.parametrize("command", ["run", "fit"])
def test_files_of_others_need_overwrite(tmp_path, capsys, command):
    photo, out = _photo(tmp_path / "photo.png"), tmp_path / "out"
    for name in ("photo.safetensors", "photo.features.png"):
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(b"mine")
        assert _command(command, photo, out) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert "--overwrite" in lines[0]
        assert (out / name).read_bytes() == b"mine"
        assert [path.name for path in out.iterdir()] == [name]
        assert _command(command, photo, out, "--overwrite") == 0
        for path in out.iterdir():
            assert kind_of(path).startswith("upfeat-")
            path.unlink()


def test_results_of_another_command_are_kept(tmp_path, capsys):
    photo, out = _photo(tmp_path / "photo.png"), tmp_path / "out"
    assert _command("fit", photo, out) == 0
    before = _contents(out)
    assert _command("run", photo, out) == 2
    assert "holds upfeat-implicit" in capsys.readouterr().err
    assert _contents(out) == before


@pytest.mark.parametrize("command", ["run", "fit"])
def test_what_is_done_is_done_again_when_anything_changes(tmp_path, capsys, command):
    folder, out = tmp_path / "photos", tmp_path / "out"
    _photo(folder / "a.png")
    _photo(folder / "below" / "b.png", seed=1)
    assert _command(command, folder, out) == 0
    names = sorted(path.as_posix() for path in _contents(out))
    picture = names.pop(0)
    assert [picture, *names] == sorted(
        str(Path(place, f"{name}.{kind}"))
        for place, name in (("", "a"), ("below", "b"))
        for kind in ("features.png", "safetensors")
    )
    first = _contents(out)
    capsys.readouterr()

    def redone(*more):
        assert _command(command, folder, out, *more) == 0
        return 2 - capsys.readouterr().out.count("done before")

    assert redone() == 0
    assert _contents(out) == first
    (out / "a.features.png").unlink()
    assert redone() == 1
    assert _contents(out) == first  # byte for byte
    assert redone("--no-picture") == 0
    _photo(folder / "a.png", seed=7)
    assert redone() == 1
    more = ["--no-guidance"] if command == "fit" else ["--dtype", "bf16"]
    assert redone(*more) == 2
    assert redone(*more) == 0
    assert redone("--size", "36") == 2
    assert redone("--size", "36", "--backbone", "efficientnet_lite0.stride8") == 2


def test_weights_of_the_same_name_are_not_the_same(tmp_path, capsys):
    photo, out = _photo(tmp_path / "photo.png"), tmp_path / "out"
    for seed in (0, 1):
        torch.manual_seed(seed)
        upfeat.JBUStack(112).save_pretrained(tmp_path / "stack")
        assert _command("run", photo, out, "--upsampler", str(tmp_path / "stack")) == 0
        assert "done before" not in capsys.readouterr().out


def test_backbones_of_the_same_name_are_not_the_same(tmp_path):
    from upfeat.implicit.files import fit_photograph, is_fitted
    from upfeat.implicit.fit import FitConfig

    photo, output = _photo(tmp_path / "photo.png"), tmp_path / "photo.safetensors"
    first, second = (
        upfeat.load_backbone(torch.nn.Conv2d(3, 4, 8, 8), name="mine", stride=8, embed_dim=4)
        for _ in range(2)
    )
    config = FitConfig(views=1)
    fit_photograph(photo, first, config, output)
    assert is_fitted(photo, first, config, output)
    assert not is_fitted(photo, second, config, output)
    assert not is_fitted(photo, first, config, output, guidance=False)
    assert not is_fitted(photo, first, config, output, picture=tmp_path / "photo.features.png")


def test_a_fit_remembers_the_file_it_read(tmp_path):
    """Not the one that lies there when it ends."""
    import hashlib

    from upfeat.implicit.files import fit_photograph
    from upfeat.implicit.fit import FitConfig

    photo = _photo(tmp_path / "photo.png")
    digest = hashlib.sha256(photo.read_bytes()).hexdigest()
    backbone = upfeat.load_backbone(torch.nn.Conv2d(3, 4, 8, 8), stride=8, embed_dim=4)
    features = fit_photograph(
        photo,
        backbone,
        FitConfig(views=1),
        tmp_path / "photo.safetensors",
        on_step=lambda progress: _photo(photo, seed=9) and None,
    )
    assert features.facts["source"] == digest


def test_a_failed_fit_leaves_no_picture(tmp_path, monkeypatch):
    from upfeat.implicit import files

    def fail(*args, on_step, **kwargs):
        features = files.ImplicitFeatures.load(tmp_path / "photo.safetensors")
        on_step(files.FitProgress(1, 2, 0.5, features))
        raise MemoryError

    photo = _photo(tmp_path / "photo.png")
    assert _command("fit", photo, tmp_path / "photo.safetensors") == 0
    monkeypatch.setattr(files, "fit_implicit", fail)
    assert _command("fit", photo, tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()


@pytest.fixture
def fitted(tmp_path):
    photo = _photo(tmp_path / "photo.png")
    assert _command("fit", photo, tmp_path / "photo.safetensors") == 0
    return tmp_path / "photo.safetensors"


def test_render_keeps_its_inputs_and_files_of_others(fitted, tmp_path, capsys, monkeypatch):
    photo = tmp_path / "photo.png"
    (tmp_path / "link.safetensors").symlink_to(fitted)
    (tmp_path / "link.png").symlink_to(photo)
    np.save(tmp_path / "mine.npy", np.zeros((3, 4, 5)))
    (tmp_path / "mine.jpg").write_bytes(b"mine")
    before = _contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["render", "photo.safetensors", "--image", "photo.png", "--size", "20x10", "-o"]
    for name in ("photo.safetensors", "./link.safetensors", "photo.png", "link.png"):
        assert main([*command, name, "--overwrite"]) == 2
        assert "is the input" in capsys.readouterr().err
    for name in ("mine.npy", "mine.jpg"):
        assert main([*command, name]) == 2
        assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "."]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert _contents(tmp_path) == before
    for name in ("new.npy", "new.safetensors", "new.png", "new.jpg"):
        assert main([*command, name]) == 0
        first = Path(name).read_bytes()
        assert main([*command, name]) == 0  # its own
        assert Path(name).read_bytes() == first


def test_train_keeps_files_of_others(tmp_path, capsys):
    photos = tmp_path / "photos"
    for seed in range(2):
        _photo(photos / f"{seed}.png", (64, 64), seed)
    quick = ["--steps", "1", "--batch-size", "1", "--views", "1", "--size", "32"]
    quick += ["--validation-images", "0", "--device", "cpu"]
    for name in ("config.json", "photographs.json", "losses.jsonl", "upsampler"):
        (photos / name).write_text('{"steps": 1}')
        before = _contents(photos)
        config = ["--config", str(photos / name)] if name == "config.json" else []
        assert main(["train", str(photos), "-o", str(photos), *quick, *config]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert "give another folder" in lines[0]
        assert _contents(photos) == before
        (photos / name).unlink()


def test_eval_keeps_files_of_others(tmp_path, capsys):
    for seed in range(2):
        _photo(tmp_path / "data" / f"{seed}.png", (64, 64), seed)
    for name in ("results.json", "report.html"):
        (tmp_path / "data" / name).write_text("{}")
        before = _contents(tmp_path)
        folder = str(tmp_path / "data")
        assert main(["eval", "consistency", folder, "-o", folder, "--upsamplers", "nearest"]) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert _contents(tmp_path) == before
        (tmp_path / "data" / name).unlink()


def test_bench_keeps_files_of_others(tmp_path, capsys):
    path = tmp_path / "package.json"
    path.write_text("{}")
    assert main(["bench", "--quick", "-o", str(path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_text() == "{}"


def test_an_enlargement_beyond_the_memory_is_refused_before_it_is_tried(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("upfeat.machine.available_memory", lambda device=None: 4 * 10**9)
    photo = _photo(tmp_path / "photo.png", (600, 400))
    for command in ("run", "fit"):
        assert main([command, str(photo), "-o", str(tmp_path / command), "--size", "16000"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert "give a smaller size, at most about" in lines[0]
        assert not (tmp_path / command).exists()


def test_out_of_memory_ends_one_photograph_only(tmp_path, capsys, monkeypatch):
    photos = [_photo(tmp_path / f"{name}.png") for name in "ac"]
    photos.insert(1, _photo(tmp_path / "b.png", (96, 160)))
    extract = upfeat.backbones.EfficientNetLite0.extract

    def fail_on_the_second(self, x):
        if 160 in x.shape:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
            )
        return extract(self, x)

    monkeypatch.setattr(upfeat.backbones.EfficientNetLite0, "extract", fail_on_the_second)
    arguments = ["--upsampler", "bilinear", "--no-picture", "-o", str(tmp_path / "out")]
    assert main(["run", *map(str, photos), *arguments]) == 2
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == ["a", "c"]
    errors = capsys.readouterr().err.strip().splitlines()
    assert "b.png: not enough memory" in errors[-2]
    assert "1 of 3" in errors[-1]


def test_the_size_on_disk_is_said_first(tmp_path, capsys, monkeypatch):
    photos = tmp_path / "photos"
    for seed in range(2):
        _photo(photos / f"{seed}.png", (600, 400), seed)
    monkeypatch.setattr("upfeat.run.run_photo", lambda *args, **kwargs: (1, 1, 1))
    assert _command("run", photos, tmp_path / "out", "--no-picture") == 0
    note = capsys.readouterr().err
    assert "2 photographs take about 107.5 MB" in note
    assert "free" in note


_BATCH = """
import ctypes, os, resource, sys
if os.getuid() == 0:  # may read everything: as the owner of these files and no more
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000,) * 2)
from upfeat import machine
machine.available_memory = lambda device=None: 30_000_000
from upfeat.cli import main
sys.exit(main(sys.argv[1:]))
"""


def _spoil(folder, out):
    """Ten bad photographs, each in another way; their names, with words of the reason."""
    _photo(folder / "disk.png", (90, 80))  # 112 × 7200 × 2 bytes
    _photo(folder / "memory.png", (600, 400))
    _photo(folder / "decoding.png", (1200, 1000))
    _photo(folder / "small.png", (20, 9))
    whole = _photo(folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("text")
    _photo(folder / "locked.png").chmod(0)
    _photo(folder / "taken.png")
    (out / "taken.safetensors").write_text("mine")
    _photo(folder / "blocked.png")
    (out / "blocked.features.png").mkdir()
    return {
        "disk": "File too large",
        "memory": "give a smaller size",
        "decoding": "decoding its 1000×1200 pixels",
        "small": "stride",
        "cut": "damaged",
        "empty": "not an image",
        "text": "not an image",
        "locked": "Permission denied",
        "taken": "--overwrite",
        "blocked": "is a folder",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="lays down the rights of root as Linux does")
def test_thirty_photographs_ten_of_them_bad_in_ten_ways(tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "out"
    good = [_photo(folder / f"good{n:02}.png", (36, 32), n) for n in range(20)]
    out.mkdir()
    bad = _spoil(folder, out)
    command = ["run", str(folder), "-o", str(out), "--upsampler", "bilinear"]
    done = subprocess.run(
        [sys.executable, "-c", _BATCH, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert "10 of 30 photographs failed" in done.stderr
    assert len(lines) == len(bad)
    for name, words in bad.items():
        (line,) = (line for line in lines if f"/{name}." in line)
        assert words in line
    written = {path.name for path in out.iterdir()} - {"taken.safetensors", "blocked.features.png"}
    assert written == {
        f"{photo.stem}.{kind}" for photo in good for kind in ("safetensors", "features.png")
    }
    model = upfeat.load(upsampler="bilinear")
    for photo in good[::5]:
        stored = read_tensors(out / f"{photo.stem}.safetensors")[0]["features"]
        expected = model(model.preprocess(photo))[0]
        torch.testing.assert_close(stored.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_results_of_two_processes_are_equal_byte_for_byte(tmp_path):
    photo = _photo(tmp_path / "photo.png")
    for out in ("1", "2"):
        for command, *more in (("run", "--upsampler", "detail"), ("fit", "--views", "1")):
            arguments = [command, str(photo), "-o", str(tmp_path / out / command), *more]
            code = f"from upfeat.cli import main; main({arguments!r})"
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert len(_contents(tmp_path / "1")) == 4
    assert _contents(tmp_path / "1") == _contents(tmp_path / "2")


def test_a_picture_that_cannot_be_written_leaves_no_features(tmp_path, monkeypatch, capsys):
    from upfeat.implicit import files

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "photo.features.png")

    photo = _photo(tmp_path / "photo.png")
    for module in (files, sys.modules["upfeat.run"]):
        monkeypatch.setattr(module, "replacing", full)
    for command in ("run", "fit"):
        assert _command(command, photo, tmp_path / command) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert not (tmp_path / command).exists()


def test_an_evaluation_beyond_the_memory_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("upfeat.machine.available_memory", lambda device=None: 4 * 10**9)
    for seed in range(2):
        _photo(tmp_path / "data" / f"{seed}.png", (64, 64), seed)
    command = ["eval", "consistency", str(tmp_path / "data"), "-o", str(tmp_path / "out")]
    assert main([*command, "--upsamplers", "nearest", "--size", "16000"]) == 2
    assert "give a smaller size" in capsys.readouterr().err
