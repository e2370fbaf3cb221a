"""Probes on fits with more and less of one pass in them, beside one pass and five.

    python benchmarks/implicit_share.py DATA -o out/

DATA holds clothing/ and aerial_roads/ in the layout of ``upfeat eval``. An image is fitted twice,
for the two ends of ``share``, since all that lies between is a sum of both; fits are kept in
``out/``. Results go to benchmarks/implicit_share.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat.backbones import load_backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.data.folders import subset
from upfeat.evaluation.data.prepared import Prepared, prepare
from upfeat.evaluation.differences import find_differences
from upfeat.evaluation.methods import ImplicitMethod, Method
from upfeat.evaluation.named import load_methods
from upfeat.evaluation.tasks.seg import Segmentation
from upfeat.feature_map import FeatureMap
from upfeat.implicit.config import FitConfig
from upfeat.storage import write_bytes

TARGET = Path(__file__).with_name("implicit_share.json")
IMAGES = {"clothing": (40, 24), "aerial_roads": (30, 20)}
NAMED = ("bilinear", "detail_universal", "detail_universal@early", "detail_universal@5")
DEFAULT = FitConfig().share
SHARES = (0.35, 0.5, DEFAULT, 0.8, 1.0)
ONLY_MEAN = FitConfig(share=0.0, views=32, zoomed_views=0, held_out=2)
"""The basis of a fit is that of its first 32 views; nothing else has a part in its mean."""


class Blended(FeatureMap):
    """A share of one map and, for the rest, of another."""

    def __init__(self, fitted: FeatureMap, mean: FeatureMap, share: float) -> None:
        """Keep the three."""
        self.parts, self.share, self.shape = (mean, fitted), share, fitted.shape

    def _lerp(self, call: str, *arguments: Any) -> Tensor:
        start, end = (getattr(part, call)(*arguments) for part in self.parts)
        return torch.lerp(start, end, self.share)

    def full(self, dtype: torch.dtype | None = None) -> Tensor:
        """See :meth:`FeatureMap.full`."""
        return self._lerp("full", dtype)

    def crop(self, top: int, left: int, height: int, width: int) -> Tensor:
        """See :meth:`FeatureMap.crop`."""
        return self._lerp("crop", top, left, height, width)

    def at(self, points: Tensor) -> Tensor:
        """See :meth:`FeatureMap.at`."""
        return self._lerp("at", points)

    def project(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`FeatureMap.project`."""
        return self._lerp("project", weight, bias)


class Share(Method):
    """Fits with a share of the views in them."""

    passes = None

    def __init__(self, whole: ImplicitMethod, mean: ImplicitMethod, share: float) -> None:
        """Blend what two methods have kept."""
        self.whole, self.mean, self.share = whole, mean, share
        self.weights = self.identity = f"{whole.weights}|{share}"

    def __call__(self, sample: Prepared) -> FeatureMap:
        """See :meth:`Method.__call__`."""
        whole = self.whole(sample)
        return whole if self.share == 1 else Blended(whole, self.mean(sample), self.share)


def measure(folder: Path, images: tuple[int, int], kept: Path) -> dict[str, Any]:
    """Scores of every row on one set, with their differences from what is returned by default."""
    backbone = load_backbone("efficientnet_lite0").eval().requires_grad_(False)
    config = EvalConfig(
        max_train=images[0], max_test=images[1], protocols=("own", "transfer"), pictures=0
    )
    kept.mkdir(parents=True, exist_ok=True)
    dataset = Segmentation.read(folder, "folder", config)
    parts = {}
    for name, count in zip(("train", "test"), images, strict=True):
        samples = subset(getattr(dataset, name), count, seed=config.split_seed)
        parts[name] = prepare(dataset, samples, backbone, config.size, kept, label=name)
    methods = load_methods(NAMED, backbone, kept)
    whole, mean = (ImplicitMethod(backbone, one, kept) for one in (FitConfig(share=1.0), ONLY_MEAN))
    methods |= {f"implicit@{one}": Share(whole, mean, one) for one in sorted(set(SHARES))}
    task = Segmentation(parts, dataset, backbone, config)
    rows = []
    for label, method in methods.items():
        rows += task.rows(label, method)
        print(folder.name, label, flush=True)
    better = {name: Segmentation.scores[name].higher_is_better for name in task.compared}
    differences = [one.to_json() for one in find_differences(rows, task.scores_of, better)]
    return {
        "images": list(images),
        "seeds": config.seeds,
        "size": config.size,
        "rows": [
            {"upsampler": row.upsampler, "protocol": row.protocol, "scores": row.scores}
            for row in rows
        ],
        "differences": differences,
    }


def main() -> None:
    """Measure both sets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    for name, images in IMAGES.items():
        known[name] = measure(options.data / name, images, options.output / name)
        write_bytes(TARGET, (json.dumps(known, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
