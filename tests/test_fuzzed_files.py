"""Files of strangers, damaged in ways that their readers' libraries answer with any error."""

import io
import json
import os
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hostile import fault
from odd_images import png_chunk, saved
from PIL import Image
from published_reference import published_state
from test_damaged_files import BACKBONE, _head, _translation

import upfeat
from upfeat import locks
from upfeat.adapters.grids import DenseGrid, read_grid, write_grid
from upfeat.batch.items import Damaged, list_items
from upfeat.decoding import open_upright
from upfeat.evaluation.data.layouts import read_dataset
from upfeat.evaluation.data.targets import read_depth, read_indices
from upfeat.evaluation.results import Row, RowStore
from upfeat.heads import load_head
from upfeat.images import read_image
from upfeat.storage import read_tensors
from upfeat.training.config import TrainConfig
from upfeat.translation import Translation

PICTURE = Image.fromarray(np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3))


def _altered(content, place, data):
    return content[:place] + data + content[place + len(data) :]


def _gif():
    content = saved(PICTURE.quantize(16), "GIF")
    frame = content.index(b",\0\0\0\0")
    return _altered(content, frame + 5, b"\xff\xff")  # a frame wider than the image


def _png(kind, data):
    content = saved(PICTURE, "PNG")
    return content[:33] + png_chunk(kind, data) + content[33:]


IMAGES = {
    "short.png": lambda: b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", b"\0\0"),
    "gamma.png": lambda: _png(b"gAMA", b"\0"),
    "frames.png": lambda: _png(b"acTL", b"\0"),
    "frame.gif": _gif,
    "token.ppm": lambda: b"P6\n2x 2\n255\n" + b"\0" * 12,
    "mode.sgi": lambda: struct.pack(">hbbHHHH", 474, 0, 9, 9, 9, 9, 9) + b"\0" * 600,
    "short.qoi": lambda: b"qoif" + struct.pack(">IIBB", 9, 9, 3, 0) + b"\xfe",
    "flags.dds": lambda: _altered(saved(PICTURE, "DDS"), 80, b"\0\0\0\0"),
    "scale.im": lambda: b"Image type: RGB image\r\nImage size (x*y): 3x*y\r\n".ljust(511) + b"\x1a",
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_pillow_answers_with_any_error_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(IMAGES[name]())
    for read in (read_image, open_upright, read_indices):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Pillow, for rare formats
            with pytest.raises(ValueError, match=name) as refused:
                read(path)
        assert "\n" not in str(refused.value)


def test_an_unreadable_image_is_an_error_of_the_system(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    PICTURE.save(path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(PermissionError, match=r"a\.png"):
        read_image(path)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4,",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 2), }",
        "(" * 3000,
        "",
    ],
)
def test_depth_maps_with_a_damaged_header_allocate_nothing(tmp_path, header):
    path = tmp_path / "depth.npy"
    text = header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + b"\0" * 64)
    with pytest.raises(ValueError, match=r"not a readable npy file|depth must be|no depth"):
        read_depth(path)


