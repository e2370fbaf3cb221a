"""Known datasets on tiny generated copies of their official layouts."""

import sys

import numpy as np
import pytest
from PIL import Image

from upfeat.evaluation.data.layouts import CITYSCAPES_CLASSES, LAYOUTS, VOC_CLASSES, read_dataset

VALUES = {
    # What label files hold, and the class each value must become.
    "coco_stuff": ([0, 181, 255], [0, 181, 255]),
    "coco_stuff27": ([0, 5, 93, 181, 255], [9, 11, 22, 24, 255]),
    "ade20k": ([0, 1, 150], [255, 0, 149]),
    "cityscapes": ([7, 33, 0, 6], [0, 18, 255, 255]),
    "voc": ([0, 20, 255], [0, 20, 255]),
}
PATHS = {
    "coco_stuff": ("images/{}2017/{}.jpg", "annotations/{}2017/{}.png", ("train", "val")),
    "coco_stuff27": ("images/{}2017/{}.jpg", "annotations/{}2017/{}.png", ("train", "val")),
    "ade20k": ("images/{}/{}.jpg", "annotations/{}/{}.png", ("training", "validation")),
    "cityscapes": (
        "leftImg8bit/{}/ulm/{}_leftImg8bit.png",
        "gtFine/{}/ulm/{}_gtFine_labelIds.png",
        ("train", "val"),
    ),
    "voc": ("JPEGImages/{}_{}.jpg", "SegmentationClass/{}_{}.png", ("train", "val")),
}


