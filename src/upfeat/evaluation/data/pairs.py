"""Pairs of photographs with corresponding points, in plain folders and as SPair-71k has them.

A plain folder contains ``images/`` and ``pairs.json``, a list of objects:

* ``source``, ``target``: names of files in ``images/``;
* ``source_points``, ``target_points``: equally many points [x, y], in pixels of each image, where
  [0, 0] is the centre of the top left pixel;
* ``box``: [x0, y0, x1, y1], the target's object, whose longer side is the unit of errors; without
  it, the whole target image;
* ``category``: name of a group of pairs with a score of its own; optional.

SPair-71k is read as distributed: ``Layout/large/test.txt`` lists the pairs,
``PairAnnotation/test/*.json`` describes them, ``JPEGImages/CATEGORY/*.jpg`` are the images.

Unusable pairs are left out and listed as a :class:`Problem`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from upfeat.bounds import number, shown
from upfeat.decoding import image_size
from upfeat.evaluation.data.folders import Dataset, Problem, Sample, check_not_empty
from upfeat.failures import one_line
from upfeat.strict_json import read_object, read_value
from upfeat.types import Size

LAYOUTS = ("folder", "spair")
"""Names of the layouts."""

_LARGEST = 1 << 28
"""Largest size of ``pairs.json``, bytes; a pair takes some hundreds."""

Point = tuple[float, float]
"""(x, y) in pixels of an image file; whole numbers are pixel centres."""


@dataclass(frozen=True)
class Pair:
    """Two images with corresponding points.

    Attributes:
        name: name in problems.
        source: name of the sample in which points are given.
        target: name of the sample in which they are searched.
        source_points: N points of the source, in pixels of its file.
        target_points: N points of the target, in the same order.
        side: longer side of the target's object, pixels of the target's file.
        category: name of the pair's group; empty for none.
    """

    name: str
    source: str
    target: str
    source_points: tuple[Point, ...]
    target_points: tuple[Point, ...]
    side: float
    category: str


@dataclass
class PairedDataset(Dataset):
    """Images, all in the split ``test``, and pairs of them.

    Attributes:
        pairs: pairs to score.
        sizes: (height, width) of the file of every sample, by name.
    """

    pairs: list[Pair] = field(default_factory=list)
    sizes: dict[str, Size] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """See :attr:`Dataset.facts`: number of pairs, and a digest of their content."""
        content = json.dumps([[asdict(pair) for pair in self.pairs], self.sizes], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()
        return {"pairs": {"number": len(self.pairs), "digest": digest}}

    def keep(self, pairs: list[Pair]) -> None:
        """Keep some of the pairs, and their images alone."""
        used = {name for pair in pairs for name in (pair.source, pair.target)}
        self.pairs = pairs
        self.test = [sample for sample in self.test if sample.name in used]

    def keep_usable(self, usable: Collection[str]) -> None:
        """Leave out pairs of which an image is not usable; they are added to the problems."""
        kept = []
        for pair in self.pairs:
            missing = next((one for one in (pair.source, pair.target) if one not in usable), None)
            if missing is None:
                kept.append(pair)
            else:
                self.problems.append(Problem(pair.name, f"its image {missing} cannot be used"))
        self.keep(kept)


def read_pairs(folder: str | Path, *, layout: str = "folder") -> PairedDataset:
    """List pairs of images.

    Args:
        folder: a folder as described at the top of this module.
        layout: ``folder`` or ``spair``.

    Raises:
        FileNotFoundError: the folder or a list of pairs does not exist.
        ValueError: the layout is for another task, a list is damaged, or no pair can be used.
    """
    folder = Path(folder)
    if layout not in LAYOUTS:
        raise ValueError(
            f"layout={shown(layout)} has no pairs of images; correspondence takes "
            f"{' or '.join(LAYOUTS)}"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    name = "spair" if layout == "spair" else folder.resolve().name
    dataset = PairedDataset(name, [], [], [], lambda sample: None, splits=("test",))
    listed = (_list_spair if layout == "spair" else _list_folder)(folder)
    reader = _Reader(dataset)
    for label, find in listed:
        reader.add(label, find)
    dataset.test = [Sample(name, path, path) for name, path in sorted(reader.images.items())]
    check_not_empty(dataset, folder)
    return dataset


def limit_pairs(dataset: PairedDataset, limit: int | None, seed: int) -> None:
    """Keep at most ``limit`` pairs, drawn at random by ``seed``, and their images."""
    if limit is not None and limit < len(dataset.pairs):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(dataset.pairs), generator=generator)[:limit].sort().values
        dataset.keep([dataset.pairs[index] for index in chosen.tolist()])


_Found = Callable[[], Mapping[str, Any]]


def _list_folder(folder: Path) -> list[tuple[str, _Found]]:
    content = read_value(folder / "pairs.json", largest=_LARGEST)
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise ValueError(
            f'{folder / "pairs.json"}: must hold a list of {{"source": …, "target": …, '
            '"source_points": [[x, y], …], "target_points": [[x, y], …]}'
        )

    def complete(one: dict[str, Any]) -> Mapping[str, Any]:
        names = {key: one[key] for key in ("source", "target") if isinstance(one.get(key), str)}
        files = {f"{key}_file": folder / "images" / name for key, name in names.items()}
        return {"box": None, "category": "", **one, **files}

    return [
        (f"pair {index}", lambda one=one: complete(one)) for index, one in enumerate(content, 1)
    ]


def _list_spair(folder: Path, split: str = "test") -> list[tuple[str, _Found]]:
    path = folder / "Layout" / "large" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; is the layout right?")
    try:
        names = path.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a list in UTF-8 ({error})") from None

    def annotation(name: str) -> Mapping[str, Any]:
        content = read_object(folder / "PairAnnotation" / split / f"{name}.json")
        category = content.get("category")
        files = {}
        for key, own in (("source", "src_imname"), ("target", "trg_imname")):
            if isinstance(content.get(own), str) and isinstance(category, str):
                files[f"{key}_file"] = folder / "JPEGImages" / category / content[own]
                files[key] = f"{category}/{Path(content[own]).stem}"
        return {
            "source_points": content.get("src_kps"),
            "target_points": content.get("trg_kps"),
            "box": content.get("trg_bndbox") or [],  # not None, which is the whole image
            "category": category,
            **files,
        }

    return [(name, lambda name=name: annotation(name)) for name in names]


class _Reader:
    """Checks of pairs, which look at every image file once."""

    def __init__(self, dataset: PairedDataset) -> None:
        self.images: dict[str, Path] = {}
        self.dataset, self.sizes = dataset, dataset.sizes

    def add(self, label: str, find: _Found) -> None:
        """Add a pair to the dataset, or the reason why it is left out."""
        try:
            self.dataset.pairs.append(self.pair(label, find()))
        except (ValueError, OSError) as error:
            self.dataset.problems.append(Problem(label, one_line(error)))

    def pair(self, label: str, content: Mapping[str, Any]) -> Pair:
        """Check the content of a pair.

        Raises:
            FileNotFoundError: an image does not exist.
            ValueError: a value is missing or has another form, or a point is outside its image.
        """
        category = content["category"]
        if not isinstance(category, str):
            raise ValueError(f"category must be a name, not {shown(category)}")
        names, paths = [], []
        for key in ("source", "target"):
            path = content.get(f"{key}_file")
            if path is None:
                raise ValueError(
                    f"{key} must be the name of an image, not {shown(content.get(key))}"
                )
            names.append(content[key])
            paths.append(path)
        sizes = [self._size(name, path) for name, path in zip(names, paths, strict=True)]
        keys = ("source_points", "target_points")
        points = [
            _points(key, content.get(key), size) for key, size in zip(keys, sizes, strict=True)
        ]
        if len(points[0]) != len(points[1]):
            raise ValueError(
                f"has {len(points[0])} source_points but {len(points[1])} target_points"
            )
        box = content["box"]
        side = float(max(sizes[1])) if box is None else _longer_side(box)
        for name, path, size in zip(names, paths, sizes, strict=True):
            self.images[name], self.sizes[name] = path, size
        return Pair(label, names[0], names[1], points[0], points[1], side, category)

    def _size(self, name: str, path: Path) -> Size:
        if name in self.sizes:
            return self.sizes[name]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        size = image_size(path)
        if size is None:
            raise ValueError(f"{path}: not an image that Pillow can read")
        return size


def _points(key: str, value: Any, size: Size) -> tuple[Point, ...]:
    listed = isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value)
    if not listed or not value:
        raise ValueError(f"{key} must be a list of points [x, y], not {shown(value)}")
    points = tuple((number(key, x), number(key, y)) for x, y in value)
    height, width = size
    # The width itself is accepted, because some annotations count pixels from 1.
    outside = next((p for p in points if not (0 <= p[0] <= width and 0 <= p[1] <= height)), None)
    if outside is not None:
        x, y = outside
        raise ValueError(
            f"{key}: [{x:g}, {y:g}] is outside the image of {width}×{height} pixels (width×height)"
        )
    return points


def _longer_side(box: Any) -> float:
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"box must be [x0, y0, x1, y1], not {shown(box)}")
    x0, y0, x1, y1 = (number("box", value) for value in box)
    if x1 < x0 or y1 < y0 or max(x1 - x0, y1 - y0) <= 0:
        raise ValueError(f"box must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1, not {shown(box)}")
    return max(x1 - x0, y1 - y0)
