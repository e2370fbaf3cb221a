"""Probes on fits with and without the map of eight passes, and on one to eight passes.

    python benchmarks/implicit_share.py DATA -o out/

DATA contains clothing/ and aerial_roads/ in the layout of ``upfeat eval``. Each image is fitted
without the blend, and with each of ``--shares``. Fits and maps are stored in ``out/``, some
gigabytes. Results go to benchmarks/implicit_share.json; those of ``--slack`` are added to it and
replace no others. With another ``--backbone``, images are only fitted with the blend; ``--label``
names its results, which is needed for a path:

    python benchmarks/implicit_share.py DATA -o out/ --backbone hf:FOLDER@8 --label dinov2_small_8
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upfeat.alignment import align_for
from upfeat.backbones import load_backbone
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.data.folders import subset
from upfeat.evaluation.data.prepared import Prepared, prepare
from upfeat.evaluation.differences import find_differences
from upfeat.evaluation.methods import ImplicitMethod
from upfeat.evaluation.named import load_methods
from upfeat.evaluation.tasks.seg import Segmentation
from upfeat.feature_map import FeatureMap, interpolate
from upfeat.implicit.config import FitConfig
from upfeat.implicit.features import fingerprint
from upfeat.implicit.observe import Observer
from upfeat.implicit.one_pass import mean_upsampler
from upfeat.storage import write_bytes
from upfeat.upsamplers.pretrained import trained_for_early

TARGET = Path(__file__).with_name("implicit_share.json")
IMAGES = {"clothing": (40, 24), "aerial_roads": (30, 20)}
BACKBONE = "efficientnet_lite0"
TRAINED = (
    "bilinear",
    "detail_universal",
    "detail_universal@early",
    "early_detail_{backbone}",
    "detail_universal@5",
    "early_detail_{backbone}@2",
    "early_detail_{backbone}@5",
    "early_detail_{backbone}@8",
)
"""Upsamplers for a backbone with a network of early layers that was trained for it."""
UNIVERSAL = (
    "bilinear",
    "detail_universal",
    *(f"detail_universal{passes}@early" for passes in ("", "@2", "@5", "@8")),
)
"""Upsamplers for other backbones."""
ALONE = FitConfig(share=1.0, translation=0.0)
FEW = FitConfig(share=0.0, views=32, zoomed_views=0, held_out=2)
"""Settings for the map of eight passes alone, which depends on the first 32 views only."""
JUDGED = 8
VIEWS = {"max_pad": 30.0, "max_zoom": 1.8, "seed": 1_000_003}
"""Arguments of the :class:`Observer` of views that no fit has used."""


class Drawn(FeatureMap):
    """A feature map computed in full."""

    def __init__(self, maps: Tensor) -> None:
        """Store the map, (1, C, H, W)."""
        self.maps, self.shape = maps, maps.shape

    def full(self, dtype: torch.dtype | None = None) -> Tensor:
        """See :meth:`FeatureMap.full`."""
        return self.maps.to(dtype or self.maps.dtype)

    def crop(self, top: int, left: int, height: int, width: int) -> Tensor:
        """See :meth:`FeatureMap.crop`."""
        return self.maps[:, :, top : top + height, left : left + width]

    def at(self, points: Tensor) -> Tensor:
        """See :meth:`FeatureMap.at`."""
        return interpolate(self.maps[0], points)

    def project(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :meth:`FeatureMap.project`."""
        return F.conv2d(self.maps, weight[:, :, None, None], bias)


