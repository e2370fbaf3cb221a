"""Places that cannot be written, clusters that are not there: one line, and nothing is lost."""

import errno
import os
import subprocess

import numpy as np
import pytest
import torch

rasterio = pytest.importorskip("rasterio")
pytest.importorskip("zarr", "3.0")

from batch.test_extract import encoded  # noqa: E402
from raster.test_raster import facts, picture, tiny, tree, values_of, whole, write  # noqa: E402

import upfeat  # noqa: E402
from upfeat.cli import main  # noqa: E402
from upfeat.locks import hold  # noqa: E402
from upfeat.raster import Features, Scene, make_plan, upsample_raster  # noqa: E402


def _mount(*arguments):
    return subprocess.run(["mount", *arguments], capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs to mount a small file system")
    if (made := _mount("-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place))).returncode:
        pytest.skip(f"needs to mount a small file system ({made.stderr.strip()})")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def small_model(monkeypatch):
    """The commands' default model: a small one."""
    model = tiny("bilinear")
    monkeypatch.setattr(upfeat, "load", lambda *args, **options: model)


def refused(arguments, reason, capsys):
    """The command ends with code 2 and one line that holds the reason."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    printed = capsys.readouterr().err.strip()
    assert reason in printed
    assert len(printed.splitlines()) == 1, printed


@pytest.mark.parametrize("name", ["out.zarr", "out.tif"])
def test_a_full_disk_loses_no_tile(tmp_path, disk, small_model, capsys, monkeypatch, name):
    for sides in ("_TILES", "_BACKBONE_TILES"):
        monkeypatch.setattr(f"upfeat.raster.plan.{sides}", (64,))
    path = write(tmp_path / "scene.tif", picture())
    calm = ["raster", path, "-o", tmp_path / name, "--dtype", "fp32"]
    assert main(list(map(str, calm))) == 0
    arguments = ["raster", path, "-o", disk / name, "--dtype", "fp32"]
    refused(arguments, f"{disk / name}.partial: No space left on device", capsys)
    assert not (disk / name).exists()
    done = (disk / f"{name}.partial" / "tiles.txt").read_text().split()
    assert 0 < len(done) < 12
    assert _mount("-o", "remount,size=9m", str(disk)).returncode == 0
    assert main([*map(str, arguments), "--resume"]) == 0
    np.testing.assert_array_equal(values_of(disk / name), values_of(tmp_path / name))
    assert [one.name for one in disk.iterdir()] == [name]


def test_a_full_disk_ends_extract_and_loses_nothing(tmp_path, disk, small_model, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(8):
        (photos / f"{seed}.png").write_bytes(encoded(seed, (96, 96)))
    kind = ["--kind", "features", "--dtype", "fp32", "--workers", "1"]
    arguments = ["extract", photos, "-o", disk / "out", *kind]
    refused(arguments, "No space left on device", capsys)
    assert _mount("-o", "remount,size=9m", str(disk)).returncode == 0
    assert main(list(map(str, arguments))) == 0
    assert "0 failed" in capsys.readouterr().out
    assert main(["extract", str(photos), "-o", str(tmp_path / "calm"), *kind]) == 0
    assert tree(disk / "out") == tree(tmp_path / "calm")


def test_a_place_that_is_read_only_is_named(tmp_path, disk, small_model, capsys):
    path = write(tmp_path / "scene.tif", picture())
    (tmp_path / "photo.png").write_bytes(encoded(0))
    assert _mount("-o", "remount,ro", str(disk)).returncode == 0
    for arguments in (
        ["raster", path, "-o", disk / "out.zarr"],
        ["raster", path, "-o", disk / "inner" / "out.tif"],
        ["extract", tmp_path / "photo.png", "-o", disk / "out"],
    ):
        refused(arguments, "Read-only file system", capsys)


def test_a_store_is_written_by_one_process(tmp_path, small_model, capsys):
    (tmp_path / "photo.png").write_bytes(encoded(0))
    path = write(tmp_path / "scene.tif", picture())
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out"), hold(tmp_path / "out.zarr.unfinished"):
        arguments = ["extract", tmp_path / "photo.png", "-o", tmp_path / "out"]
        refused(arguments, f"is being written by process {os.getpid()}", capsys)
        refused(["raster", path, "-o", tmp_path / "out.zarr"], "is being written by", capsys)
    assert main(list(map(str, arguments))) == 0


def test_a_cluster_that_is_not_there_is_named(tmp_path, small_model, capsys):
    pytest.importorskip("ray")
    path = write(tmp_path / "scene.tif", picture())
    engine = ["--engine", "ray", "--address", "127.0.0.1:1"]
    refused(
        ["raster", path, "-o", tmp_path / "out.zarr", *engine], "no Ray cluster answers", capsys
    )
    assert main(["raster", str(path), "-o", str(tmp_path / "out.zarr"), "--resume"]) == 0
    refused(["raster", path, "-o", tmp_path / "x.zarr", "--workers", 2], "for engine=ray", capsys)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("settings.json", b"", "settings.json: not JSON"),
        ("settings.json", b"[]", "settings.json: holds list, not an object"),
        ("settings.json", b'{"tile": "64"}', "tile='64' must be a whole number"),
        ("settings.json", b'{"tile": -64}', "tile=-64 must be 1 or more"),
        (
            "settings.json",
            b'{"tile": 64}',
            "was begun with another backbone_tile, cells, format, model, raster",
        ),
        ("tiles.txt", b"0\nx\n", "tiles.txt: damaged; begin anew by --overwrite"),
    ],
)
def test_a_damaged_begin_is_one_line(
    tmp_path, small_model, capsys, monkeypatch, file, content, words
):
    def full(self, window, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write(tmp_path / "scene.tif", picture())
    arguments = ["raster", path, "-o", tmp_path / "out.zarr"]
    with monkeypatch.context() as patched:
        patched.setattr("upfeat.raster.store.TileWriter.write", full)
        refused(arguments, "No space left on device", capsys)
    (tmp_path / "out.zarr.partial" / file).write_bytes(content)
    refused([*arguments, "--resume"], words, capsys)
    assert not (tmp_path / "out.zarr").exists()
    assert main([*map(str, arguments), "--overwrite"]) == 0


def test_tiles_smaller_than_their_halo_equal_the_whole(tmp_path):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 8, 8), torch.nn.GELU(), torch.nn.Conv2d(6, 5, 7, padding=3)
    )
    model = upfeat.load(layers, upsampler="neighbourhood")
    path = write(tmp_path / "scene.tif", picture(70, 90))
    features = Features(5, facts(model), "float32")
    with Scene(path) as scene:
        plan = make_plan(scene.size, model, features, tile=8, backbone_tile=1)
        assert plan.backbone_tile < plan.backbone_halo
        assert plan.tile < plan.halo
        out = upsample_raster(scene, tmp_path / "out.zarr", model, features, plan)
    expected = whole(path, model)
    np.testing.assert_allclose(values_of(out), expected, atol=2e-5 * np.abs(expected).max())
