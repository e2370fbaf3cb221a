"""Plain folders as people have them: odd names, files of other tools, damage."""

import io
import json
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from upfeat.evaluation.data.folders import read_folder, read_photographs
from upfeat.evaluation.data.targets import read_classes, read_depth, read_indices

CLASSES = ["ground", "box"]


def write_pair(folder, image, target, kind="labels"):
    for part in ("images", kind):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4)).save(folder / "images" / image)
    if target.lower().endswith(".npy"):
        with (folder / kind / target).open("wb") as file:
            np.save(file, np.ones((4, 6), np.float32))
    else:
        Image.fromarray(np.ones((4, 6), np.uint8)).save(folder / kind / target)


@pytest.fixture
def folder(tmp_path):
    """Two good pairs, without splits."""
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    for name in "ab":
        write_pair(tmp_path, f"{name}.png", f"{name}.png")
    return tmp_path


def names(dataset):
    return sorted(sample.name for sample in dataset.train + dataset.test)


def problems(dataset):
    return {problem.name: problem.reason for problem in dataset.problems}


DECOMPOSED = unicodedata.normalize("NFD", "é")


@pytest.mark.parametrize(
    ("image", "label", "name"),
    [
        ("C.JPG", "C.PNG", "C"),
        ("c.Jpeg", "c.png", "c"),
        ("c.d.e.bmp", "c.d.e.png", "c.d.e"),
        ("c d.webp", "c d.png", "c d"),
        ("日本.tif", "日本.png", "日本"),
        (f"{DECOMPOSED}.png", "é.png", "é"),
        ("é.png", f"{DECOMPOSED}.png", "é"),
        ("-c.gif", "-c.png", "-c"),
        ("c'[1]*.png", "c'[1]*.png", "c'[1]*"),
    ],
)
def test_odd_names_find_their_partners(folder, image, label, name):
    write_pair(folder, image, label)
    dataset = read_folder(folder)
    assert names(dataset) == sorted(["a", "b", name])
    assert not dataset.problems
    (sample,) = (one for one in dataset.train + dataset.test if one.name == name)
    assert dataset.read_image(sample).shape == (3, 4, 6)
    assert (dataset.read_target(sample) == 1).all()


def test_what_has_no_partner_is_named(folder):
    write_pair(folder, "C.png", "c.png")  # two names where letters have a case
    write_pair(folder, "d.png", "d_mask.png")
    write_pair(folder, "e.png", "e.npy")  # is no label
    dataset = read_folder(folder)
    assert names(dataset) == ["a", "b"]
    assert problems(dataset) == {
        **{f"images/{name}.png": "has no label" for name in "Cde"},
        **{f"labels/{name}.png": "has no image" for name in ("c", "d_mask")},
    }


def test_one_name_twice_is_named_and_the_first_is_taken(folder):
    write_pair(folder, "a.jpg", "a.png")
    dataset = read_folder(folder)
    assert problems(dataset) == {"images/a.png": "doubles a.jpg"}
    assert names(dataset) == ["a", "b"]


def test_what_is_no_photograph_is_passed_over(folder):
    for name in (".hidden.png", "notes.txt", "Thumbs.db", "c", ".png"):
        (folder / "images" / name).write_bytes(b"x")
    (folder / "images" / "c").unlink()
    (folder / "images" / "below").mkdir()
    dataset = read_folder(folder)
    assert (names(dataset), dataset.problems) == (["a", "b"], [])


