"""Labelled photographs in plain folders, checked before anything is computed on them.

A folder holds ``train/`` and ``test/`` (``val/`` will do), each with ``images/`` and ``labels/``
(or ``depth/``); or ``images/`` and ``labels/`` alone, which are then split at random by a seed.
``images/NAME.*`` pairs with ``labels/NAME.png`` or ``depth/NAME.png|npy``.

What does not fit is never scored: it is left out and named (:class:`Problem`), or, where nothing
sensible remains, refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from upfeat.bounds import number
from upfeat.images import read_image
from upfeat.strict_json import read_value

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORE_INDEX = 255
"""Label of pixels that count neither in training nor in scores."""

MAX_CLASSES = 255
"""Labels are stored as 8-bit indices, one of which means "ignored"."""

Task = Literal["seg", "depth"]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".gif"}
_TARGET_FOLDERS = {"seg": "labels", "depth": "depth"}
_TARGET_SUFFIXES: dict[str, tuple[str, ...]] = {"seg": (".png",), "depth": (".png", ".npy")}


@dataclass(frozen=True)
class Sample:
    """One photograph and what is known of it.

    Attributes:
        name: how results and problems call it; unique within its split.
        image: the photograph's file.
        target: the label's or depth map's file.
        index: position inside the file, where one file holds many.
    """

    name: str
    image: Path
    target: Path
    index: int = 0


@dataclass(frozen=True)
class Problem:
    """Something left out of an evaluation, or weak in it, with the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass
class Dataset:
    """Photographs of two splits, and how to read them.

    Attributes:
        name: what results call it.
        train: samples to fit probes on.
        test: samples to score.
        classes: names by index; empty for depth.
        read_target: gives a sample's target: (H, W) uint8 class indices with 255 ignored, or
            (H, W) float32 depth with NaN where it is unknown.
        read_image: gives a sample's photograph, RGB (3, H, W) in [0, 1].
        problems: what was left out so far.
        identify: gives bytes that change whenever the sample's content does.
        reading: what else decides the targets, as the unit of depth maps.
        splits: those that must not be empty.
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


def read_folder(folder: str | Path, task: Task = "seg", *, split_seed: int = 0) -> Dataset:
    """List a plain folder.

    Args:
        folder: as the module describes; ``classes.json`` holds ``{"classes": [names]}`` and
            perhaps ``"ignore_index"``, or just the list; ``depth.json`` may hold ``{"scale": s}``,
            what one unit of a depth map is worth (default 1).
        task: which targets to pair, ``seg`` or ``depth``.
        split_seed: where the folder has no splits, the seed of the random quarter that is tested.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks ``images/``, targets or
            ``classes.json``.
        ValueError: ``classes.json`` is not such a file, or a split is empty.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    reader, classes, reading = _target_reader(folder, task)
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
    check_not_empty(dataset, folder)
    return dataset