def test_depths_beyond_float32_are_unknown(tmp_path):
    np.save(tmp_path / "depth.npy", np.array([[1e38, 1.0], [2.0, np.inf]], np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth = read_depth(tmp_path / "depth.npy", 1e3)
    np.testing.assert_array_equal(np.isnan(depth), [[True, False], [False, True]])


def test_lists_may_name_no_pipe_and_no_device(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs pipes in the file system")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "list.txt").write_text(f"pipe.png\n/dev/zero\n{'a' * 5000}\n")
    for item, words in zip(
        list_items([tmp_path / "list.txt"]), ("a pipe", "a device", "too long"), strict=True
    ):
        assert not isinstance(item, Damaged)
        with pytest.raises((ValueError, OSError), match=words):
            item.read()
    with pytest.raises(ValueError, match=r"pipe\.png: a pipe or a device"):
        list(list_items([tmp_path / "pipe.png"]))


def test_a_damaged_safetensors_file_is_named_in_a_short_line(tmp_path):
    path = tmp_path / "a.safetensors"
    readers = (read_tensors, load_head, upfeat.load_upsampler, upfeat.JBUStack.from_featup)
    long = json.dumps({"weight": {"dtype": "[" * 5000}}).encode()
    for content in (b"\3\0\0\0", b"\xff" * 60, len(long).to_bytes(8, "little") + long):
        path.write_bytes(content)
        for read in readers:
            with pytest.raises(ValueError, match=r"a\.safetensors: not a whole") as refused:
                read(path)
            assert len(str(refused.value)) < 400


def test_facts_of_an_upsampler_name_its_file(tmp_path):
    upfeat.AnyUp(width=16, heads=2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name, value in (("mean", ["x"] * 900), ("std", [0, 1, 1]), ("std", [10**400, 1, 1])):
        path.write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=rf"config\.json: .*{name}=") as refused:
            upfeat.load_upsampler(tmp_path)
        assert len(str(refused.value)) < 400


def test_weights_beyond_sense_name_their_file(tmp_path):
    state = published_state(upfeat.AnyUp())
    name = next(key for key, one in state.items() if one.dim() == 1)
    state[name] = torch.full_like(state[name], 1e20)
    torch.save(state, tmp_path / "up.pth")
    with pytest.raises(ValueError, match=r"up\.pth: weights of AnyUp: .* holds 1e\+20"):
        upfeat.load_upsampler(tmp_path / "up.pth")


def _load_translation(path):
    return Translation.load(path, BACKBONE)


def test_pickles_that_end_within_a_number_are_damaged(tmp_path):
    content = io.BytesIO()
    torch.save({"a": torch.ones(2), "n": 70_000}, content, _use_new_zipfile_serialization=False)
    whole = content.getvalue()
    for cut in range(0, len(whole), 41):
        for end in (b"", b"J\0", b"M", b"X\1", b"r"):
            (tmp_path / "up.pth").write_bytes(whole[:cut] + end)
            for read in (upfeat.load_upsampler, upfeat.JBUStack.from_featup):
                with pytest.raises(ValueError, match=r"up\.pth: "):
                    read(tmp_path / "up.pth")


@pytest.mark.parametrize("reader", [load_head, _load_translation])
def test_every_flip_in_a_header_is_read_alike_or_refused(tmp_path, reader):
    path = tmp_path / "file.safetensors"
    (_head if reader is load_head else _translation)(path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for place in range(0, end, 3):
        path.write_bytes(_altered(content, place, bytes([content[place] ^ 1 << place % 7])))
        message = fault(reader, path=path) or str(path)
        assert "file.safetensors" in message
        assert "\n" not in message


def test_grids_that_expand_or_are_altered_are_refused(tmp_path):
    path = write_grid(tmp_path, "a", DenseGrid(torch.ones(2, 3, 4), (24, 32), (8, 8), {}))
    read_grid(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(torch.ones(1).numpy().tobytes(), b"\0\0\0\x40", 1))
    with pytest.raises(ValueError, match=r"a\.pt: damaged: the checksum"):
        read_grid(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * (1 << 20))
    with pytest.raises(ValueError, match=r"a\.pt: unpacks to"):
        read_grid(path)


def test_settings_of_a_run_name_their_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"steps": "many"}))
    with pytest.raises(ValueError, match=r"config\.json: steps='many' must be a whole number"):
        TrainConfig.of_run(tmp_path)


def test_stored_rows_of_other_types_are_computed_again(tmp_path):
    store = RowStore(tmp_path, {})
    row = Row("nearest", "p", "w", {"miou": [0.5]}, {"a": [0.5]}, {"seconds": None})
    store.save("nearest", "w", [row])
    assert store.load("nearest", "w") == [row]
    (path,) = tmp_path.iterdir()
    (content,) = json.loads(path.read_text())
    for name, value in (
        ("scores", "x"), ("scores", {"miou": "x"}), ("scores", {"miou": ["x"]}), ("cost", []),
        ("per_class", {"a": [True]}), ("upsampler", 3), ("sums", None), ("pictures", 1),
    ):  # fmt: skip
        path.write_text(json.dumps([{**content, name: value}]))
        assert store.load("nearest", "w") is None, (name, value)


def test_an_input_that_may_not_be_read_is_not_taken_for_the_folder_of_results(tmp_path):
    def work(name):
        with locks.hold_folder(tmp_path / "out"):
            raise PermissionError(13, "Permission denied", name)

    with pytest.raises(PermissionError, match=r"input\.txt"):
        work("input.txt")
    with pytest.raises(ValueError, match="out: cannot be written"):
        work(str(tmp_path / "out" / ".lock"))


def _nyu(folder, **changes):
    h5py = pytest.importorskip("h5py")
    content = {"images": np.zeros((4, 3, 6, 4), np.uint8), "depths": np.ones((4, 6, 4), "f4")}
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        for name, value in {**content, **changes}.items():
            file[name] = value


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((4, 3, 6, 4), np.float32)},
        {"images": np.zeros((4, 1, 6, 4), np.uint8)},
        {"images": np.zeros((4, 3, 4, 6), np.uint8)},
        {"images": np.zeros(4, np.uint8)},
        {"depths": np.ones((4, 6, 4), np.uint16)},
    ],
)
def test_nyuv2_of_other_types_is_refused(tmp_path, changes):
    _nyu(tmp_path, **changes)
    with pytest.raises(ValueError, match="not the labelled NYUv2 file"):
        read_dataset(tmp_path, "depth", layout="nyuv2")


