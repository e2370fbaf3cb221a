"""Probes on the tokens of a trained transformer: every upsampler, two of its blocks, every set.

    python benchmarks/token_probes.py DATA hf:FOLDER -o out/

DATA holds clothing/, aerial_roads/ and depth_kitchen/ in the layout of ``upfeat eval``, and
checkpoints/ the rivals' weights. Results go to benchmarks/probes.json as they finish; a second call
uses what an interrupted one left in ``out/``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from collect_probes import add

from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.evaluate import evaluate

BLOCKS = {8: "block 8", 11: "last block"}
SETS = {  # folder: task and title
    "clothing": ("seg", "clothing"),
    "aerial_roads": ("seg", "aerial roads"),
    "depth_kitchen": ("depth", "depth of a kitchen"),
}
IMAGES = {"depth_kitchen": (24, 16)}
MORE = {("clothing", 8): (50, 30)}
FEWER = (30, 20)  # training and test images of the others
SHIPPED = ("nearest", "bilinear", "bicubic", "joint_bilateral", "jbu_stack_universal")
TRAINED = ("neighbourhood_universal", "detail_universal", "detail_universal@5")
RIVALS = ("anyup_multi_backbone.pth", "jafar_vit_small_patch14_dinov2.pth")
NAME = "DINOv2-S for saliency"


def main() -> None:
    """Evaluate and collect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("backbone")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rivals = [str(options.data / "checkpoints" / name) for name in RIVALS]
    for block, label in BLOCKS.items():
        for folder, (task, title) in SETS.items():
            train, test = MORE.get((folder, block)) or IMAGES.get(folder, FEWER)
            out = options.output / f"{folder}_{block}"
            evaluate(
                task,
                options.data / folder,
                out,
                backbone=f"{options.backbone}@{block}",
                upsamplers=[*SHIPPED, *TRAINED, *rivals],
                config=EvalConfig(
                    max_train=train, max_test=test, protocols=("own", "transfer"), pictures=1
                ),
                overwrite=True,
            )
            add(f"{NAME}, {label}: {title}", out)


if __name__ == "__main__":
    main()
