"""Train the network of the early detail upsampler to predict the result of five passes from one.

    python benchmarks/learn_early.py PHOTOS -o early_detail_efficientnet_lite0/

``upfeat.load(backbone, upsampler="early_detail_efficientnet_lite0/")`` uses the result. For each
photograph, shorter side 224 pixels, features of the image at twice its size are translated and
corrected for each cell (``upfeat.scales``), all features averaged with those of the mirror image
(``upfeat.mirrored``). The target is their residual: the result of one pass with the first step and
the regression of detail_universal is subtracted. The backbone is aligned (``Backbone.aligned``), by
the displacement that the photographs show. The loss is the mean squared error in units of the
target's standard deviation in each channel. No labels are needed. The shipped weights were trained
on 1,000 photographs, one for each ImageNet class, with ten rounds over nine tenths of them, in
about 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import upfeat
from upfeat.backbones import Backbone, estimate_displacement
from upfeat.mirrored import Mirrored
from upfeat.photo_search import search
from upfeat.provenance import digest
from upfeat.resampling import on_grid
from upfeat.scales import SecondScale, fit_translation, guidance_for
from upfeat.types import Window
from upfeat.upsamplers import DetailUpsampler, EarlyDetailUpsampler, create_upsampler
from upfeat.upsamplers.maps import as_map

BASE = "detail_universal"
TEMPERATURE = 0.4
"""Temperature of the neighbourhood steps over that of the base, chosen on halves of training sets
(docs/evidence/results.md)."""
SMOOTHING = 8
"""Radius of the smoothing, chosen in the same way."""
SOME = 80
"""Photographs from which the displacement and the translation are learnt."""
RATIO = 2
"""Ratio of the enlarged image's sides to the image's own: cells of both grids then coincide."""
HELD_OUT = 10
"""One photograph in this number is held out."""


class Pair(NamedTuple):
    """Input and target of one photograph on the finer grid, in half precision."""

    hidden: Tensor
    """(1, D, h, w), activations of early layers."""
    target: Tensor
    """(1, C, h, w), the residual to predict."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photos", type=Path, help="folder of photographs")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--size", type=int, default=224, help="shorter side, pixels")
    parser.add_argument("--rounds", type=float, default=10, help="rounds over the photographs")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    backbone = upfeat.load_backbone(options.backbone).eval().requires_grad_(False)
    paths = [photo.path for photo in search(options.photos)]
    step = max(len(paths) // SOME, 1)
    some = [backbone.preprocess(path, 256, align=True) for path in paths[::step][:SOME]]
    backbone = backbone.aligned(round(sum(estimate_displacement(backbone, some)) / 2))
    pairs = collect(backbone, paths, options.size, some)
    upsampler = make(backbone, pairs[0], options.width, options.depth, options.seed)
    explained = train(upsampler, pairs, options.rounds, options.seed)
    save(upsampler, options.output, backbone, len(paths), explained)


@torch.inference_mode()
def collect(backbone: Backbone, paths: list[Path], size: int, some: list[Tensor]) -> list[Pair]:
    """Compute the pairs of all photographs; the translation is learnt from some images."""
    translation = fit_translation(Mirrored(backbone), some, ratio=RATIO)
    base = create_upsampler(BASE)
    assert isinstance(base, DetailUpsampler)
    scales = SecondScale(
        backbone, base, translation=translation, share=1, mirrored=True, ratio=RATIO
    )
    pairs = []
    for index, path in enumerate(paths):
        x = backbone.preprocess(path, size, align=True)
        own, hidden = backbone.with_hidden(x)
        assert hidden is not None, f"{backbone.name} says nothing of its earlier layers"
        told = scales(x)
        finer = Window(0, 0, *told.shape[2:])
        guidance = guidance_for(base, x, backbone, None)
        kernels = base.prepare(guidance, tuple(own.shape[2:]), tuple(x.shape[2:]))
        assert kernels.regression is not None
        known = kernels.first(own) + kernels.regression.at(as_map(own), finer)
        hidden = on_grid(hidden, (finer.height, finer.width))
        pairs.append(Pair(hidden.half(), (told - known).half()))
        if index % 100 == 0:
            print(f"{index} of {len(paths)} photographs", flush=True)
    return pairs


def make(backbone: Backbone, pair: Pair, width: int, depth: int, seed: int) -> EarlyDetailUpsampler:
    """Create the upsampler, with the base's encoder and an untrained network."""
    torch.manual_seed(seed)
    base = create_upsampler(BASE)
    assert isinstance(base, DetailUpsampler)
    steps = base.neighbourhood
    upsampler = EarlyDetailUpsampler(
        backbone.embed_dim,
        hidden_dim=pair.hidden.shape[1],
        width=width,
        depth=depth,
        widening=base.widening,
        ridge=base.ridge,
        smoothing=SMOOTHING,
        radius=steps.radius,
        query_dim=steps.query_dim,
        levels=steps.levels,
        back_projections=steps.back_projections,
        displacement=backbone.displacement,
    )
    upsampler.neighbourhood.load_state_dict(steps.state_dict())
    with torch.no_grad():
        upsampler.neighbourhood.log_temperature.add_(math.log(TEMPERATURE))
    upsampler.mean, upsampler.std = base.mean, base.std
    return upsampler


def train(upsampler: EarlyDetailUpsampler, pairs: list[Pair], rounds: float, seed: int) -> float:
    """Train the network; inputs and outputs are scaled to unit variance during training.

    Returns:
        The fraction of the target's energy that is explained on the held-out photographs.
    """
    training = [pair for index, pair in enumerate(pairs) if index % HELD_OUT]
    testing = pairs[::HELD_OUT]
    hidden = torch.cat([pair.hidden.float().flatten(2) for pair in training[::8]], 2)
    mean, std = hidden.mean((0, 2))[:, None, None], hidden.std((0, 2))[:, None, None] + 1e-6
    target = torch.cat([pair.target.float().flatten(2) for pair in training[::8]], 2)
    unit = target.square().mean((0, 2)).sqrt()[:, None, None]
    network, last = upsampler.early_network, upsampler.detail
    torch.nn.init.kaiming_uniform_(last.weight, a=math.sqrt(5))
    parameters = [*network.parameters(), *last.parameters()]
    steps = int(rounds * len(training))
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        pair = training[int(torch.randint(len(training), (1,), generator=generator))]
        inputs, wanted = (pair.hidden.float() - mean) / std, pair.target.float() / unit
        if step % 2:
            inputs, wanted = inputs.flip(3), wanted.flip(3)
        loss = F.mse_loss(last(network(inputs)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 1000 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        fold(upsampler, mean, std, unit)
        error = total = 0.0
        for pair in testing:
            wanted = pair.target.float()
            error += float((last(network(pair.hidden.float())) - wanted).square().sum())
            total += float(wanted.square().sum())
    return 1 - error / total


def fold(upsampler: EarlyDetailUpsampler, mean: Tensor, std: Tensor, unit: Tensor) -> None:
    """Fold the scaling of inputs and outputs, (C, 1, 1) each, into the first and last layer."""
    entry, last = upsampler.early_network[0], upsampler.detail
    assert isinstance(entry, torch.nn.Conv2d)
    assert entry.bias is not None
    assert last.bias is not None
    entry.weight.div_(std)
    entry.bias.sub_((entry.weight * mean).sum((1, 2, 3)))
    last.weight.mul_(unit[..., None])
    last.bias.mul_(unit.flatten())


def save(
    upsampler: EarlyDetailUpsampler,
    folder: Path,
    backbone: Backbone,
    photographs: int,
    explained: float,
) -> None:
    """Write weights in half precision, and a description of their training."""
    with torch.no_grad():
        for parameter in upsampler.parameters():
            parameter.copy_(parameter.half())
    upsampler.eval().half().save_pretrained(folder)
    facts = {
        "format": "upfeat-early-1",
        "backbone": backbone.name,
        "weights": digest(backbone),
        "photographs": photographs,
        "explained": round(explained, 3),
        "displacement": backbone.displacement,
        "temperature": TEMPERATURE,
        "base": BASE,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{folder}: explains {100 * explained:.1f} % of what is lacking")


if __name__ == "__main__":
    main()
