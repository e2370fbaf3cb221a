"""Files appear whole or not at all; one colour means one thing in every panel."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from upfeat import array_files, storage
from upfeat.storage import read_tensors, replacing, sweep, write_bytes, write_tensors
from upfeat.visualize import PCABasis, class_colours, comparison, side_by_side, to_image


def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "x.bin"
    write_bytes(path, b"old")

    def fail_halfway():
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_no_file_replaces_a_device_or_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(OSError, match=r"Is a device or a pipe, which .*; give the path of a"):
            write_tensors(path, {"a": torch.ones(2)}, {})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "pipe"]
    assert pipe.is_fifo()


def test_tensors_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(6.0).half()}, {"who": "me"})
    tensors, metadata = read_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(6.0).half())
    assert metadata == {"who": "me"}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a whole safetensors"):
        read_tensors(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_tensors(tmp_path / "none")


@pytest.mark.parametrize("channels", [1, 2, 3, 40])
def test_basis_is_shared_and_stable(channels):
    features = torch.randn(channels, 6, 5)
    basis = PCABasis(features)
    colours = basis.colours(basis.project(features))
    assert colours.shape == (3, 6, 5)
    assert colours.min() >= 0
    assert colours.max() <= 1
    crop = basis.colours(basis.project(features[:, 2:4]))
    torch.testing.assert_close(crop, colours[:, 2:4], rtol=1e-4, atol=1e-4)


def test_constant_features_do_not_divide_by_zero():
    basis = PCABasis(torch.ones(8, 3, 3))
    assert torch.isfinite(basis.colours(basis.project(torch.ones(8, 3, 3)))).all()
    assert torch.isfinite(PCABasis(torch.ones(4, 1, 1)).low).all()


def test_comparison_has_four_panels():
    picture = comparison(torch.rand(3, 48, 64), torch.randn(7, 3, 4), torch.randn(7, 48, 64))
    assert picture.width > 4 * 320
    assert picture.height > 240
    wide = side_by_side([("a long caption below a narrow picture", Image.new("RGB", (4, 400)))])
    assert wide.width > 100


def test_a_legend_shows_every_colour_below_the_panels():
    panels = [("left", Image.new("RGB", (400, 300))), ("right", Image.new("RGB", (400, 300)))]
    names = [
        "background",
        *(f"class {index}, of a name too long for it" for index in range(9)),
    ]
    colours = class_colours(len(names), names)
    plain = side_by_side(panels)
    found = side_by_side(panels, list(zip(names, colours.tolist(), strict=True)))
    assert found.width == plain.width
    assert np.array_equal(np.asarray(found)[: plain.height], np.asarray(plain))
    below = np.asarray(found)[plain.height :].reshape(-1, 3)
    for colour in (255 * colours).round().int().numpy():
        assert (below == colour).all(1).sum() > 100


def test_background_is_dark_and_classes_are_distinct():
    colours = class_colours(4, ["sky", " Background", "road", "roof"])
    assert float(colours[1].max()) < 0.3
    assert torch.equal(colours[[0, 2, 3]], class_colours(4)[[0, 2, 3]])
    assert len({tuple(colour) for colour in colours.tolist()}) == 4


def test_equal_content_is_equal_bytes_for_every_process(tmp_path):
    code = (
        "import sys, torch; from upfeat.storage import write_tensors\n"
        "tensors = {'b': torch.ones(3), 'a': torch.ones(2).half(), 'c': torch.tensor(True)}\n"
        "write_tensors(sys.argv[1], tensors, {key: key for key in 'qwertzuiop'})"
    )
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path in paths:
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("dtype", storage.DTYPES)
def test_every_type_comes_back_through_the_library(tmp_path, dtype):
    from safetensors.torch import load_file

    tensors = {
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 3).to(dtype),
        "turned": torch.arange(6).view(2, 3).T.to(dtype),
        "odd": torch.ones(5, dtype=torch.uint8),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_types_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1, dtype=torch.complex64)}, {})


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_arrays_are_written_by_rows(tmp_path, suffix):
    path, values = tmp_path / f"x{suffix}", np.random.rand(3, 5, 4).astype(np.float32)  # noqa: NPY002
    with array_files.create_array(path, values.shape, "float32", {"format": "x"}) as array:
        array.write_rows(3, values[:, 3:])
        array.write_rows(0, values[:, :3])
    found = np.load(path) if suffix == ".npy" else read_tensors(path)[0]["features"].numpy()
    assert np.array_equal(found, values)
    if suffix == ".npy":
        assert np.array_equal(np.load(path, mmap_mode="r"), values)


def _limited(call, path):
    """Run a call where no file may grow beyond 64 KiB; return what it raised."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        call(path)
    except OSError as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return None


def _fill_array(path):
    with array_files.create_array(path, (3, 200, 200), "float32", {}) as array:
        array.write_rows(0, np.zeros((3, 200, 200), np.float32))


@pytest.mark.skipif(os.name == "nt", reason="has no limits of file sizes")
@pytest.mark.parametrize("reserves", [True, False])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x.bin", lambda path: write_bytes(path, bytes(1 << 17))),
        ("x.safetensors", lambda path: write_tensors(path, {"a": torch.zeros(1 << 16)}, {})),
        ("y.safetensors", _fill_array),
        ("y.npy", _fill_array),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch, name, call, reserves):
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    error = _limited(call, tmp_path / name)
    assert error is not None
    assert error.filename == str(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_the_dead_are_swept_and_nothing_else(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from upfeat import storage\n"
        "with storage.replacing(Path(sys.argv[1]) / 'x.npy') as path:\n"
        "    with storage.replacing_folder(Path(sys.argv[1]) / 'x.zarr') as folder:\n"
        "        folder.mkdir(); (folder / 'chunk').write_text('1')\n"
        "        print(flush=True); sys.stdin.read(); os.kill(os.getpid(), 9)"
    )
    strangers = [".upfeat", ".upfeat-x-abc", ".x.npy.abc", ".upfeat-12.npy", "upfeat-12-abcdefgh"]
    for name in strangers:
        (tmp_path / name).write_text("mine")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as child:
        child.stdout.readline()
        written = {path.name for path in tmp_path.iterdir()}
        assert len(written) == len(strangers) + 2
        sweep(tmp_path)  # its writer lives
        assert {path.name for path in tmp_path.iterdir()} == written
        child.communicate(b"")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(strangers)
    sweep(tmp_path / "none")


def test_what_this_process_writes_is_not_swept(tmp_path):
    with replacing(tmp_path / "x") as temporary:
        sweep(tmp_path)
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_pictures_refuse_what_they_would_show_wrongly():
    features = torch.randn(8, 4, 5)
    basis = PCABasis(features)
    for wrong in (features[None], features.long(), features[:0], features * torch.nan):
        with pytest.raises(ValueError, match=r"^features "):
            PCABasis(wrong)
    with pytest.raises(ValueError, match=r"give floating numbers \(8, h, w\)"):
        basis.project(features[:3])
    with pytest.raises(ValueError, match="colours is torch"):  # not white
        to_image(torch.zeros(3, 4, 5, dtype=torch.uint8))
    assert PCABasis(torch.rand(1, 2300, 2400)).high[0] > 0.45  # more values than quantile() takes
