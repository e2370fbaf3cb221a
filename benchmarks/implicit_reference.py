"""The fast fit against the published recipe: held-out loss and processor time, photo by photo.

    python benchmarks/implicit_reference.py photos/ --count 20 --size 112 -o implicit_reference.json
    python benchmarks/implicit_reference.py photo.jpg --size 224 --steps 5 -o cost.json

Photographs of a folder are chosen evenly from the list sorted by name. Results are written after
each photograph. If the file already contains a photograph, its recipe is not run again, only the
fast fit. With --steps the recipe is cut short: its whole time is extrapolated from the timed steps
and views, and its losses are meaningless. Losses are relative to the variance of the features in
the held-out views: "mean" downsamples the map by the mean over each cell, "own" by the downsampler
that the recipe learns.
"""

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import torch

import upfeat
from upfeat.implicit.features import ImplicitFeatures, resize_image
from upfeat.implicit.fit import FitConfig, fit_implicit
from upfeat.implicit.observe import Observer, feature_basis
from upfeat.implicit.published import create_network_fit, train_network
from upfeat.photo_search import Photo, find_photographs
from upfeat.randomness import stream
from upfeat.views import sample_jitters


def run_reference(guidance, backbone, config, steps, report):
    views_config = {"max_pad": config.max_pad, "max_zoom": config.max_zoom}
    observer = Observer(guidance, backbone, held_out=32, seed=config.seed, **views_config)
    count = config.n_views if steps == config.steps else 50
    generator = stream(config.seed, "views")
    views = sample_jitters(count, size=observer.size, generator=generator, **views_config)
    start = time.process_time()
    seen = observer.observe(views)
    per_view = (time.process_time() - start) / count
    basis = feature_basis(seen[:50], config.components, whiten=False)
    fit = create_network_fit(
        guidance, basis, stride=backbone.stride, downsampler=config.downsampler, seed=config.seed
    )
    marks, curve = [time.process_time()], []

    def losses():
        fit.eval()
        map_ = ImplicitFeatures(fit.field, guidance, basis.components, basis.mean)
        scale = observer.held_out_variance
        found = {
            "mean": observer.held_out_loss(map_.render()) / scale,
            "own": fit.own_held_out_loss(observer, basis) / scale,
        }
        fit.train()
        return found

    training = train_network(
        fit,
        views,
        basis.encode(seen),
        steps=steps,
        views_per_step=config.views_per_step,
        learning_rate=config.learning_rate,
        seed=config.seed,
    )
    for step in training:
        marks.append(time.process_time())
        if step % 100 == 0 or step == steps:
            curve.append({"step": step, **losses()})
            report(curve[-1])
            marks.append(time.process_time())
    per_step = median(b - a for a, b in itertools.pairwise(marks))
    whole = config.n_views * per_view + config.steps * per_step
    return {"curve": curve, "cpu_per_view": per_view, "cpu_per_step": per_step, "cpu_whole": whole}


def measure(photo, backbone, config, steps, known):
    start = time.process_time()
    fast = fit_implicit(photo, backbone, config)
    cpu = time.process_time() - start
    print(photo.name, fast.facts["held_out"], cpu, flush=True)
    shape = tuple(backbone.preprocess(photo, config.size, align=True).shape[-2:])
    guidance = resize_image(upfeat.images.read_image(photo), shape)
    config = replace(config, preset="reference")
    reference = known or {
        "steps": steps,
        **run_reference(guidance, backbone, config, steps, lambda x: print(x, flush=True)),
    }
    return {
        "photo": photo.name,
        "size": list(shape),
        "fast": {"cpu": cpu, "mean": fast.facts["held_out"], "views": fast.facts["views"]},
        "reference": reference,
        "ratio": reference["cpu_whole"] / cpu,
    }


def summary(rows):
    last = [row["reference"]["curve"][-1] for row in rows]
    best = [min(end["mean"], end["own"]) for end in last]
    fast = [row["fast"]["mean"] for row in rows]
    return {
        "photos": len(rows),
        "fast_no_worse": sum(f <= b for f, b in zip(fast, best, strict=True)),
        "fast_mean": mean(fast),
        "reference_mean": mean(end["mean"] for end in last),
        "reference_own": mean(end["own"] for end in last),
        "least_ratio": min(row["ratio"] for row in rows),
        "median_ratio": median(row["ratio"] for row in rows),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    # One thread, because the waiting of several threads would count as processor time.
    torch.set_num_threads(1)
    backbone = upfeat.load_backbone(options.backbone).requires_grad_(False)
    # Without the blend with one pass, since the published recipe has no such blend.
    config = FitConfig(size=options.size, share=1.0, translation=0.0)
    photos = [one.path for one in find_photographs(options.photos) if isinstance(one, Photo)]
    count = min(options.count, len(photos))
    photos = [photos[(2 * i + 1) * len(photos) // (2 * count)] for i in range(count)]
    known, rows = {}, []
    if options.output.is_file():
        before = json.loads(options.output.read_text())["rows"]
        known = {row["photo"]: row["reference"] for row in before}
    steps = options.steps or FitConfig(preset="reference").steps
    # Photographs in the file come first, so that rewriting the file never loses a result.
    for photo in sorted(photos, key=lambda photo: photo.name not in known):
        rows.append(measure(photo, backbone, config, steps, known.get(photo.name)))
        if len(rows) < len(known):
            continue
        result = {"backbone": backbone.name, "threads": 1, **summary(rows), "rows": rows}
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(summary(rows), flush=True)


if __name__ == "__main__":
    main()
