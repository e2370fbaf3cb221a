"""What Windows and macOS do otherwise, simulated: open files, names, encodings, drive letters."""

import io
import json
import os
import types
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

import upfeat
from upfeat import locks, storage
from upfeat.batch import Extraction, extract
from upfeat.cli import main
from upfeat.cli.choices import matching
from upfeat.evaluation.data.layouts import _files
from upfeat.outputs import Inputs, plan_outputs
from upfeat.raster import labels
from upfeat.training.settings_file import read_settings

in_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")


class _Os(types.ModuleType):
    """The module os, whose name is that of Windows."""

    name = "nt"

    def __getattr__(self, name):
        return getattr(os, name)


@pytest.fixture
def windows(monkeypatch):
    for module in (locks, storage):
        monkeypatch.setattr(module, "os", _Os("os"))
    monkeypatch.setattr(storage, "fcntl", None)


@pytest.fixture
def refuse(monkeypatch):
    """Let renaming fail, a number of times: another program has the file open."""

    def install(times, source=""):
        left, replace = [times], Path.replace

        def refusing(self, target):
            if left[0] and source in self.name:
                left[0] -= 1
                raise PermissionError(13, "Access is denied", str(self), 5, str(target))
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", refusing)
        monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)

    return install


@in_proc
def test_a_lock_is_closed_before_its_file_is_removed(windows, monkeypatch, tmp_path):
    unlink = os.unlink

    def strict(path, **options):
        opened = [one for one in Path("/proc/self/fd").iterdir() if one.exists()]
        assert not any(one.samefile(path) for one in opened)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", strict)
    with locks.hold(tmp_path):
        assert (tmp_path / ".lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_no_signal_is_sent_to_ask_whether_a_writer_lives(windows, monkeypatch, tmp_path):
    monkeypatch.setattr(locks, "_lock", lambda handle: None)
    monkeypatch.setattr(os, "kill", lambda *given: pytest.fail("a signal"))
    holder = {"pid": 1, "host": locks.socket.gethostname(), "since": "then"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    with pytest.raises(ValueError, match="if it is gone, remove"), locks.hold(tmp_path):
        pass


@in_proc
def test_read_tensors_do_not_keep_their_file_open(windows, tmp_path):
    path = tmp_path / "a.safetensors"
    storage.write_tensors(path, {"x": torch.ones(1000)}, {})
    tensors, _ = storage.read_tensors(path)
    assert bool((tensors["x"] == 1).all())
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_is_scanned_for_viruses_is_replaced_later(windows, refuse, tmp_path):
    refuse(3)
    storage.write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_that_is_open_elsewhere_is_named(windows, refuse, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    refuse(10**9)
    with pytest.raises(PermissionError, match="open in another program") as refused:
        storage.write_bytes(tmp_path / "a", b"new")
    assert refused.value.filename == str(tmp_path / "a")
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("a", b"old")]


def test_a_folder_that_cannot_be_replaced_stays(refuse, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    refuse(1, source="new")
    with pytest.raises(PermissionError), storage.replacing_folder(folder) as temporary:
        temporary.mkdir()
    assert [one.name for one in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]


def test_results_of_names_that_are_one_file_elsewhere_get_numbers(tmp_path):
    names = [unicodedata.normalize(form, "Émile") for form in ("NFC", "NFD")]
    photos = [Path(f"{index}/{name}.jpg") for index, name in enumerate([*names, "émile", "b"])]
    planned = [outputs.features.stem for _, outputs in plan_outputs(photos, tmp_path)]
    assert planned == [names[0], f"{names[1]}-2", "émile-3", "b"]


def test_items_whose_files_would_be_one_fail(tmp_path):
    """As two members of an archive whose names differ in case; the first is kept."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    for name in ("A", "a"):
        (photos / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(photos / name / "x.png")
    if len(list(photos.iterdir())) < 2:
        pytest.skip("this file system ignores case")
    model = upfeat.load(torch.nn.Conv2d(3, 2, 8, 8), upsampler="bilinear")
    assert extract(model, [photos], out, Extraction()).made == 2
    (out / ".LOCK").touch()  # seen on a system that ignores case as soon as .lock exists
    again = extract(model, [photos], out, Extraction(), overwrite=True)
    assert (again.made, [key for key, _ in again.failures]) == (1, ["a/x.png"])
    assert "but for case" in again.failures[0][1]


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_consoles_without_some_characters_show_others(monkeypatch, encoding, tmp_path):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--help"])
    assert ended.value.code == 0
    print("写真 1×2 → 3")
    out.flush()
    shown = out.buffer.getvalue().decode(encoding)
    assert "mps, …" in shown or "mps, ..." in shown
    last = shown.splitlines()[-1]
    assert last in ("\\u5199\\u771f 1×2 -> 3", "\\u5199\\u771f 1x2 -> 3")


def test_patterns_that_a_shell_passes_on_are_expanded(tmp_path):
    for name in ("b.jpg", "a.jpg", "c.png", ".hidden.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "[x].jpg").touch()
    assert matching([tmp_path / "?.jpg"]) == [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for kept in ("none*.jpg", "[x].jpg"):
        assert matching([tmp_path / kept]) == [tmp_path / kept]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("C:/none/dino", '"C:/none/dino" is unknown'),
        (r"C:\none\dino", "is unknown; known: efficientnet_lite0"),
        ("hf:C:/none", "hf:C:/none: no such folder"),
        (r"C:\none\models.py:make", r"C:\\none\\models.py: no such file"),
    ],
)
def test_drive_letters_are_no_libraries(name, shown):
    with pytest.raises((ValueError, FileNotFoundError), match=shown) as refused:
        upfeat.load_backbone(name)
    assert 'library "C"' not in str(refused.value)


@pytest.mark.parametrize("name", ["C:/none", r"C:\none\upsampler", r"none\upsampler"])
def test_paths_of_windows_are_no_names_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=r"no such folder$"):
        upfeat.load_upsampler(name)


def test_paths_with_drives_in_names_are_inputs(monkeypatch, tmp_path):
    """ "hub:C:/folder:name" protects C:/folder; a relative folder with a colon stands for it."""
    if os.name == "nt":
        pytest.skip("no file name has a colon there")
    monkeypatch.chdir(tmp_path)
    Path("C:").mkdir()
    Path("C:/model.py").touch()
    assert Inputs(["C:/model.py:make"]).find(Path("C:/model.py"))
    assert Inputs(["hub:C::make"]).find(Path("C:/model.py"))


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="a Mac with a GPU")
def test_a_device_of_macs_elsewhere_is_refused_in_few_words():
    with pytest.raises(ValueError, match="mps") as refused:
        upfeat.load(torch.nn.Conv2d(3, 2, 8, 8), device="mps")
    assert len(str(refused.value)) < 200


def test_hidden_files_of_macos_are_no_photographs(tmp_path):
    for name in ("b.jpg", "._b.jpg", "C.jpg", ".DS_Store"):
        (tmp_path / name).touch()
    assert [path.name for path in _files(tmp_path, "*.jpg")] == ["C.jpg", "b.jpg"]


def test_text_files_of_windows(tmp_path):
    settings = tmp_path / "config.yaml"
    settings.write_bytes(b"\xef\xbb\xbfsteps: 3\r\nseed: 2\r\n")
    pytest.importorskip("yaml")
    assert read_settings(settings) == {"steps": 3, "seed": 2}
    settings.write_bytes("seed: 2 # é".encode("cp1252"))
    with pytest.raises(ValueError, match=r"config\.yaml: not a text file"):
        read_settings(settings)
    shapes = tmp_path / "shapes.geojson"
    point = {"type": "Point", "coordinates": [0, 0]}
    feature = {"type": "Feature", "geometry": point, "properties": {"class": "road"}}
    shapes.write_text(json.dumps({"features": [feature]}), encoding="utf-8-sig")
    assert labels._read_shapes(shapes)[1] == [(point, "road")]