@pytest.mark.parametrize("train", [[[-1]], [[0]], [[2]], [[1.5]], [[1], [1]], np.array([["a"]])])
def test_splits_of_nyuv2_have_every_image_once(tmp_path, train):
    scipy = pytest.importorskip("scipy.io")
    _nyu(tmp_path)
    scipy.savemat(tmp_path / "splits.mat", {"trainNdxs": train, "testNdxs": [[2]]})
    with pytest.raises(ValueError, match=r"splits\.mat: not the official split"):
        read_dataset(tmp_path, "depth", layout="nyuv2")
    content = (tmp_path / "splits.mat").read_bytes()
    for place in (128, 130, 136, 144, 152):  # types and lengths of parts
        (tmp_path / "splits.mat").write_bytes(_altered(content, place, b"\x7f\xff"))
        with pytest.raises(ValueError, match=r"splits\.mat: not the official split"):
            read_dataset(tmp_path, "depth", layout="nyuv2")


def _store(folder, **options):
    from upfeat.raster.store import Store

    shape, dtype = (2, 64, 96), np.dtype("float32")
    return Store(folder / "s.zarr", shape, dtype, 64, {"a": 1}, **options)


def test_a_raster_is_resumed_with_its_own_array_alone(tmp_path):
    pytest.importorskip("zarr")
    pytest.importorskip("rasterio")
    store = _store(tmp_path)
    store.close()
    path = store.partial / "features" / "zarr.json"
    content = json.loads(path.read_text())
    _store(tmp_path, resume=True).close()
    for changes in (
        {"shape": [2, 64, 64]}, {"shape": [-1, 64, 96]}, {"data_type": "float16"},
        {"data_type": 3}, {"codecs": []}, {"zarr_format": 9}, {"node_type": None},
    ):  # fmt: skip
        path.write_text(json.dumps({**content, **changes}))
        with pytest.raises(ValueError, match=r"s\.zarr\.partial.features: damaged .*--overwrite"):
            _store(tmp_path, resume=True)
    for text in (b"", b"\xff{", b"[" * 5000):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"s\.zarr\.partial.features: damaged"):
            _store(tmp_path, resume=True)


def test_blocks_of_an_unfinished_raster_that_are_damaged_are_named(tmp_path):
    pytest.importorskip("rasterio")
    from upfeat.raster.cog import _read_block

    class Damaged:
        def __getitem__(self, place):
            raise RuntimeError("Zstd decompression error")

    with pytest.raises(ValueError, match=r"damaged at rows 0 to 3, columns 4 to 8 \(Zstd"):
        _read_block(tmp_path / "plain.tif", Damaged(), (0, 4), (4, 9))


# Of GDAL's log, in which rasterio ignores the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_raster_whose_fault_gdal_tells_in_another_encoding_is_named(tmp_path):
    pytest.importorskip("rasterio")
    from upfeat.raster import Scene

    path = tmp_path / "scene.vrt"
    start = b'<VRTDataset rasterXSize="6" rasterYSize="4">'
    for part in (b"<SRS>\xff</SRS>", b'<VRTRasterBand dataType="\xff"/>', b"<\xff/></x>", b"\xff"):
        path.write_bytes(start + part + b"</VRTDataset>")
        with pytest.raises(ValueError, match=r"scene\.vrt: ") as refused:
            Scene(path)
        assert not isinstance(refused.value, UnicodeError)


def test_a_pipe_is_no_raster(tmp_path):
    pytest.importorskip("rasterio")
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs pipes in the file system")
    from upfeat.raster import Scene

    os.mkfifo(tmp_path / "scene.tif")
    with pytest.raises(ValueError, match=r"scene\.tif: a pipe or a device"):
        Scene(tmp_path / "scene.tif")


def test_videos_with_texts_of_any_encoding_are_read(tmp_path):
    pytest.importorskip("av")
    from upfeat.frames import VideoWriter, read_frames

    path = tmp_path / "a.mp4"
    with VideoWriter(path, 10) as video:
        video.add(np.zeros((32, 32, 3), np.uint8), None)
    content = path.read_bytes()
    assert b"upfeat-video" in content
    path.write_bytes(content.replace(b"upfeat-video", b"upfe\xe9t-video"))
    assert len(list(read_frames(path))) == 1
