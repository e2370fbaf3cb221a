"""Training of linear heads on upsampled features of labelled photographs, or of a raster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from upfeat.bounds import whole
from upfeat.evaluation.data.folders import read_folder
from upfeat.evaluation.data.targets import IGNORE_INDEX
from upfeat.evaluation.metrics import class_iou, confusion_matrix, pixel_accuracy
from upfeat.heads import SavedHead, describe_backbone
from upfeat.model import FeatUp
from upfeat.probes import LinearProbe, Pixels, draw_pixels, fit_classifier, read_pixels
from upfeat.raster.labels import read_labels
from upfeat.raster.outputs import Features
from upfeat.raster.pieces import pieces, render
from upfeat.raster.plan import DEFAULT_BUDGET, make_plan
from upfeat.raster.scene import Scene
from upfeat.types import Window

LABEL_TILE = 512
"""Side in pixels of a raster's tiles, which are the groups of the cross-validation.

In rasters smaller than two such tiles, the side is a fourth of the raster's longer side."""

OnGroup = Callable[[str], None]
"""Function that is called with the name of each image or tile that is read."""


@dataclass(frozen=True)
class Scores:
    """Cross-validated scores of a head, on sampled pixels of groups that were held out.

    Attributes:
        matrices: confusion matrix of each fold, (folds, K, K), one row per label.
        groups: number of images, or of a raster's tiles.
    """

    matrices: Tensor
    groups: int

    @property
    def iou(self) -> Tensor:
        """Intersection over union of the K classes over all folds, (K,); NaN without labels."""
        return class_iou(self.matrices.sum(0))

    @property
    def accuracy(self) -> float:
        """Fraction of correct pixels over all folds."""
        return pixel_accuracy(self.matrices.sum(0))

    def lines(self, names: list[str]) -> list[str]:
        """Format the scores as text: a line for each class, the mean IoU and the accuracy.

        The spread is the standard deviation of the scores of single folds. Scores are not the means
        of these: a fold without a class knows no score of it, but may have pixels taken for it.
        """
        folds = torch.stack([class_iou(matrix) for matrix in self.matrices])
        single = torch.tensor([pixel_accuracy(matrix) for matrix in self.matrices])
        rows = [(name, self.iou[index], folds[:, index]) for index, name in enumerate(names)]
        rows.append(("mean IoU", self.iou.nanmean(), folds.nanmean(1)))
        rows.append(("accuracy", torch.tensor(self.accuracy), single))
        width = max(len(name) for name, _, _ in rows)
        return [f"{name:<{width}}  {_with_spread(*values)}" for name, *values in rows]


def _with_spread(value: Tensor, folds: Tensor) -> str:
    if value.isnan():
        return "–"
    known = 100 * folds[~folds.isnan()]
    spread = f" ± {known.std():.1f}" if len(known) > 1 else ""
    return f"{100 * value:.1f}{spread} %"


def train_on_folder(
    model: FeatUp,
    folder: str | Path,
    *,
    size: int | None = None,
    pixels: int = 2000,
    folds: int = 5,
    seed: int = 0,
    on_image: OnGroup | None = None,
) -> tuple[SavedHead, Scores]:
    """Train a head on a folder of photographs and labels.

    Args:
        model: backbone and upsampler.
        folder: a folder with ``images/``, ``labels/`` and ``classes.json``, or with these in
            ``train/``; see :func:`upfeat.evaluation.data.folders.read_folder`. Images in ``test/``
            are not used.
        size: shorter side in pixels to which images are resized; ``None`` to keep their size.
        pixels: number of pixels drawn from each image.
        folds: number of folds of the cross-validation, at most one per image.
        seed: seed of the drawn pixels and the folds.
        on_image: function that is called with the name of each image; ``None`` for none.

    Returns:
        The head, trained on all images, and its cross-validated scores.

    Raises:
        FileNotFoundError: the folder or a part of it does not exist.
        ValueError: fewer than two images have labels, or the labels have fewer than two classes.
    """
    _check_settings(pixels, folds, seed)
    dataset = read_folder(folder)
    split = (Path(folder) / "train").is_dir()
    samples = dataset.train if split else [*dataset.train, *dataset.test]
    generator = torch.Generator().manual_seed(seed)

    def groups() -> Iterator[tuple[Tensor, Tensor]]:
        for sample in sorted(samples, key=lambda one: one.name):
            if on_image is not None:
                on_image(sample.name)
            try:
                label = torch.from_numpy(dataset.read_target(sample)).long()
            except ValueError as error:  # its message does not name the file
                raise ValueError(f"{sample.target}: {error}") from None
            x = model.preprocess(sample.image)
            if x.shape[2:] != label.shape:
                raise ValueError(
                    f"{sample.target}: is {label.shape[0]}×{label.shape[1]} pixels but its image "
                    f"{x.shape[2]}×{x.shape[3]} (height×width)"
                )
            if size is not None:
                x = model.preprocess(sample.image, size)
                shape = (x.shape[2], x.shape[3])
                label = torch.nn.functional.interpolate(
                    label[None, None].float(), size=shape, mode="nearest-exact"
                )[0, 0].long()
            if not bool((label != IGNORE_INDEX).any()):
                continue
            places = draw_pixels(label != IGNORE_INDEX, pixels, generator)
            with torch.inference_mode():
                features = read_pixels(model(x)[0], places.to(x.device)).cpu()
            yield features, label.flatten()[places]

    return _train(list(groups()), model, dataset.classes, folds, seed)


