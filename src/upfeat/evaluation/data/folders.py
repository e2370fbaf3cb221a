"""Labelled photographs in plain folders, checked before anything is computed from them.

A folder contains ``train/`` and ``test/`` (or ``val/``), each with ``images/`` and ``labels/`` (or
``depth/``). A folder with ``images/`` and ``labels/`` alone is split at random by a seed.
``images/NAME.*`` belongs to ``labels/NAME.png`` or ``depth/NAME.png|npy``.

Unusable files are left out and listed as a :class:`Problem`. If no usable sample of a split
remains, the folder is refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from upfeat.bounds import number
from upfeat.evaluation.data.targets import checked_label, read_classes, read_depth, read_indices
from upfeat.images import read_image
from upfeat.strict_json import read_value

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIELD_OF_VIEW = 60.0
"""Horizontal field of view, degrees, of depth maps whose camera is unknown."""

Task = Literal["seg", "depth"]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".gif"}
_TARGET_FOLDERS = {"seg": "labels", "depth": "depth"}
_TARGET_SUFFIXES: dict[str, tuple[str, ...]] = {"seg": (".png",), "depth": (".png", ".npy")}


@dataclass(frozen=True)
class Sample:
    """Files of one photograph and its target.

    Attributes:
        name: name in results and problems, unique within the split.
        image: file of the photograph.
        target: file of the label or depth map.
        index: position of the sample in a file that contains many samples.
        group: name of the samples that are used together or not at all, such as the frames of a
            video; empty for a sample on its own.
    """

    name: str
    image: Path
    target: Path
    index: int = 0
    group: str = ""

    @property
    def unit(self) -> str:
        """Name of what is drawn or left out as a whole: the group, or the sample on its own."""
        return self.group or self.name


@dataclass(frozen=True)
class Problem:
    """An omission from an evaluation or a weakness of its data, with the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass
class Dataset:
    """Photographs of two splits, with functions that read them.

    Attributes:
        name: name in results.
        train: samples to fit probes on.
        test: samples to score.
        classes: names of classes by index; empty for depth.
        read_target: function that reads a sample's target: (H, W) uint8 class indices with 255 for
            ignored, (H, W) float32 depths with NaN for unknown, or ``None`` without labels.
        read_image: function that reads a sample's photograph, RGB (3, H, W) in [0, 1].
        problems: omissions so far, and their reasons.
        identify: function that returns bytes that change whenever the sample's content does.
        reading: further facts on which targets depend, such as the unit of depth maps.
        splits: names of the splits, which must not be empty.
        field_of_view: horizontal field of view of the camera of depth maps, degrees.
    """

    name: str
    train: list[Sample]
    test: list[Sample]
    classes: list[str]
    read_target: Callable[[Sample], NDArray[Any] | None]
    read_image: Callable[[Sample], Tensor] = field(default=lambda sample: read_image(sample.image))
    problems: list[Problem] = field(default_factory=list)
    identify: Callable[[Sample], bytes] = field(
        default=lambda sample: sample.image.read_bytes() + sample.target.read_bytes()
    )
    reading: str = ""
    splits: tuple[str, ...] = ("train", "test")
    field_of_view: float = FIELD_OF_VIEW

    @property
    def facts(self) -> dict[str, Any]:
        """Further JSON values for ``Results.data``, on which scores depend; by default none."""
        return {}


def read_folder(folder: str | Path, task: Task = "seg", *, split_seed: int = 0) -> Dataset:
    """List a plain folder.

    Args:
        folder: a folder as described at the top of this module. ``classes.json`` contains
            ``{"classes": [names]}``, optionally with ``"ignore_index"``, or only the list of names.
            ``depth.json`` may contain ``{"scale": s, "field_of_view": a}``: depth is s times the
            value in the depth map (default 1), and the camera's horizontal field of view is a
            degrees (default 60).
        task: kind of the targets, ``seg`` or ``depth``.
        split_seed: seed of the random quarter of the samples that becomes the test split, for a
            folder without splits.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks ``images/``, targets or
            ``classes.json``.
        ValueError: ``classes.json`` or ``depth.json`` has other content, or a split is empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    reader, classes, reading = _target_reader(folder, task)
    field_of_view = FIELD_OF_VIEW if task == "seg" else read_camera(folder)[1]
    problems: list[Problem] = []
    if (folder / "train").is_dir():
        test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
        if test is None:
            raise FileNotFoundError(f"{folder}: has train/ but neither test/ nor val/")
        splits = [_pair(part, task, problems, f"{part.name}/") for part in (folder / "train", test)]
    else:
        splits = list(split_randomly(_pair(folder, task, problems), seed=split_seed))
    name = folder.resolve().name
    train, test = splits
    dataset = Dataset(name, train, test, classes, reader, problems=problems, reading=reading)
    dataset.field_of_view = field_of_view
    check_not_empty(dataset, folder)
    return dataset


def read_camera(folder: Path) -> tuple[float, float]:
    """Read the unit of depth maps, and the horizontal field of view in degrees, from a folder.

    Raises:
        ValueError: ``depth.json`` exists and has other content.
    """
    path = folder / "depth.json"
    if not path.is_file():
        return 1.0, FIELD_OF_VIEW
    content = read_value(path)
    found = content if isinstance(content, dict) else {}
    scale = number(f"{path}: scale", found.get("scale"), 0, above=True)
    angle = number(f"{path}: field_of_view", found.get("field_of_view", FIELD_OF_VIEW), 1, 170)
    return scale, angle


def read_photographs(folder: str | Path, *, split_seed: int | None = None) -> Dataset:
    """List photographs without labels in ``test/images``, ``images`` or the folder itself.

    Args:
        folder: folder of the photographs.
        split_seed: seed of the split ``train``, which is ``train/images`` if this folder exists
            next to ``test/images``, and otherwise all photographs but a quarter drawn at random.
            ``None`` for no split ``train``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a split has no photograph.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    places = [folder / "test" / "images", folder / "val" / "images", folder / "images", folder]
    place = next(path for path in places if path.is_dir())
    problems: list[Problem] = []
    train, test = [], _photographs(place, problems)
    if split_seed is not None:
        apart = folder / "train" / "images"
        if place in places[:2] and apart.is_dir():
            train = _photographs(apart, problems)
        else:
            train, test = split_randomly(test, seed=split_seed)
    splits = ("test",) if split_seed is None else ("train", "test")
    name = folder.resolve().name
    dataset = Dataset(name, train, test, [], lambda sample: None, problems=problems, splits=splits)
    check_not_empty(dataset, folder)
    return dataset


