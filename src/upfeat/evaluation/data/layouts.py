"""Layouts of well-known datasets as officially distributed. Nothing is downloaded.

================  ================================================================================
name              content of the folder
================  ================================================================================
``coco_stuff``    ``images/{train,val}2017/*.jpg``, ``annotations/{train,val}2017/*.png`` (the
                  stuff-and-things pixel maps: 0 to 181, 255 unlabelled), optionally ``labels.txt``
``coco_stuff27``  the same files; classes are merged into the 27 supercategories
``ade20k``        ``images/{training,validation}/*.jpg``,
                  ``annotations/{training,validation}/*.png`` (ADEChallengeData2016: 0 other, 1 to
                  150), optionally ``objectInfo150.txt``
``cityscapes``    ``leftImg8bit/{train,val}/CITY/*_leftImg8bit.png``,
                  ``gtFine/{train,val}/CITY/*_gtFine_labelIds.png``
``voc``           ``JPEGImages``, ``SegmentationClass``, ``ImageSets/Segmentation/{train,val}.txt``
                  (``VOCdevkit/VOC2012``)
``nyuv2``         ``nyu_depth_v2_labeled.mat``, optionally ``splits.mat`` (the official split;
                  without it a random quarter is the test split); depth. Needs h5py, and SciPy for
                  the split
================  ================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upfeat.evaluation.data.folders import (
    Dataset,
    Problem,
    Sample,
    Task,
    check_not_empty,
    existing,
    read_folder,
)
from upfeat.evaluation.data.nyuv2 import read_nyuv2
from upfeat.evaluation.data.targets import (
    IGNORE_INDEX,
    checked_label,
    read_indices,
)
from upfeat.registry import unknown_name

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOC_CLASSES: list[str] = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]

# The 19 classes that the benchmark scores, by their values in label files.
CITYSCAPES_CLASSES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}

# The 27 supercategories of COCO-Stuff (Ji, Henriques and Vedaldi, 2019), with the label values of
# the classes that each contains.
COCO_SUPERCATEGORIES = {
    "electronic": "71-76",
    "appliance": "77-82",
    "food": "51-60",
    "furniture": "61-70",
    "indoor": "83-90",
    "kitchen": "43-50",
    "accessory": "25-32",
    "animal": "15-24",
    "outdoor": "9-14",
    "person": "0",
    "sports": "33-42",
    "vehicle": "1-8",
    "ceiling": "101-102",
    "floor": "100 113-117",
    "food stuff": "120-121 152 169",
    "furniture stuff": "97 106-107 109 111 122 129 132 155 160 164",
    "raw material": "99 131 138 142",
    "textile": "91-92 103-104 108 130 136 140 151 166-167",
    "wall": "170-176",
    "window": "179-180",
    "building": "94-95 127 150 157 165",
    "ground": "110 124-125 135 139 143-144 146 148 153 158",
    "plant": "93 96 118 123 128 133 141 162 168",
    "sky": "105 156",
    "solid": "126 134 149 159 161 181",
    "structural": "98 112 137 145 163",
    "water": "119 147 154 177-178",
}

_ADE20K_CLASSES = 150
_COCO_CLASSES = 182


def read_dataset(
    folder: str | Path, task: Task = "seg", *, layout: str = "folder", split_seed: int = 0
) -> Dataset:
    """List a dataset in any known layout.

    Args:
        folder: folder of the dataset.
        task: ``seg`` or ``depth``.
        layout: ``folder`` (see :func:`read_folder`) or a name of :data:`LAYOUTS`.
        split_seed: seed of random splits.

    Raises:
        FileNotFoundError: files of the layout are missing.
        ValueError: the layout is unknown or for another task, or a split is empty.
    """
    folder = Path(folder)
    if layout == "folder":
        return read_folder(folder, task, split_seed=split_seed)
    if layout in ELSEWHERE:
        raise ValueError(f"layout={layout} is for the task {ELSEWHERE[layout]}, not {task}")
    if layout not in LAYOUTS:
        raise ValueError(unknown_name("layout", str(layout), ["folder", *LAYOUTS]))
    own_task, reader = LAYOUTS[layout]
    if own_task != task:
        raise ValueError(f"layout={layout} is for the task {own_task}, not {task}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    dataset = reader(folder, split_seed)
    check_not_empty(dataset, folder)
    return dataset


def _read_coco_stuff(folder: Path, split_seed: int) -> Dataset:
    names = [f"class {index}" for index in range(_COCO_CLASSES)]
    listed = folder / "labels.txt"
    if listed.is_file():
        # Lines are "index: name" with index 0 for unlabelled; pixel values are one less.
        for line in _lines(listed):
            index, _, name = line.partition(":")
            if index.strip().isdecimal() and 1 <= int(index) <= _COCO_CLASSES:
                names[int(index) - 1] = name.strip()
    problems: list[Problem] = []
    train, test = (_annotated(folder, split, problems) for split in ("train2017", "val2017"))
    table = _table({index: index for index in range(_COCO_CLASSES)}, {IGNORE_INDEX})
    return _dataset("coco_stuff", train, test, names, table, problems)


def _read_coco_stuff27(folder: Path, split_seed: int) -> Dataset:
    problems: list[Problem] = []
    train, test = (_annotated(folder, split, problems) for split in ("train2017", "val2017"))
    classes = {
        value: index
        for index, runs in enumerate(COCO_SUPERCATEGORIES.values())
        for value in _numbers(runs)
    }
    table = _table(classes, {IGNORE_INDEX})
    return _dataset("coco_stuff27", train, test, list(COCO_SUPERCATEGORIES), table, problems)


def _numbers(runs: str) -> list[int]:
    """Read a list of numbers and of runs, such as "98 112-114"."""
    found = []
    for run in runs.split():
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _read_ade20k(folder: Path, split_seed: int) -> Dataset:
    names = [f"class {index + 1}" for index in range(_ADE20K_CLASSES)]
    listed = folder / "objectInfo150.txt"
    if listed.is_file():
        # A line of headings, then tab-separated columns: index, ratio, two counts, names.
        for line in _lines(listed)[1:]:
            columns = line.split("\t")
            if columns[0].strip().isdecimal() and 1 <= int(columns[0]) <= _ADE20K_CLASSES:
                names[int(columns[0]) - 1] = columns[-1].partition(",")[0].strip()
    problems: list[Problem] = []
    train, test = (_annotated(folder, split, problems) for split in ("training", "validation"))
    table = _table({index + 1: index for index in range(_ADE20K_CLASSES)}, {0})
    return _dataset("ade20k", train, test, names, table, problems)


def _read_cityscapes(folder: Path, split_seed: int) -> Dataset:
    ending = "_leftImg8bit.png"
    problems: list[Problem] = []

    def label(path: Path) -> Path:
        stem = path.name.removesuffix(ending)
        split, city = path.parts[-3], path.parts[-2]
        return folder / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png"

    train, test = (
        _pair_by_name(_files(folder / "leftImg8bit" / split, f"*/*{ending}"), label, problems)
        for split in ("train", "val")
    )
    ids = list(CITYSCAPES_CLASSES)
    ignored = set(range(34)) - set(ids) | {IGNORE_INDEX}
    table = _table({own: index for index, own in enumerate(ids)}, ignored)
    names = list(CITYSCAPES_CLASSES.values())
    return _dataset("cityscapes", train, test, names, table, problems)


def _read_voc(folder: Path, split_seed: int) -> Dataset:
    problems: list[Problem] = []

    def listed(split: str) -> Iterable[Path]:
        names = _lines(existing(folder / "ImageSets" / "Segmentation" / f"{split}.txt"))
        return (folder / "JPEGImages" / f"{name.strip()}.jpg" for name in names if name.strip())

    train, test = (
        _pair_by_name(
            listed(split),
            lambda path: folder / "SegmentationClass" / f"{path.stem}.png",
            problems,
        )
        for split in ("train", "val")
    )
    table = _table({index: index for index in range(len(VOC_CLASSES))}, {IGNORE_INDEX})
    return _dataset("voc", train, test, VOC_CLASSES, table, problems)


LAYOUTS: dict[str, tuple[Task, Callable[[Path, int], Dataset]]] = {
    "coco_stuff": ("seg", _read_coco_stuff),
    "coco_stuff27": ("seg", _read_coco_stuff27),
    "ade20k": ("seg", _read_ade20k),
    "cityscapes": ("seg", _read_cityscapes),
    "voc": ("seg", _read_voc),
    "nyuv2": ("depth", read_nyuv2),
}
"""Known layouts by name, each with its task and its reader."""

ELSEWHERE = {"spair": "correspondence", "davis": "propagation"}
"""Layouts that other modules read, with the tasks that use them."""


def _dataset(
    name: str,
    train: list[Sample],
    test: list[Sample],
    classes: list[str],
    table: NDArray[np.int64],
    problems: list[Problem],
) -> Dataset:
    def label(sample: Sample) -> NDArray[np.uint8]:
        indices = read_indices(sample.target)
        if int(indices.max(initial=0)) >= len(table):
            raise ValueError(f"label value {int(indices.max())} is not one of {name}")
        mapped = table[indices]
        strange = np.unique(indices[mapped < 0])
        if len(strange):
            shown = ", ".join(map(str, strange[:5].tolist()))
            raise ValueError(f"label values {shown} are not among those of {name}")
        return checked_label(mapped, len(classes))

    return Dataset(name, train, test, classes, label, problems=problems)


def _table(classes: dict[int, int], ignored: set[int]) -> NDArray[np.int64]:
    """Map label values, 0 to 255, to class indices: 255 for ignored, −1 for invalid values."""
    table = np.full(256, -1, np.int64)
    table[sorted(ignored)] = IGNORE_INDEX
    for value, index in classes.items():
        table[value] = index
    return table


def _annotated(folder: Path, split: str, problems: list[Problem]) -> list[Sample]:
    """List photographs ``images/SPLIT/NAME.jpg`` with ``annotations/SPLIT/NAME.png``."""
    return _pair_by_name(
        _files(folder / "images" / split, "*.jpg"),
        lambda path: folder / "annotations" / split / f"{path.stem}.png",
        problems,
    )


def _files(folder: Path, pattern: str) -> list[Path]:
    """List a folder's files, but hidden ones such as ._a.jpg of macOS, in one order everywhere."""
    found = [one for one in existing(folder).glob(pattern) if not one.name.startswith(".")]
    return sorted(found, key=Path.as_posix)  # paths of Windows sort without regard to case


def _lines(path: Path) -> list[str]:
    """Read the lines of a list in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a list in UTF-8 ({error})") from None


def _pair_by_name(
    images: Iterable[Path], label: Callable[[Path], Path], problems: list[Problem]
) -> list[Sample]:
    samples = []
    for image in images:
        target = label(image)
        missing = next((path for path in (image, target) if not path.is_file()), None)
        if missing is None:
            samples.append(Sample(f"{image.parent.name}/{image.stem}", image, target))
        else:
            problems.append(Problem(f"{image.parent.name}/{image.stem}", f"{missing} is missing"))
    return samples