def write(layout, root):
    """Two images of each split, and one that lacks its label."""
    image, label, splits = PATHS[layout]
    values = np.resize(VALUES[layout][0], (16, 24)).astype(np.uint8)
    for split in splits:
        names = []
        for name in ("x_000000_000019", "y_000001_000019", "z_000002_000019"):
            for pattern, content in ((image, np.zeros((16, 24, 3), np.uint8)), (label, values)):
                path = root / pattern.format(split, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
            names.append(f"{split}_{name}")
        (root / label.format(split, name)).unlink()
        if layout == "voc":
            lists = root / "ImageSets" / "Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.mark.parametrize("layout", sorted(VALUES))
def test_segmentation_layouts(layout, tmp_path):
    dataset = read_dataset(write(layout, tmp_path), layout=layout)
    assert (len(dataset.train), len(dataset.test), len(dataset.problems)) == (2, 2, 2)
    assert "is missing" in str(dataset.problems[0])
    expected = np.resize(VALUES[layout][1], (16, 24))
    for sample in dataset.train + dataset.test:
        assert (dataset.read_target(sample) == expected).all()
        assert dataset.read_image(sample).shape == (3, 16, 24)
    counts = {"coco_stuff": 182, "coco_stuff27": 27, "ade20k": 150, "cityscapes": 19, "voc": 21}
    count = counts[layout]
    assert len(dataset.classes) == len(set(dataset.classes)) == count


def test_voc_labels_are_palette_pictures(tmp_path):
    dataset = read_dataset(write("voc", tmp_path), layout="voc")
    path = dataset.train[0].target
    expected = np.resize([0, 20, 255], (16, 24))
    picture = Image.new("P", (24, 16))
    picture.putdata(expected.flatten().tolist())
    # The official colours: bits of the index spread over red, green and blue, from the top.
    colours = [
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]
    picture.putpalette(colours)
    picture.save(path)
    with Image.open(path) as saved:
        assert saved.mode == "P"
    assert (dataset.read_target(dataset.train[0]) == expected).all()


@pytest.mark.parametrize(("layout", "strange"), [("voc", 21), ("ade20k", 151), ("cityscapes", 40)])
def test_strange_label_values_are_refused(layout, strange, tmp_path):
    dataset = read_dataset(write(layout, tmp_path), layout=layout)
    Image.new("L", (24, 16), strange).save(dataset.train[0].target)
    with pytest.raises(ValueError, match=str(strange)):
        dataset.read_target(dataset.train[0])


def test_class_names():
    assert len(VOC_CLASSES) == 21
    assert len(CITYSCAPES_CLASSES) == 19


def test_every_class_of_coco_stuff_has_one_supercategory(tmp_path):
    dataset = read_dataset(write("coco_stuff27", tmp_path), layout="coco_stuff27")
    values = np.arange(16 * 24, dtype=np.uint8).reshape(16, 24) % 182
    Image.fromarray(values).save(dataset.train[0].target)
    merged = dataset.read_target(dataset.train[0]).flatten()[:182]
    assert np.bincount(merged, minlength=27).all()
    assert set(merged[:91]) == set(range(12))  # things come first


def test_names_from_the_lists_that_come_along(tmp_path):
    root = write("coco_stuff", tmp_path / "coco")
    (root / "labels.txt").write_text("0: unlabeled\n1: person\n182: wood\n")
    assert read_dataset(root, layout="coco_stuff").classes[::181] == ["person", "wood"]
    root = write("ade20k", tmp_path / "ade")
    lines = (
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t5\t5\t1\twall, side\n150\t0\t1\t1\t0\tflag\n"
    )
    (root / "objectInfo150.txt").write_text(lines)
    assert read_dataset(root, layout="ade20k").classes[::149] == ["wall", "flag"]


def test_nyuv2(tmp_path):
    h5py = pytest.importorskip("h5py")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (8, 3, 24, 16)).astype(np.uint8)  # (N, 3, W, H)
    depths = random.uniform(1, 5, (8, 24, 16)).astype(np.float32)
    depths[3, 2, 1] = 0
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"] = images, depths
    dataset = read_dataset(tmp_path, "depth", layout="nyuv2")
    assert (len(dataset.train), len(dataset.test)) == (6, 2)
    sample = next(s for s in dataset.train + dataset.test if s.index == 3)
    depth, image = dataset.read_target(sample), dataset.read_image(sample)
    assert depth.shape == (16, 24)
    assert np.isnan(depth[1, 2])
    assert depth[5, 7] == depths[3, 7, 5]
    assert image.shape == (3, 16, 24)
    assert float(image[2, 5, 7]) == pytest.approx(images[3, 2, 7, 5] / 255)
    assert dataset.identify(sample) != dataset.identify(dataset.train[0])


def test_nyuv2_with_its_official_split(tmp_path):
    h5py, scipy = pytest.importorskip("h5py"), pytest.importorskip("scipy.io")
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.zeros((5, 3, 24, 16), np.uint8)
        file["depths"] = np.ones((5, 24, 16), np.float32)
    numbers = {"trainNdxs": np.array([[5], [1], [2]]), "testNdxs": np.array([[4], [3]])}
    scipy.savemat(tmp_path / "splits.mat", numbers)
    dataset = read_dataset(tmp_path, "depth", layout="nyuv2")
    assert [sample.index for sample in dataset.train] == [0, 1, 4]
    assert [sample.name for sample in dataset.test] == ["0003", "0004"]
    for wrong in ({"trainNdxs": [[9]], "testNdxs": [[1]]}, {"trainNdxs": [[1]]}):
        scipy.savemat(tmp_path / "splits.mat", wrong)
        with pytest.raises(ValueError, match="not the official split"):
            read_dataset(tmp_path, "depth", layout="nyuv2")
    (tmp_path / "splits.mat").write_text("text")
    with pytest.raises(ValueError, match="not the official split"):
        read_dataset(tmp_path, "depth", layout="nyuv2")


def test_nyuv2_that_is_no_such_file(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "nyu_depth_v2_labeled.mat").write_text("text")
    with pytest.raises(ValueError, match="not the labelled NYUv2 file"):
        read_dataset(tmp_path, "depth", layout="nyuv2")