def split_randomly(
    samples: list[Sample], *, seed: int = 0, test_fraction: float = 0.25
) -> tuple[list[Sample], list[Sample]]:
    """Split samples into train and test; the split depends on the seed, not on their order.

    Args:
        samples: samples to split; with fewer than two, a split is empty.
        seed: seed of the permutation.
        test_fraction: fraction of samples in the test split, which has at least one sample.

    Returns:
        Samples of the train split and of the test split.
    """
    ordered = sorted(samples, key=lambda sample: sample.name)
    shuffled = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(round(len(ordered) * test_fraction), 1), len(ordered))
    chosen = set(shuffled[:count])
    train = [sample for index, sample in enumerate(ordered) if index not in chosen]
    return train, [sample for index, sample in enumerate(ordered) if index in chosen]


def subset(samples: list[Sample], limit: int | None, *, seed: int = 0) -> list[Sample]:
    """Return the samples of at most ``limit`` units, drawn by ``seed``, in their original order."""
    units = list(dict.fromkeys(sample.unit for sample in samples))
    if limit is None or limit >= len(units):
        return samples
    generator = torch.Generator().manual_seed(seed)
    chosen = {units[index] for index in torch.randperm(len(units), generator=generator)[:limit]}
    return [sample for sample in samples if sample.unit in chosen]


def existing(path: Path) -> Path:
    """Return a path of a layout, which must exist."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; is the layout right?")
    return path


def check_not_empty(dataset: Dataset, folder: Path) -> None:
    """Refuse a dataset with an empty split.

    Raises:
        ValueError: a split has no sample; the first problems are in the message.
    """
    for name in dataset.splits:
        if not getattr(dataset, name):
            reasons = "; ".join(map(str, dataset.problems[:3])) or "no photographs were found"
            more = f" and {len(dataset.problems) - 3} more" if len(dataset.problems) > 3 else ""
            raise ValueError(f"{folder}: no usable sample to {name} on ({reasons}{more})")


def _target_reader(
    folder: Path, task: Task
) -> tuple[Callable[[Sample], NDArray[Any]], list[str], str]:
    """Return the function that reads targets, the names of classes, and ``Dataset.reading``."""
    if task == "seg":
        classes, ignore = read_classes(folder / "classes.json")

        def label(sample: Sample) -> NDArray[np.uint8]:
            return checked_label(read_indices(sample.target), len(classes), ignore)

        return label, classes, f"ignore_index={ignore}"
    scale, _ = read_camera(folder)
    return (lambda sample: read_depth(sample.target, scale)), [], f"scale={scale}"


def _pair(folder: Path, task: Task, problems: list[Problem], prefix: str = "") -> list[Sample]:
    """Match photographs with targets by name; files without a partner are added to problems."""
    images = by_stem(folder / "images", tuple(IMAGE_SUFFIXES), problems, prefix)
    kind = _TARGET_FOLDERS[task]
    targets = by_stem(folder / kind, _TARGET_SUFFIXES[task], problems, prefix)
    what = "label" if task == "seg" else "depth map"
    problems += [
        Problem(f"{prefix}images/{images[stem].name}", f"has no {what}")
        for stem in sorted(set(images) - set(targets))
    ]
    problems += [
        Problem(f"{prefix}{kind}/{targets[stem].name}", "has no image")
        for stem in sorted(set(targets) - set(images))
    ]
    return [
        Sample(prefix + stem, images[stem], targets[stem])
        for stem in sorted(set(images) & set(targets))
    ]


def _photographs(folder: Path, problems: list[Problem]) -> list[Sample]:
    found = by_stem(folder, tuple(IMAGE_SUFFIXES), problems, "")
    return [Sample(stem, path, path) for stem, path in sorted(found.items())]


def by_stem(
    folder: Path, suffixes: tuple[str, ...], problems: list[Problem], prefix: str
) -> dict[str, Path]:
    """List files by their names without suffix, sorted; a name's second file is a problem.

    Args:
        folder: folder of the files.
        suffixes: suffixes in lower case; other files are passed over.
        problems: list to extend.
        prefix: path of the folder's parent in the names of problems, with a slash, or empty.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    # By name, since paths of Windows sort without regard to case.
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        # File names write an accented letter as one or two characters, depending on the system
        # where they were created, so names are normalised before they are matched.
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in found:
            other = found[stem].name
            problems.append(Problem(f"{prefix}{folder.name}/{path.name}", f"doubles {other}"))
        else:
            found[stem] = path
    return found
