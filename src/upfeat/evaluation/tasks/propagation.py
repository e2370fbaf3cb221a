"""Propagation of the masks of a video's first frame by the similarity of upsampled features.

The task is the semi-supervised protocol of DAVIS 2017 with frozen features, without any training.
Soft labels are propagated on a grid (see :mod:`upfeat.evaluation.label_propagation`), enlarged to
the image, and the largest one is the prediction. There are two protocols:

* ``features``: the grid has squares of 4 pixels, with the mean of the upsampled features in each;
* ``labels``: the grid is the backbone's, and the soft labels are upsampled instead of the features.
  With bilinear interpolation, this is the published protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.cost import measure
from upfeat.evaluation.data.folders import Dataset, Problem
from upfeat.evaluation.data.prepared import OnStep, Prepared, PreparedSet
from upfeat.evaluation.data.targets import IGNORE_INDEX
from upfeat.evaluation.data.videos import read_videos
from upfeat.evaluation.differences import pack_sums
from upfeat.evaluation.label_propagation import Tracker, to_cells, to_soft
from upfeat.evaluation.masks import mask_scores
from upfeat.evaluation.methods import Method, UpsamplerMethod
from upfeat.evaluation.report.pictures import encode_masks
from upfeat.evaluation.results import Row
from upfeat.evaluation.task import DRIFT, Score, Task
from upfeat.features import UpsampledFeatures

CELL = 4
"""Side of the squares of the protocol ``features``, pixels."""


@dataclass(frozen=True)
class Video:
    """One sequence of the test set.

    Attributes:
        name: name of the sequence.
        frames: indices of its frames in the test set, in order.
        scored: indices of the frames with a label, without the first frame.
        objects: (K,) uint8, background 0 and the numbers of the objects of the first label.
    """

    name: str
    frames: list[int]
    scored: list[int]
    objects: Tensor


class Propagation(Task):
    """Propagated masks on one set of videos, for any number of methods; nothing is random."""

    title = "Video label propagation"
    question = "Do upsampled features find the objects of a video's first frame in later frames?"
    protocols: ClassVar = {
        "features": "labels are propagated by upsampled features, averaged over squares of "
        f"{CELL} pixels, and enlarged bilinearly",
        "labels": "labels are propagated by the coarse features between the backbone's cells, and "
        "upsampled instead of the features",
    }
    scores: ClassVar = {
        "jf": Score("J&F", "mean of J and F, %", percent=True),
        "j": Score(
            "J",
            "intersection over union of each object's mask, averaged over frames, then over "
            "objects, %",
            percent=True,
        ),
        "f": Score(
            "F",
            "harmonic mean of precision and recall of the contour of each object's mask, matched "
            "within 0.8 % of the image's diagonal, averaged over frames, then over objects, %",
            percent=True,
        ),
        "drift": DRIFT,
    }
    compared = ("jf", "f")
    target = "masks"
    pictures_title = "Masks"
    per_class_title = ("sequence", "J&F of each sequence, %")

    @classmethod
    def read(cls, folder: Path, layout: str, config: EvalConfig) -> Dataset:
        """See :meth:`Task.read`."""
        return read_videos(folder, layout=layout)

    @classmethod
    def facts(cls, settings: Mapping[str, Any]) -> dict[str, str]:
        """See :meth:`Task.facts`."""
        return {"repetitions": "one, since the task has no randomness"}

    def draw_target(self, sample: Prepared) -> str | None:
        """See :meth:`Task.draw_target`."""
        return None if sample.target is None else encode_masks(sample.image, sample.target)

    @classmethod
    def scores_of(cls, sums: Tensor) -> dict[str, Tensor]:
        """See :meth:`Task.scores_of`; sums over sequences of J, of F and of objects, (…, 3)."""
        regions, contours, count = sums.unbind(-1)
        j, f = regions / count, contours / count
        return {"jf": (j + f) / 2, "j": j, "f": f}

    def __init__(
        self,
        parts: Mapping[str, PreparedSet],
        dataset: Dataset,
        backbone: Backbone,
        config: EvalConfig,
        on_step: OnStep | None = None,
    ) -> None:
        """See :meth:`Task.__init__`; lists the sequences and checks their labels.

        Raises:
            ValueError: no sequence can be scored.
        """
        super().__init__(parts, dataset, backbone, config, on_step)
        self.videos = self._list_videos()
        if not self.videos:
            raise ValueError(f"{dataset.name}: no sequence can be scored ({self.problems[0]})")

    def choose_pictures(self) -> list[int]:
        """See :meth:`Task.choose_pictures`; evenly spaced over the scored frames."""
        scored = [index for video in self.videos for index in video.scored]
        return [scored[place] for place in self.config.choose_pictures(len(scored))]

    @torch.no_grad()
    def rows(self, label: str, method: Method) -> list[Row]:
        """See :meth:`Task.rows`."""
        linear = isinstance(method, UpsamplerMethod) and method.upsampler.linear
        names = ("features", "labels") if linear else ("features",)
        sums: dict[str, list[Tensor]] = {name: [] for name in names}
        pictures: dict[str, dict[str, str]] = {name: {} for name in names}
        chosen = set(self.choose_pictures())
        done, total = 0, sum(len(video.frames) for video in self.videos)
        for video in self.videos:
            scored: dict[str, list[Tensor]] = {name: [] for name in names}
            for index, sample, maps in self._follow(method, video, linear=linear):
                self.on_step(f"{label}: frames", done, total)
                done += 1
                for name, found in maps.items():
                    if index in video.scored:
                        true = sample.label.cpu()
                        scored[name].append(mask_scores(found.cpu(), true, video.objects[1:]))
                    if index in chosen:
                        pictures[name][sample.name] = encode_masks(sample.image, found)
            for name, frames in scored.items():
                means = torch.stack(frames).mean(0)  # (objects, 2)
                sums[name].append(torch.cat([means.sum(0), means.new_tensor([len(means)])]))
        self.on_step(f"{label}: frames", total, total)
        cost, drift = measure(method, self.test)
        rows = []
        for name in names:
            scores, per_class, packed = self._summarise(sums[name])
            scores["drift"] = [drift]
            common = (label, name, method.weights)
            rows.append(Row(*common, scores, per_class, cost, pictures[name], packed))
        return rows

    def _follow(
        self, method: Method, video: Video, *, linear: bool
    ) -> Iterator[tuple[int, Prepared, dict[str, Tensor]]]:
        """Predict the objects (H, W) of every frame; those of the first are given.

        Yields:
            Index of the frame in the test set, the frame, and predictions by protocol.
        """
        trackers: dict[str, Tracker] = {}
        objects = video.objects.to(self.test.device)
        for index in video.frames:
            sample = self.test[index]
            upsampled = method(sample)
            fine = (-(-sample.size[0] // CELL), -(-sample.size[1] // CELL))
            features = {"features": to_cells(upsampled.full()[0], fine)}
            if linear:
                coarse = (sample.features.shape[1], sample.features.shape[2])
                features["labels"] = to_cells(sample.features, coarse)
            if not trackers:
                for name, own in features.items():
                    start = to_soft(sample.label, objects, (own.shape[0], own.shape[1]))
                    trackers[name] = Tracker(own, start)
                yield index, sample, dict.fromkeys(trackers, sample.label)
                continue
            soft = {
                name: trackers[name].step(own).permute(2, 0, 1)[None]  # (1, K, h, w)
                for name, own in features.items()
            }
            maps = {"features": F.interpolate(soft["features"], sample.size, mode="bilinear")}
            if linear:
                assert isinstance(upsampled, UpsampledFeatures)
                maps["labels"] = upsampled.kernels(soft["labels"])
            yield index, sample, {name: objects[one[0].argmax(0)] for name, one in maps.items()}

    def _summarise(
        self, sums: list[Tensor]
    ) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, Any]]:
        """Turn the sums (3,) of every sequence into scores, J&F by sequence, and packed sums."""
        found = torch.stack(sums)[:, None]  # (sequences, 1, 3)
        scores = {name: one.tolist() for name, one in self.scores_of(found.sum(0)).items()}
        each = self.scores_of(found)["jf"].tolist()
        by_name = {video.name: one for video, one in zip(self.videos, each, strict=True)}
        return scores, by_name, pack_sums(found)

    def _list_videos(self) -> list[Video]:
        """Group the frames; a sequence that cannot be scored is a problem."""
        found: dict[str, list[int]] = {}
        for index, sample in enumerate(self.dataset.test):
            found.setdefault(sample.group, []).append(index)
        listed = [self._checked(name, frames) for name, frames in found.items()]
        return [video for video in listed if video is not None]

    def _checked(self, name: str, frames: list[int]) -> Video | None:
        try:
            return self._read(name, frames)
        except ValueError as error:
            self.problems.append(Problem(name, f"is left out, because {error}"))
            return None

    def _read(self, name: str, frames: list[int]) -> Video:
        """Find the objects of a sequence, and check its frames.

        Raises:
            ValueError: the sequence cannot be scored.
        """
        first = self.test[frames[0]]
        objects, later, scored = _objects(first), set(), []
        if not objects:
            raise ValueError("its first label has no object at the evaluation size")
        for index in frames[1:]:
            sample = self.test[index]
            if sample.size != first.size:
                (a, b), (c, d) = first.size, sample.size
                raise ValueError(f"its frames differ in size: {a}×{b} and {c}×{d} pixels")
            later |= _objects(sample)
            if sample.target is not None:
                scored.append(index)
        if later - objects:
            late = ", ".join(map(str, sorted(later - objects)))
            reason = f"objects that are not in its first label are scored as background: {late}"
            self.problems.append(Problem(name, reason))
        return Video(name, frames, scored, torch.tensor([0, *sorted(objects)], dtype=torch.uint8))


def _objects(sample: Prepared) -> set[int]:
    """Return the numbers of the objects in a frame's label; none without a label."""
    if sample.target is None:
        return set()
    return set(sample.target.unique().tolist()) - {0, IGNORE_INDEX}


TASK = Propagation