class Kept(ImplicitMethod):
    """Fits whose rendered maps are cached, for all rows that blend them."""

    def __call__(self, sample: Prepared) -> FeatureMap:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See :meth:`Method.__call__`."""
        assert self.cache is not None
        path = self.cache / f"drawn-{fingerprint(sample.image.cpu())[:24]}-{self.weights[:16]}.pt"
        if not path.exists():
            torch.save(super().__call__(sample).full(), path)
        return Drawn(torch.load(path))

    def fresh(self) -> Kept:
        """See :meth:`Method.fresh`; costs are not reported here, so the cache is used."""
        return self


def measure(
    folder: Path,
    images: tuple[int, int],
    kept: Path,
    named: Sequence[str],
    fitted: FitConfig,
    shares: Sequence[float],
    network: str,
) -> dict[str, Any]:
    """Score the named rows and those of fits on one set of images, and compare them."""
    backbone = load_backbone(network).eval().requires_grad_(False)
    config = EvalConfig(
        max_train=images[0], max_test=images[1], protocols=("own", "transfer"), pictures=0
    )
    kept.mkdir(parents=True, exist_ok=True)
    dataset = Segmentation.read(folder, "folder", config)
    parts = {}
    for name, count in zip(("train", "test"), images, strict=True):
        samples = subset(getattr(dataset, name), count, seed=config.split_seed)
        parts[name] = prepare(dataset, samples, backbone, config.size, kept, label=name)
    names = [name.format(backbone=network) for name in named]
    methods = load_methods(names, backbone, kept) if names else {}
    if network == BACKBONE:
        methods["implicit alone"] = Kept(backbone, fitted, kept)
    for share in shares:
        methods[f"implicit@{share}"] = Kept(backbone, _blended(fitted, share), kept)
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


def _blended(fitted: FitConfig, share: float) -> FitConfig:
    return replace(fitted, share=share, translation=FitConfig.translation)


def of_fits(entry: dict[str, Any]) -> bool:
    """Return true if a row, or a difference between two rows, is of fits."""
    return any(str(entry.get(key)).startswith("implicit") for key in ("upsampler", "against"))


def losses(
    folder: Path, images: tuple[int, int], kept: Path, fitted: FitConfig
) -> dict[str, float]:
    """Compute the held-out loss on the first test images, relative to a constant map's."""
    backbone = load_backbone(BACKBONE).eval().requires_grad_(False)
    config = EvalConfig()
    dataset = Segmentation.read(folder, "folder", config)
    samples = subset(dataset.test, images[1], seed=config.split_seed)
    test = prepare(dataset, samples, backbone, config.size, kept, label="test")
    configs = {"alone": fitted, "blended": _blended(fitted, FitConfig.share), "eight passes": FEW}
    methods = {name: Kept(backbone, one, kept) for name, one in configs.items()}
    totals: dict[str, float] = dict.fromkeys(methods, 0.0)
    for index in range(JUDGED):
        sample = test[index]
        aligned = align_for(mean_upsampler(backbone), backbone)  # as fits are
        unseen = Observer(sample.image, aligned, held_out=64, **VIEWS)
        for name, method in methods.items():
            loss = unseen.held_out_loss(method(sample).full())
            totals[name] += loss / unseen.held_out_variance / JUDGED
    return totals


def main() -> None:
    """Measure both sets of images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument("--label", help="name of the backbone in the results")
    parser.add_argument("--sets", nargs="+", choices=list(IMAGES), default=list(IMAGES))
    parser.add_argument("--fits", action="store_true", help="replace the rows of fits only")
    parser.add_argument("--losses", action="store_true", help="add held-out losses only")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[FitConfig.share], help="weights of the fit"
    )
    parser.add_argument("--slack", type=float, help="add rows of fits with this slack only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fitted = ALONE if options.slack is None else replace(ALONE, slack=options.slack)
    only_fits = options.fits or options.slack is not None
    label = options.label or options.backbone
    if not label.isidentifier():
        parser.error(f"--backbone {options.backbone} needs a --label of letters, digits and _")
    suffix = "" if options.backbone == BACKBONE else f"_{label}"
    if suffix and (options.losses or options.slack is not None):
        parser.error(f"--losses and --slack are for {BACKBONE}; leave out --backbone")
    for folder in options.sets:
        name = f"{folder}{suffix}"
        given = options.data / folder, IMAGES[folder], options.output / name
        found = {}
        if not options.losses:
            rows = TRAINED if trained_for_early(options.backbone) else UNIVERSAL
            named = () if only_fits else rows
            found = measure(*given, named, fitted, options.shares, options.backbone)
        if not suffix:
            found["held_out"] = losses(*given, fitted)
        known: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {}
        if options.slack is not None:
            alone = found["held_out"]["alone"]
            part = {"rows": found["rows"], "held_out": {"alone": alone}}
            known[name].setdefault("slack", {})[str(options.slack)] = part
            found = {}
        elif options.fits:
            for kind in ("rows", "differences"):
                found[kind] = [one for one in known[name][kind] if not of_fits(one)] + found[kind]
        known[name] = known.get(name, {}) | found
        write_bytes(TARGET, (json.dumps(known, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
