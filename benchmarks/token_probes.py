"""Probes on tokens of two blocks of a trained transformer, for every upsampler and every set.

    python benchmarks/token_probes.py DATA hf:FOLDER -o out/

DATA contains clothing/, aerial_roads/ and depth_kitchen/ in the layout of ``upfeat eval``, and the
rivals' weights in checkpoints/. Each result is written to benchmarks/probes.json when it is
complete. After an interruption, a second call reuses the finished rows in ``out/``.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch
from collect_probes import add

from upfeat.evaluation import evaluate
from upfeat.evaluation.config import EvalConfig

CLOTHING, ROADS, DEPTH = "clothing", "aerial_roads", "depth_kitchen"
TITLES = {CLOTHING: "clothing", ROADS: "aerial roads", DEPTH: "depth of a kitchen"}
BLOCKS = {8: "block 8", 11: "last block"}
# Numbers of training and test images, drawn by seed 0; one core needs an hour and a half.
IMAGES = {(CLOTHING, 8): (50, 30), (DEPTH, 8): (16, 12), (DEPTH, 11): (16, 12)}
FEWER = (30, 20)
SHIPPED = ("nearest", "bilinear", "bicubic", "joint_bilateral", "jbu_stack_universal")
TRAINED = ("neighbourhood_universal", "detail_universal")
RIVALS = ("anyup_multi_backbone.pth", "jafar_vit_small_patch14_dinov2.pth")
GUIDED = "detail_universal@early"
PASSES = (
    "detail_universal@5",
    "detail_universal@2@early",
    "detail_universal@5@early",
    "detail_universal@8@early",
)
NAME = "DINOv2-S for saliency"


def main() -> None:
    """Evaluate all upsamplers, and collect the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("backbone")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rivals = [str(options.data / "checkpoints" / name) for name in RIVALS]
    for passes in ((), PASSES):  # the slowest rows last; finished rows are not computed again
        for (block, label), (folder, title) in product(BLOCKS.items(), TITLES.items()):
            train, test = IMAGES.get((folder, block), FEWER)
            out = options.output / f"{folder}_{block}"
            evaluate(
                "depth" if folder == DEPTH else "seg",
                options.data / folder,
                out,
                backbone=f"{options.backbone}@{block}",
                upsamplers=[*SHIPPED, *TRAINED, GUIDED, *rivals, *passes],
                config=EvalConfig(
                    max_train=train, max_test=test, protocols=("own", "transfer"), pictures=1
                ),
                overwrite=True,
            )
            add(f"{NAME}, {label}: {title}", out)


if __name__ == "__main__":
    main()
