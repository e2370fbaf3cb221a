"""The pictures of the concepts, made by the library itself from a bundled photograph.

python docs/pictures.py [FOLDER [NAME…]]    # writes docs/images/*.jpg; about a minute
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import upfeat
from upfeat.demo.pictures import heat_image
from upfeat.views import Jitter, apply_jitter, apply_jitter_adjoint, sample_jitters
from upfeat.visualize import PCABasis, side_by_side, to_image

DOCS = Path(__file__).parent
PHOTO = DOCS.parent / "examples" / "photos" / "cat.jpg"
SIZE = 224
METHODS = {
    "nearest": "nearest",
    "bilinear": "bilinear",
    "joint bilateral": "joint_bilateral",
    "JBU stack": "jbu_stack",
    "neighbourhood": "neighbourhood",
    "detail": "detail",
}


class Scene:
    """One photograph, its model and its coarse features."""

    def __init__(self, size: int = SIZE) -> None:
        """Run the backbone once."""
        self.model = upfeat.load(upsampler="detail")
        self.x = self.model.preprocess(PHOTO, size=size, align=True)
        self.photo = self.model.backbone.denormalize(self.x)[0].clamp(0, 1)
        with torch.no_grad():
            self.features = self.model.backbone(self.x)
        self.basis = PCABasis(self.features[0])

    def colours(self, features: Tensor) -> Image.Image:
        """(C, h, w) in the basis of the coarse features."""
        return to_image(self.basis.colours(self.basis.project(features)))

    def load(self, name: str) -> upfeat.FeatUp:
        """The same backbone with another upsampler."""
        return upfeat.load(self.model.backbone, upsampler=name)


def heat(values: Tensor) -> Image.Image:
    """(h, w) values, dark to light."""
    low, high = float(values.min()), float(values.max())
    return heat_image(values, low, max(high, low + 1e-9)).convert("RGB")


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    whole = Image.new("RGB", (max(one.width for one in rows), sum(one.height for one in rows)))
    whole.paste((255, 255, 255), (0, 0, *whole.size))
    top = 0
    for one in rows:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def views(scene: Scene) -> Image.Image:
    """Views of the photograph, and what the backbone says of each."""
    size = scene.photo.shape[-2:]
    generator = torch.Generator().manual_seed(5)
    jitters = Jitter.cat(
        [Jitter.identity(1, size=size), sample_jitters(3, size=size, generator=generator)]
    )
    seen = apply_jitter(scene.x, jitters)
    with torch.no_grad():
        coarse = scene.model.backbone(seen)
    names = ["photograph", "view 1", "view 2", "view 3"]
    shown = [scene.model.backbone.denormalize(one[None])[0].clamp(0, 1) for one in seen]
    photos = side_by_side([(name, to_image(one)) for name, one in zip(names, shown, strict=True)])
    cells = F.interpolate(coarse, size=size, mode="nearest-exact")
    grid = f"{coarse.shape[2]} x {coarse.shape[3]} features"
    maps = side_by_side([(grid, scene.colours(one)) for one in cells])
    return stacked([photos, maps])


def consistency(scene: Scene) -> Image.Image:
    """Where views agree: mean and deviation of 48 views, carried back to the photograph."""
    size = scene.photo.shape[-2:]
    generator = torch.Generator().manual_seed(0)
    jitters = sample_jitters(48, size=size, generator=generator)
    with torch.no_grad():
        coarse = torch.cat([scene.model.backbone(apply_jitter(scene.x, one)) for one in jitters])
    cells = F.interpolate(coarse, size=size, mode="nearest-exact")
    count = apply_jitter_adjoint(torch.ones(len(jitters), 1, *size), jitters).sum(0)
    count = count.clamp(min=1e-3)
    mean = apply_jitter_adjoint(cells, jitters).sum(0) / count
    error = torch.zeros(1, *size)
    for one, jitter in zip(cells, jitters, strict=True):
        difference = (one - apply_jitter(mean[None], jitter)[0]).square().mean(0)
        error += apply_jitter_adjoint(difference[None, None], jitter)[0]
    deviation = (error / count)[0].sqrt()
    blocks = F.interpolate(scene.features, size=size, mode="nearest-exact")[0]
    return side_by_side(
        [
            ("photograph", to_image(scene.photo)),
            ("one view", scene.colours(blocks)),
            ("mean of 48 views", scene.colours(mean)),
            ("where they disagree", heat(deviation)),
        ]
    )


def upsamplers(scene: Scene) -> Image.Image:
    """The same coarse features by six upsamplers."""
    panels = []
    for label, name in METHODS.items():
        with torch.no_grad():
            panels.append((label, scene.colours(scene.load(name)(scene.x)[0])))
    return stacked([side_by_side(panels[:3]), side_by_side(panels[3:])])


def weights(scene: Scene) -> Image.Image:
    """The weights of the coarse cells in one pixel at an edge, by six upsamplers."""
    height, width = scene.photo.shape[-2:]
    y, x = round(0.30 * height), round(0.40 * width)
    coarse = torch.zeros(1, 1, *scene.features.shape[-2:])
    panels, radius = [], 4
    row, column = (
        (2 * place + 1) * cells // (2 * pixels)
        for place, cells, pixels in zip((y, x), coarse.shape[-2:], (height, width), strict=True)
    )
    for label, name in METHODS.items():
        chosen = f"{name}_universal" if name in ("jbu_stack", "neighbourhood", "detail") else name
        model = scene.load(chosen)
        features = coarse.clone().requires_grad_()
        value = model.upsampler(features, model.guidance(scene.x))[0, 0, y, x]
        (weight,) = torch.autograd.grad(value, features)
        # Around the pixel's cell; the widest upsamplers also weigh what lies further out.
        around = F.pad(weight, (radius,) * 4)[0, 0, row : row + 2 * radius + 1]
        panels.append((label, heat(around[:, column : column + 2 * radius + 1])))
    cell = height // coarse.shape[-2]
    top, left, side = row * cell - radius * cell, column * cell - radius * cell, 9 * cell
    part = to_image(scene.photo).crop((left, top, left + side, top + side))
    part = part.resize((324, 324), Image.Resampling.BICUBIC)
    scale = 324 / side
    place = round((x - left) * scale), round((y - top) * scale)
    ImageDraw.Draw(part).ellipse(
        [place[0] - 7, place[1] - 7, place[0] + 7, place[1] + 7], outline=(255, 60, 0), width=3
    )
    shown = [("the pixel", part), *panels]
    return stacked([side_by_side(shown[:4]), side_by_side(shown[4:])])


def implicit(scene: Scene) -> Image.Image:
    """Coarse features, one pass, and a fit to many views."""
    fitted = upfeat.fit_implicit(scene.photo, scene.model.backbone, seed=0, size=None)
    size = scene.photo.shape[-2:]
    blocks = F.interpolate(scene.features, size=size, mode="nearest-exact")[0]
    with torch.no_grad():
        detail = scene.model(scene.x)[0]
    return side_by_side(
        [
            ("photograph", to_image(scene.photo)),
            ("coarse features", scene.colours(blocks)),
            ("one pass (detail)", scene.colours(detail)),
            ("a fit to many views", scene.colours(fitted.render(tuple(size))[0])),
        ]
    )


def zoom(scene: Scene) -> Image.Image:
    """The eye of the cat: photograph, bilinear, detail at four times the photograph's size."""
    height, width = scene.photo.shape[-2:]
    top, left, side = height // 5, width // 4, height // 3
    large = (4 * height, 4 * width)
    guidance = F.interpolate(scene.x, size=large, mode="bicubic", antialias=True)
    panels = [("photograph", to_image(scene.photo).crop((left, top, left + side, top + side)))]
    for label in ("nearest", "bilinear", "detail"):
        upsampler = scene.load(label).upsampler
        lazy = upfeat.UpsampledFeatures(scene.features, guidance, upsampler)
        with torch.no_grad():
            part = lazy.crop(4 * top, 4 * left, 4 * side, 4 * side)[0]
        panels.append((label, scene.colours(part)))
    panels[0] = ("photograph", panels[0][1].resize((4 * side, 4 * side), Image.Resampling.BICUBIC))
    return side_by_side(panels)