def train_on_raster(
    model: FeatUp,
    scene: Scene,
    labels: str | Path,
    names: list[str] | None = None,
    *,
    max_memory: int = DEFAULT_BUDGET,
    pixels: int = 2000,
    folds: int = 5,
    seed: int = 0,
    on_tile: OnGroup | None = None,
) -> tuple[SavedHead, Scores]:
    """Train a head on a partly labelled raster, with its tiles as groups of the cross-validation.

    Args:
        model: backbone and upsampler.
        scene: an open raster.
        labels: a raster on the same grid with class indices, where 255 or the no-data value marks
            unlabelled pixels; or a GeoJSON file in the raster's reference system, whose features
            have a property ``class``, the name of the class.
        names: names of the classes; ``None`` for those of the GeoJSON, or the indices.
        max_memory: most bytes that the process may use.
        pixels: number of pixels drawn from each tile.
        folds: number of folds of the cross-validation, at most one per tile.
        seed: seed of the drawn pixels and the folds.
        on_tile: function that is called with the position of each tile; ``None`` for none.

    Returns:
        The head, trained on all tiles, and its cross-validated scores.

    Raises:
        FileNotFoundError: the file of labels does not exist.
        ValueError: the labels do not fit the raster, or too few tiles or classes are labelled.
    """
    _check_settings(pixels, folds, seed)
    source = read_labels(labels, scene, names)
    what = Features(model.embed_dim, {}, "float32")
    # Smaller tiles for a small raster, so that the cross-validation has several groups.
    side = LABEL_TILE if max(scene.size) >= 2 * LABEL_TILE else max(-(-max(scene.size) // 4), 64)
    plan = make_plan(scene.size, model, what, max_memory=max_memory, tile=side)
    generator = torch.Generator().manual_seed(seed)

    def labelled(_: int, window: Window) -> bool:
        return bool((source.read(window) != IGNORE_INDEX).any())

    groups = []
    for piece in pieces(scene, model, plan, labelled):
        label = torch.from_numpy(source.read(piece.pixels)).long()
        usable = (label != IGNORE_INDEX) & torch.from_numpy(piece.valid)
        if piece.coarse is None or not bool(usable.any()):
            continue
        if on_tile is not None:
            on_tile(f"row {piece.pixels.top}, column {piece.pixels.left}")
        places = draw_pixels(usable, pixels, generator)
        features = torch.from_numpy(render(piece, model, what))
        groups.append((read_pixels(features, places), label.flatten()[places]))
    return _train(groups, model, source.names, folds, seed)


def _check_settings(pixels: int, folds: int, seed: int) -> None:
    whole("pixels", pixels)
    whole("folds", folds, 2)
    whole("seed", seed, 0, (1 << 63) - 1)


def _train(
    groups: list[tuple[Tensor, Tensor]], model: FeatUp, names: list[str], folds: int, seed: int
) -> tuple[SavedHead, Scores]:
    """Cross-validate a head over groups of (features, targets), and fit it to all groups."""
    if len(groups) < 2:
        raise ValueError(
            f"{len(groups)} labelled images or tiles are too few; two are the least: label more "
            "images, or further parts of the raster"
        )
    stacked = Pixels(
        torch.stack([one[0] for one in groups]).float().clone(),
        torch.stack([one[1] for one in groups]),
    )
    if len(stacked.targets.unique()) < 2:
        raise ValueError("the labels show one class only; a head needs two")
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    results = [
        _score(stacked, held_out, len(names), seed)
        for held_out in order.tensor_split(min(folds, len(groups)))
    ]
    scores = Scores(torch.stack(results), len(groups))
    head = fit_classifier(stacked, len(names), torch.Generator().manual_seed(seed))
    saved = SavedHead(
        head.weight,
        head.bias,
        names,
        "classes",
        describe_backbone(model.backbone.origin),
        model.upsampler.name,
    )
    return saved, scores


def _score(pixels: Pixels, held_out: Tensor, classes: int, seed: int) -> Tensor:
    """Confusion matrix (K, K) on held-out groups of a head fitted to the other groups."""
    kept = torch.ones(len(pixels.features), dtype=torch.bool)
    kept[held_out] = False
    fitted = pixels[kept.nonzero()[:, 0]]
    head: LinearProbe = fit_classifier(fitted, classes, torch.Generator().manual_seed(seed))
    targets = pixels.targets[held_out].flatten()[None]
    guessed = head(pixels.features[held_out].flatten(0, 1)).argmax(1)[None]
    return confusion_matrix(guessed[None], targets.to(torch.uint8), classes)[0]