def test_wrong_layouts(tmp_path):
    for layout, (task, _) in LAYOUTS.items():
        if layout != "nyuv2":
            with pytest.raises(FileNotFoundError, match="is the layout right"):
                read_dataset(tmp_path, task, layout=layout)
        other = "seg" if task == "depth" else "depth"
        with pytest.raises(ValueError, match="is for the task"):
            read_dataset(tmp_path, other, layout=layout)
    with pytest.raises(ValueError, match="did you mean cityscapes"):
        read_dataset(tmp_path, layout="cityscape")


def test_lists_are_read_as_utf_8_line_by_line(tmp_path):
    """A mark at the start, blank lines and Windows' line ends are no part of a name."""
    root = write("voc", tmp_path / "voc")
    listed = root / "ImageSets" / "Segmentation" / "train.txt"
    names = listed.read_text().split()
    listed.write_bytes("\ufeff".encode() + "\r\n\r\n".join(names).encode() + b" \r\n\n")
    dataset = read_dataset(root, layout="voc")
    assert [sample.image.stem for sample in dataset.train] == names[:2]
    assert len(dataset.problems) == 2
    listed.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"train\.txt: not a list in UTF-8"):
        read_dataset(root, layout="voc")


def test_lines_that_name_no_class_are_passed_over(tmp_path):
    root = write("coco_stuff", tmp_path / "coco")
    lines = ["²: squared", "0: unlabeled", "183: beyond", "wood", "-1: no", "", "2: vélo: pliant"]
    (root / "labels.txt").write_text("\n".join(lines), encoding="utf-8")
    classes = read_dataset(root, layout="coco_stuff").classes
    assert classes[:3] == ["class 0", "vélo: pliant", "class 2"]
    root = write("ade20k", tmp_path / "ade")
    (root / "objectInfo150.txt").write_text("1\tx\n²\ty\n0\tz\n151\tz\n2\n", encoding="utf-8")
    assert read_dataset(root, layout="ade20k").classes[:3] == ["class 1", "2", "class 3"]


@pytest.mark.parametrize("layout", sorted(VALUES))
def test_layouts_of_which_a_split_is_empty(layout, tmp_path):
    root = write(layout, tmp_path)
    for path in root.rglob("*.png"):
        if "val" in path.as_posix():
            path.unlink()
    with pytest.raises(ValueError, match=r"no usable sample to test on") as raised:
        read_dataset(root, layout=layout)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(("library", "package"), [("h5py", "h5py"), ("scipy.io.matlab", "scipy")])
def test_libraries_that_are_missing_are_named(tmp_path, monkeypatch, library, package):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.zeros((2, 3, 6, 4), np.uint8)
        file["depths"] = np.ones((2, 6, 4), np.float32)
    (tmp_path / "splits.mat").write_text("text")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"to read it, pip install {package}"):
        read_dataset(tmp_path, "depth", layout="nyuv2")


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_folders_that_are_not_there_are_named(layout, tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        read_dataset(tmp_path / "none", LAYOUTS[layout][0], layout=layout)


def test_values_beyond_a_byte_are_strange_too(tmp_path):
    dataset = read_dataset(write("voc", tmp_path), layout="voc")
    Image.fromarray(np.full((16, 24), 300, np.uint16)).save(dataset.train[0].target)
    with pytest.raises(ValueError, match="label value 300 is not one of voc"):
        dataset.read_target(dataset.train[0])


def test_nyuv2_of_which_a_depth_map_is_missing(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    for images, depths, words in ((4, 3, "4 images but 3 depth"), (None, 3, "not the labelled")):
        with h5py.File(path, "w") as file:
            if images:
                file["images"] = np.zeros((images, 3, 6, 4), np.uint8)
            file["depths"] = np.ones((depths, 6, 4), np.float32)
        with pytest.raises(ValueError, match=words):
            read_dataset(tmp_path, "depth", layout="nyuv2")