def dark(scene: Scene) -> Image.Image:
    """The photograph in the dark: bilinear, and one pass without and with ``least_contrast``."""
    seen = (0.1 + 0.15 * (scene.photo - 0.1)).mul(255).round() / 255
    x = scene.model.preprocess(to_image(seen))
    with torch.no_grad():
        features = scene.model.backbone(x)
    basis = PCABasis(features[0])
    panels = [("in the dark", to_image(seen))]
    plain = scene.load("detail_universal")
    plain.upsampler.neighbourhood.least_contrast = 0.0
    for label, model in (
        ("bilinear", scene.load("bilinear")),
        ("least_contrast=0", plain),
        ("as shipped", scene.load("detail_universal")),
    ):
        with torch.no_grad():
            values = model.upsampler(features, model.guidance(x))[0]
        panels.append((label, to_image(basis.colours(basis.project(values)))))
    return side_by_side(panels)


PICTURES: dict[str, Callable[[Scene], Image.Image]] = {
    "views": views,
    "consistency": consistency,
    "upsamplers": upsamplers,
    "weights": weights,
    "implicit": implicit,
    "zoom": zoom,
    "dark": dark,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all pictures, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DOCS / "images")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in PICTURES:
            parser.error(f"there is no picture {name!r}; known: {', '.join(PICTURES)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    scene = Scene()
    for name in options.names or PICTURES:
        PICTURES[name](scene).save(options.folder / f"{name}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    main()