def read_photographs(folder: str | Path, *, split_seed: int | None = None) -> Dataset:
    """List photographs without labels: those of ``test/images``, ``images`` or the folder itself.

    Args:
        folder: where they lie.
        split_seed: also give photographs to fit on: those of ``train/images`` beside
            ``test/images``, or else all but a quarter drawn by this seed. ``None`` for none.

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
    """Split samples into train and test, the same way for one seed whatever their order.

    Args:
        samples: at least two, or one side stays empty.
        seed: of the permutation.
        test_fraction: share of the test side, rounded up to at least one sample.
    """
    ordered = sorted(samples, key=lambda sample: sample.name)
    shuffled = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(round(len(ordered) * test_fraction), 1), len(ordered))
    chosen = set(shuffled[:count])
    train = [sample for index, sample in enumerate(ordered) if index not in chosen]
    return train, [sample for index, sample in enumerate(ordered) if index in chosen]


def subset(samples: list[Sample], limit: int | None, *, seed: int = 0) -> list[Sample]:
    """At most ``limit`` samples, drawn at random by ``seed`` and kept in order."""
    if limit is None or limit >= len(samples):
        return samples
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(samples), generator=generator)[:limit].sort().values
    return [samples[index] for index in chosen.tolist()]


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


def read_indices(path: Path) -> NDArray[np.int64]:
    """Read a label picture whose pixels are class indices, palette pictures included.

    Returns:
        (H, W) int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds colours.
    """
    image = _open(path)
    if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
        raise ValueError(f"is a picture of mode {image.mode}; labels must hold one index per pixel")
    return np.asarray(image).astype(np.int64)


def checked_label(
    indices: NDArray[np.int64], n_classes: int, ignore_index: int = IGNORE_INDEX
) -> NDArray[np.uint8]:
    """Check class indices, and mark ignored pixels as 255.

    Args:
        indices: (H, W).
        n_classes: how many classes the list has.
        ignore_index: what the file uses for ignored pixels.

    Raises:
        ValueError: an index is outside the list, or every pixel is ignored.
    """
    ignored = indices == ignore_index
    outside = np.unique(indices[~ignored & ((indices < 0) | (indices >= n_classes))])
    if len(outside):
        shown = ", ".join(map(str, outside[:5].tolist()))
        raise ValueError(
            f"class indices {shown} are outside the list of {n_classes} classes "
            f"(0 to {n_classes - 1}, or {ignore_index} for ignored)"
        )
    if bool(ignored.all()):
        raise ValueError("no pixel has a label: all are ignored")
    return np.where(ignored, IGNORE_INDEX, indices).astype(np.uint8)


def read_depth(path: Path, scale: float = 1.0) -> NDArray[np.float32]:
    """Read a depth map.

    Args:
        path: a 16-bit (or 8-bit) PNG or an ``.npy`` of numbers, (H, W).
        scale: what one unit is worth.

    Returns:
        (H, W) float32, NaN where the depth is unknown (not finite, or not above 0).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or knows no depth.
    """
    if path.suffix.lower() == ".npy":
        try:
            with path.open("rb") as file:  # not np.load, which takes archives of arrays too
                values = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"not a readable npy file ({error})") from None
    else:
        values = read_indices(path)
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise ValueError(f"holds {values.dtype} of shape {values.shape}; depth must be (H, W)")
    return checked_depth(values, scale)


def checked_depth(values: NDArray[Any], scale: float) -> NDArray[np.float32]:
    """Scale depths to float32 and mark unknown ones (not finite or not above 0) as NaN.

    Raises:
        ValueError: fewer than two pixels are known.
    """
    depth = values.astype(np.float32) * np.float32(scale)
    known = np.isfinite(depth) & (depth > 0)
    if int(known.sum()) < 2:
        raise ValueError("no depth is known: no pixel is finite and above 0")
    return np.where(known, depth, np.float32("nan"))


def read_classes(path: Path) -> tuple[list[str], int]:
    """Read ``classes.json``: names, and the index of ignored pixels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds anything else.
    """
    content = read_value(path)
    names = content.get("classes") if isinstance(content, dict) else content
    ignore = content.get("ignore_index", IGNORE_INDEX) if isinstance(content, dict) else 255
    names = names if isinstance(names, list) else []
    count = sum(isinstance(name, str) for name in names)
    if count < len(names) or type(ignore) is not int or not 2 <= count <= MAX_CLASSES:
        raise ValueError(
            f'{path}: must hold {{"classes": [2 to {MAX_CLASSES} names], "ignore_index": 255}}'
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f'{path}: names the class "{twice}" twice; give each a name of its own')
    return names, ignore


def _target_reader(
    folder: Path, task: Task
) -> tuple[Callable[[Sample], NDArray[Any]], list[str], str]:
    """The reader of targets, the names of classes, and what else the targets depend on."""
    if task == "seg":
        classes, ignore = read_classes(folder / "classes.json")

        def label(sample: Sample) -> NDArray[np.uint8]:
            return checked_label(read_indices(sample.target), len(classes), ignore)

        return label, classes, f"ignore_index={ignore}"
    scale = 1.0
    if (folder / "depth.json").is_file():
        content = read_value(folder / "depth.json")
        found = content.get("scale") if isinstance(content, dict) else None
        scale = number(f"{folder / 'depth.json'}: scale", found, 0, above=True)
    return (lambda sample: read_depth(sample.target, scale)), [], f"scale={scale}"


def _pair(folder: Path, task: Task, problems: list[Problem], prefix: str = "") -> list[Sample]:
    """Match photographs with targets by name; name what has no partner."""
    images = _by_stem(folder / "images", tuple(IMAGE_SUFFIXES), problems, prefix)
    kind = _TARGET_FOLDERS[task]
    targets = _by_stem(folder / kind, _TARGET_SUFFIXES[task], problems, prefix)
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
    found = _by_stem(folder, tuple(IMAGE_SUFFIXES), problems, "")
    return [Sample(stem, path, path) for stem, path in sorted(found.items())]


def _by_stem(
    folder: Path, suffixes: tuple[str, ...], problems: list[Problem], prefix: str
) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in suffixes:
            continue
        # Accents are one character on some systems and two on others, and archives keep that.
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in found:
            other = found[stem].name
            problems.append(Problem(f"{prefix}{folder.name}/{path.name}", f"doubles {other}"))
        else:
            found[stem] = path
    return found


def _open(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (UnidentifiedImageError, OSError, SyntaxError, EOFError, ValueError) as error:
        raise ValueError(f"not a readable picture ({' '.join(str(error).split())})") from None
