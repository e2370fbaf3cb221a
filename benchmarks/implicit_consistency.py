"""Held-out multi-view consistency of implicit features against one-pass upsamplers.

    python benchmarks/implicit_consistency.py photos/ --count 20 -o implicit_consistency.json

For every photograph, the fast fit is made twice: without the blend with one pass, which is timed,
and with it, the default. Each map is warped like views that neither the fit nor its choice of
penalty has used, and averaged over each cell. The score is its mean squared error on the backbone's
features of these views, over the variance of those features. One-pass upsamplers are given by name,
or as folders that save_pretrained wrote.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from statistics import mean, median

import torch

import upfeat
from upfeat.implicit.features import resize_image
from upfeat.implicit.fit import FitConfig, fit_guidance
from upfeat.implicit.observe import Observer
from upfeat.photo_search import Photo, find_photographs
from upfeat.upsamplers.pretrained import create_upsampler

DEFAULT = ["bilinear", "bicubic", "joint_bilateral"]
ALONE = {"share": 1.0, "translation": 0.0}
"""Settings of the fit without the blend with one pass."""
UNSEEN_VIEWS = 64
UNSEEN_SEED = 1_000_003


def measure(photo, backbone, upsamplers, config):
    shape = backbone.preprocess(photo, config.size, align=True).shape[-2:]
    guidance = resize_image(upfeat.images.read_image(photo), tuple(shape))
    start, cpu = time.perf_counter(), time.process_time()
    features = fit_guidance(guidance, backbone, config)
    row = {
        "photo": photo.name,
        "size": list(shape),
        "views": features.facts["views"],
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }
    default = FitConfig(size=config.size)
    blended = fit_guidance(guidance, backbone, default)
    unseen = Observer(
        guidance,
        backbone,
        held_out=UNSEEN_VIEWS,
        max_pad=config.max_pad,
        max_zoom=config.max_zoom,
        seed=UNSEEN_SEED,
    )
    scale = unseen.held_out_variance
    row["implicit"] = unseen.held_out_loss(features.render()) / scale
    row["blended"] = unseen.held_out_loss(blended.render()) / scale
    image = unseen.image
    with torch.no_grad():
        coarse = backbone(image)
        for name, upsampler in upsamplers.items():
            row[name] = unseen.held_out_loss(upsampler(coarse, image)) / scale
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--upsamplers", nargs="+", default=DEFAULT)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    backbone = upfeat.load_backbone(options.backbone).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {n: create_upsampler(n, backbone.embed_dim).eval() for n in options.upsamplers}
    photos = [one.path for one in find_photographs([options.folder]) if isinstance(one, Photo)]
    count = min(options.count, len(photos))
    photos = [photos[(2 * i + 1) * len(photos) // (2 * count)] for i in range(count)]
    rows = []
    for photo in photos:
        rows.append(measure(photo, backbone, made, FitConfig(size=options.size, **ALONE)))
        print(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True
        )
        names = ["implicit", "blended", *made]
        result = {
            "backbone": backbone.name,
            "size": options.size,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "mean": {name: mean(row[name] for row in rows) for name in names},
            "wins": {n: sum(row["implicit"] < row[n] for row in rows) for n in made},
            "median_seconds": median(row["seconds"] for row in rows),
            "median_cpu_seconds": median(row["cpu_seconds"] for row in rows),
            "rows": rows,
        }
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
