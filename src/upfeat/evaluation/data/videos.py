"""Videos as folders of frames, with masks of objects for the first frame and for frames to score.

==========  ======================================================================================
name        content of the folder
==========  ======================================================================================
``folder``  ``images/SEQUENCE/FRAME.*``, ``labels/SEQUENCE/FRAME.png``
``davis``   ``JPEGImages/480p/SEQUENCE/FRAME.jpg``, ``Annotations/480p/SEQUENCE/FRAME.png``,
            ``ImageSets/2017/val.txt``, the names of the sequences (DAVIS 2017, trainval;
            ``Full-Resolution`` instead of ``480p`` is read too)
==========  ======================================================================================

The frames of a sequence are ordered by name, and numbers in names by value, so that frame 2 comes
before frame 10. The pixels of a label are numbers of objects: 0 is background, 255 is ignored. The
first frame needs a label; later frames without a label are not scored. DAVIS does not score the
last frame of a sequence, so it is left out in this layout.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upfeat.evaluation.data.folders import (
    IMAGE_SUFFIXES,
    Dataset,
    Problem,
    Sample,
    by_stem,
    check_not_empty,
)
from upfeat.evaluation.data.targets import (
    IGNORE_INDEX,
    MAX_CLASSES,
    checked_label,
    read_indices,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RESOLUTIONS = ("480p", "Full-Resolution")


def read_videos(folder: str | Path, *, layout: str = "folder") -> Dataset:
    """List the frames of videos as samples of the split ``test``, one group for each sequence.

    Sequences that cannot be used are left out and listed as problems.

    Args:
        folder: folder of the videos.
        layout: ``folder`` or ``davis``, see the top of this module.

    Raises:
        FileNotFoundError: the folder, or a folder or list of the layout does not exist.
        ValueError: the layout is another one, the list is not UTF-8, or no sequence can be used.
    """
    folder = Path(folder)
    if layout not in ("folder", "davis"):
        raise ValueError(f"layout={layout} is not for videos; propagation takes folder or davis")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    davis = layout == "davis"
    images, labels, names = _read_davis(folder) if davis else _read_plain(folder)
    problems: list[Problem] = []
    samples: list[Sample] = []
    for name in names:
        samples += _sequence(name, images / name, labels / name, problems, scores_last=not davis)
    label = folder.resolve().name if layout == "folder" else layout
    dataset = Dataset(label, [], samples, [], _read_mask, problems=problems, splits=("test",))
    check_not_empty(dataset, folder)
    return dataset


def _read_plain(folder: Path) -> tuple[Path, Path, list[str]]:
    """Return the folders of frames and of labels, and the names of the sequences."""
    images, labels = _existing(folder / "images"), _existing(folder / "labels")
    found = (path.name for path in images.iterdir() if path.is_dir())
    return images, labels, sorted(name for name in found if not name.startswith("."))


def _read_davis(folder: Path) -> tuple[Path, Path, list[str]]:
    listed = _existing(folder / "ImageSets" / "2017" / "val.txt")
    try:
        names = listed.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{listed}: not a list in UTF-8 ({error})") from None
    frames = folder / "JPEGImages"
    size = next((one for one in _RESOLUTIONS if (frames / one).is_dir()), _RESOLUTIONS[0])
    images, labels = _existing(frames / size), _existing(folder / "Annotations" / size)
    return images, labels, list(dict.fromkeys(names))


def _sequence(
    name: str, images: Path, labels: Path, problems: list[Problem], *, scores_last: bool
) -> list[Sample]:
    """List the frames of one sequence; none, and a problem, if it cannot be used."""
    missing = next((path for path in (images, labels) if not path.is_dir()), None)
    if missing is not None:
        problems.append(Problem(name, f"{missing} is missing"))
        return []
    frames = by_stem(images, tuple(IMAGE_SUFFIXES), problems, f"{images.parent.name}/")
    masks = by_stem(labels, (".png",), problems, f"{labels.parent.name}/")
    problems += [
        Problem(f"{labels.parent.name}/{name}/{path.name}", "has no image")
        for stem, path in masks.items()
        if stem not in frames
    ]
    stems = sorted(frames, key=_order)
    stems = stems if scores_last else stems[:-1]
    reason = None
    if not stems:
        reason = "has no frames" if scores_last else "has fewer than two frames"
    elif stems[0] not in masks:
        reason = f"the first frame, {frames[stems[0]].name}, has no label"
    elif not any(stem in masks for stem in stems[1:]):
        reason = "has no label to score: none after the first frame"
        reason += "" if scores_last else " and before the last"
    if reason is not None:
        problems.append(Problem(name, reason))
        return []
    # The image stands for the target of a frame without a label.
    return [
        Sample(f"{name}/{stem}", frames[stem], masks.get(stem, frames[stem]), group=name)
        for stem in stems
    ]


def _order(stem: str) -> tuple[list[str | int], str]:
    """Sort key of a frame's name, in which runs of digits count as numbers."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", stem))
    parts[1::2] = map(int, parts[1::2])
    return parts, stem


def _read_mask(sample: Sample) -> NDArray[np.uint8] | None:
    """Read the numbers of objects, (H, W) with 255 for ignored; ``None`` without a label."""
    if sample.target == sample.image:
        return None
    return checked_label(read_indices(sample.target), MAX_CLASSES, IGNORE_INDEX)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; is the layout right?")
    return path
