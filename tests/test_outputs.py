"""Which files are whose: links, other names of the same file, and what says that it is ours."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upfeat.array_files import create_array
from upfeat.marks import FEATURES, PICTURE, encode_picture, kind_of
from upfeat.outputs import (
    Inputs,
    Outputs,
    check_output,
    digest,
    is_done,
    make_folder,
    plan_outputs,
    prepare_output,
    watched,
)
from upfeat.photo_search import find_photographs, search
from upfeat.storage import write_bytes, write_tensors


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (30, 20)).save(path)
    return path


def _aliases(photo):
    folder = photo.parent
    (folder / "link.png").symlink_to(photo)
    os.link(photo, folder / "hard.png")
    (folder / "elsewhere").symlink_to(folder)
    return [
        photo,
        folder / "link.png",
        folder / "hard.png",
        folder / "elsewhere" / "photo.png",
        folder / "." / "elsewhere" / ".." / folder.name / "photo.png",
    ]


def test_no_output_is_an_input_by_any_name(photo):
    for alias in _aliases(photo):
        for inputs in (Inputs([photo]), Inputs([photo.parent])):
            with pytest.raises(ValueError, match="is the input"):
                check_output(alias, inputs, PICTURE, overwrite=True)


def test_relative_and_empty_folders(photo, monkeypatch):
    monkeypatch.chdir(photo.parent)
    for folder in ("", ".", "../" + photo.parent.name):
        with pytest.raises(ValueError, match="is the input"):
            check_output(Path(folder) / photo.name, Inputs([photo]), PICTURE)


def test_a_folder_of_results_may_hold_anything(tmp_path):
    """Such as a checkout of upfeat."""
    for name in ("upfeat", "trial"):
        (tmp_path / name).mkdir()
    make_folder(tmp_path)
    prepare_output(tmp_path / "head.safetensors", Inputs(()), FEATURES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trial", "upfeat"]


def test_files_of_others_are_kept(tmp_path):
    photo = Image.new("RGB", (3, 3))
    others = {name: tmp_path / f"x.{name}" for name in ("png", "jpg", "npy", "json", "safetensors")}
    photo.save(others["png"])
    photo.save(others["jpg"], comment=b"holiday")
    np.save(others["npy"], np.zeros((3, 4, 5), np.float16))
    others["json"].write_text('{"format": "mine"}')
    write_tensors(others["safetensors"], {"a": torch.ones(1)}, {"format": "pt"})
    for path in others.values():
        assert kind_of(path) is None
        with pytest.raises(ValueError, match="not made by upfeat; give --overwrite"):
            check_output(path, Inputs([]), FEATURES)
        check_output(path, Inputs([]), FEATURES, overwrite=True)
        path.write_bytes(b"")
        assert kind_of(path) is None
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "none")
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path / "folder.png", Inputs([]), PICTURE, overwrite=True)
    with pytest.raises(ValueError, match="exists already"):
        check_output(tmp_path / "nowhere.png", Inputs([]), PICTURE)


def test_our_own_files_are_known(tmp_path):
    picture = Image.new("RGB", (3, 3))
    for name in ("a.png", "a.jpg", "A.JPEG"):
        write_bytes(tmp_path / name, encode_picture(picture, f".{name.partition('.')[2]}"))
        assert kind_of(tmp_path / name) == PICTURE
    for name in ("a.npy", "a.safetensors"):
        with create_array(tmp_path / name, (2, 3, 4), "float16", {"format": FEATURES}) as array:
            array.write_rows(0, np.ones((2, 3, 4), np.float16))
        check_output(tmp_path / name, Inputs([]), FEATURES)
        with pytest.raises(ValueError, match=r"holds upfeat-features, not upfeat-implicit"):
            check_output(tmp_path / name, Inputs([]), "upfeat-implicit-2")
    cut = tmp_path / "a.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert kind_of(cut) == FEATURES


def test_names_are_numbered_where_they_would_be_alike(tmp_path):
    photos = [tmp_path / "a" / "x.jpg", tmp_path / "b" / "X.jpg", tmp_path / "a" / "x.jpg"]
    photos += [tmp_path / "x-2.png"]
    names = [outputs.features.name for _, outputs in plan_outputs(photos, tmp_path / "out")]
    assert names == ["x.safetensors", "X-2.safetensors", "x-2-2.safetensors"]
    assert not (tmp_path / "out").exists()


def test_folders_are_searched_with_all_below(photo):
    folder = photo.parent
    for name in ("b/deep/x.PNG", "b/.hidden.png", ".cache/y.png", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo.read_bytes())
    ours = encode_picture(Image.new("RGB", (3, 3)), ".png")
    (folder / "photo.features.png").write_bytes(ours)
    (folder / "theirs.features.png").write_bytes(photo.read_bytes())
    found = find_photographs([folder])
    paths = [one.path.relative_to(folder).as_posix() for one in found]
    assert paths == ["photo.png", "theirs.features.png", "b/deep/x.PNG"]
    planned = plan_outputs(found, folder / "out")
    assert planned[-1][1].picture == folder / "out" / "b" / "deep" / "x.features.png"
    (empty,) = find_photographs([folder / ".cache" / "none", folder / "b" / "deep"])[:1]
    assert empty.path.name == "none"  # named files are not judged here
    (folder / "empty").mkdir()
    (error,) = find_photographs([folder / "empty"])
    assert "no image file" in str(error)


@pytest.mark.parametrize(
    "name", ["a.h5", "a.hdf", "a.grib", "a.mpg", "a.MPEG", "a.eps", "a.txt", "a"]
)
def test_data_and_videos_are_no_images(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert search(tmp_path) == []


def test_done_means_every_part_of_it(tmp_path):
    outputs = Outputs(tmp_path / "a.safetensors", tmp_path / "a.features.png")
    recipe = digest({"size": 3})
    assert recipe != digest({"size": 4})
    picture = encode_picture(Image.new("RGB", (3, 3)), ".png", recipe=recipe)
    write_tensors(outputs.features, {"features": torch.ones(3)}, {"recipe": recipe})
    assert not is_done(outputs, recipe)
    outputs.picture.write_bytes(picture)
    assert is_done(outputs, recipe)
    assert is_done(Outputs(outputs.features, None), recipe)
    assert not is_done(outputs, digest({"size": 4}))
    outputs.picture.write_bytes(encode_picture(Image.new("RGB", (3, 3)), ".png", recipe="older"))
    assert not is_done(outputs, recipe)
    outputs.picture.write_bytes(picture)
    outputs.features.write_bytes(outputs.features.read_bytes()[:-1])
    assert not is_done(outputs, recipe)


def test_a_file_that_changes_while_it_is_read_is_refused(photo):
    def replace_meanwhile():
        with watched(photo):
            other = photo.with_name("new.png")
            other.write_bytes(photo.read_bytes())
            other.replace(photo)

    with pytest.raises(ValueError, match="changed while it was read"):
        replace_meanwhile()


def test_masks_beside_photographs_are_no_photographs(tmp_path):
    """They are found by the names that pair them; a folder of masks itself may be given."""
    folders = ["images", "labels", "depth", "plain", "plain/labels", "alone/labels"]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    names = ["images/a.jpg", "labels/a.png", "labels/other.png", "depth/a.png", "plain/b.jpg"]
    for name in [*names, "plain/labels/b.png", "alone/labels/c.png"]:
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match="3 labels beside photographs .* such as depth.a.png, are"):
        found = find_photographs([tmp_path])
    kept = ["alone/labels/c.png", "images/a.jpg", "labels/other.png", "plain/b.jpg"]
    assert sorted(one.path.relative_to(tmp_path).as_posix() for one in found) == kept
    assert len(find_photographs([tmp_path / "labels", tmp_path / "labels" / "a.png"])) == 3