def test_val_stands_for_test_and_something_must(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    write_pair(tmp_path / "train", "a.png", "a.png")
    with pytest.raises(FileNotFoundError, match=r"has train/ but neither test/ nor val/"):
        read_folder(tmp_path)
    write_pair(tmp_path / "val", "b.png", "b.png")
    assert [one.name for one in read_folder(tmp_path).test] == ["val/b"]
    write_pair(tmp_path / "test", "c.png", "c.png")
    assert [one.name for one in read_folder(tmp_path).test] == ["test/c"]


@pytest.mark.parametrize("missing", ["images", "labels"])
def test_missing_parts_are_named(folder, missing):
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{missing}: no such folder"):
        read_folder(folder)


def test_empty_folders_have_nothing_to_score(folder):
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(
        ValueError, match=r"no usable sample to train on \(labels/a.png: has no image"
    ):
        read_folder(folder)


def test_photographs_are_found_in_the_first_of_four_places(tmp_path):
    for place in (".", "images", "val/images", "test/images"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        name = place.replace("/", "_").replace(".", "here")
        Image.new("RGB", (6, 4)).save(tmp_path / place / f"{name}.png")
        assert [one.name for one in read_photographs(tmp_path).test] == [name]


@pytest.mark.parametrize(
    ("mode", "value"), [("L", 1), ("P", 1), ("1", 1), ("I;16", 1), ("I;16", 300)]
)
def test_labels_in_every_mode_that_holds_an_index(folder, mode, value):
    array = np.full((4, 6), value, np.uint16)
    picture = Image.fromarray(array) if mode == "I;16" else Image.new(mode, (6, 4), value)
    picture.save(folder / "labels" / "a.png")
    dataset = read_folder(folder)
    (sample,) = (one for one in dataset.train + dataset.test if one.name == "a")
    if value < len(CLASSES):
        assert (dataset.read_target(sample) == 1).all()
    else:  # not brought to 8 bits, which would be class 44
        with pytest.raises(ValueError, match="class indices 300 are outside the list of 2"):
            dataset.read_target(sample)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK"])
def test_labels_of_colours_are_refused(tmp_path, mode):
    path = tmp_path / ("a.png" if mode != "CMYK" else "a.jpg")
    Image.new(mode, (6, 4)).save(path)
    with pytest.raises(ValueError, match=f"mode {mode}; labels must hold one index per pixel"):
        read_indices(path)


@pytest.mark.parametrize("cut", [0, 1, 8, 30, 60, 200, -50])
def test_labels_cut_off_are_not_readable(tmp_path, cut):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (12, 20), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="not a readable picture"):
        read_indices(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'["a", "b", "a"]', 'names the class "a" twice'),
        (b'{"classes": ["a", "b"], "ignore_index": true}', "must hold"),
        (b'{"classes": ["a", "b"], "ignore_index": "255"}', "must hold"),
        (b'{"classes": ["a", "b"], "ignore_index": 2.0}', "must hold"),
        (b'{"classes": ["a", "b"], "classes": ["c", "d"]}', "given twice"),
        (b'{"classes": {"a": 0}}', "must hold"),
        (json.dumps([str(index) for index in range(256)]).encode(), "2 to 255 names"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["a", "\xff"]', "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_class_lists_that_would_be_guessed_at_are_refused(tmp_path, content, words):
    (tmp_path / "classes.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"classes\.json: .*{words}") as raised:
        read_classes(tmp_path / "classes.json")
    assert "\n" not in str(raised.value)


def test_class_lists_are_utf_8_wherever_they_were_written(tmp_path):
    text = '{"classes": ["Straße", "空"], "ignore_index": -1}'
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "classes.json").write_text(text, encoding=encoding)
        assert read_classes(tmp_path / "classes.json") == (["Straße", "空"], -1)


@pytest.fixture
def rooms(tmp_path):
    for name, target in (("a.png", "a.NPY"), ("b.png", "b.png"), ("c.png", "c.npy")):
        write_pair(tmp_path, name, target, "depth")
    return tmp_path


def test_depth_in_its_unit_from_both_kinds_of_files(rooms):
    (rooms / "depth.json").write_text('{"scale": 0.5}', encoding="utf-8-sig")
    dataset = read_folder(rooms, "depth")
    assert names(dataset) == ["a", "b", "c"]
    for sample in dataset.train + dataset.test:
        assert (dataset.read_target(sample) == 0.5).all()


@pytest.mark.parametrize(
    "scale", ["1e400", f"1{'0' * 400}", "Infinity", "NaN", "-1", '"1"', "[1]", "null"]
)
def test_units_of_depth_that_are_none(rooms, scale):
    (rooms / "depth.json").write_text(f'{{"scale": {scale}}}')
    with pytest.raises(ValueError, match=r"depth\.json: "):
        read_folder(rooms, "depth")


def saved(save, *arrays):
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


WHOLE = saved(np.save, np.ones((4, 6)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (saved(np.savez, np.ones((4, 6))), "not a readable npy file"),
        (b"PK\3\4nonsense", "not a readable npy file"),
        (WHOLE[:-1], "not a readable npy file"),
        (WHOLE[:20], "not a readable npy file"),
        (b"", "not a readable npy file"),
        (saved(np.save, np.ones((4, 6, 1))), r"depth must be \(H, W\)"),
        (saved(np.save, np.ones((4, 6), bool)), r"holds bool of shape \(4, 6\)"),
        (saved(np.save, np.ones((4, 6), complex)), "holds complex128"),
        (saved(np.save, np.full((4, 6), np.nan)), "no depth is known"),
        (saved(np.save, np.full((4, 6), -np.inf)), "no depth is known"),
        (saved(np.save, np.eye(1)), "no depth is known"),  # of one pixel: nothing can be aligned
    ],
)
def test_depth_arrays_that_are_none(tmp_path, content, words):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_depth(tmp_path / "a.npy")


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "<u2", ">i4", "u1"])
def test_depth_arrays_of_any_number_type(tmp_path, dtype):
    values = np.array([[1, 2], [0, 3]]).astype(dtype)
    np.save(tmp_path / "a.npy", np.asfortranarray(values))
    found = read_depth(tmp_path / "a.npy", 2.0)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[2, 4], [np.nan, 6]])


def _grey_png(rows, bits):
    """A PNG file of greys of fewer than 8 bits, which Pillow cannot write."""
    lines = b""
    for row in rows:
        written = "".join(f"{value:0{bits}b}" for value in row).ljust(8, "0")
        lines += b"\0" + int(written, 2).to_bytes(len(written) // 8, "big")
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


@pytest.mark.parametrize(("bits", "rows"), [(2, [[0, 1, 2, 3], [3, 2, 1, 0]]), (4, [[9, 15]])])
def test_labels_of_few_bits_are_not_stretched_to_greys(tmp_path, bits, rows):
    """15 of 4 bits is white, which Pillow reads as 255, here the label of ignored pixels."""
    path = tmp_path / "label.png"
    path.write_bytes(_grey_png(rows, bits))
    assert read_indices(path).tolist() == rows
