"""Linear maps of channels that translate features of one kind into another, learnt in closed form.

Features of an enlarged image, and features fitted to many views, differ in kind from those of the
image itself. A matrix and a constant, learnt without labels from maps of the same cells, turn the
former into the latter.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from upfeat.backbones import Backbone
from upfeat.linear import ridge
from upfeat.provenance import digest
from upfeat.storage import read_tensors, write_tensors
from upfeat.tensor_checks import check_layouts, check_values, layouts_of

PENALTY = 1e-2
"""Penalty of a translation learnt from many images, in units of the features' mean variance."""
PENALTY_OF_ONE = 1.0
"""Penalty of a translation learnt from a single image, in units of a cell's mean squared norm."""
# Bound of the rounding error of a cell's squared norm, in units of the squared norm of the mean.
_ROUNDING = 1e-12

_SHIPPED = Path(__file__).parent / "weights"
_FORMAT = "upfeat-translation-1"


class Translation(NamedTuple):
    """Affine map of channels from features of the enlarged image to features of the image."""

    weight: Tensor
    """Matrix of the map, (C, C), or (B, C, C) for one matrix per image."""
    bias: Tensor
    """Constant of the map, (C,), or (B, C) for one constant per image."""

    def __call__(self, features: Tensor) -> Tensor:
        """Translate features: (B, C, h, w) -> (B, C, h, w)."""
        out = self.weight @ features.flatten(2) + self.bias[..., None]
        return out.unflatten(2, features.shape[2:])

    def save(self, path: str | Path, backbone: Backbone) -> None:
        """Write the translation to a file, with the name and a digest of its backbone."""
        facts = {"format": _FORMAT, "backbone": backbone.name, "weights": digest(backbone.origin)}
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        write_tensors(path, tensors, facts)

    @staticmethod
    def load(path: str | Path, backbone: Backbone) -> Translation:
        """Read a translation that :meth:`save` wrote, and check that it is for ``backbone``.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not a translation, contains NaN or infinity, or was learnt for
                another backbone.
        """
        tensors, facts = read_tensors(path)
        if facts.get("format") != _FORMAT or set(tensors) != {"weight", "bias"}:
            raise ValueError(f"{path}: not a translation of features")
        if facts.get("weights") != digest(backbone.origin):
            raise ValueError(
                f"{path}: learnt for other weights ({facts.get('backbone')!r:.60}) than those of "
                f"{backbone.name}; learn one by upfeat.scales.fit_translation"
            )
        channels = backbone.embed_dim
        expected = {"weight": torch.empty(channels, channels), "bias": torch.empty(channels)}
        check_layouts(path, layouts_of(tensors), expected)
        check_values(path, tensors)
        return Translation(tensors["weight"], tensors["bias"])


@torch.no_grad()
def learn_translation(
    pairs: Iterable[tuple[Tensor, Tensor]], penalty: float = PENALTY
) -> Translation:
    """Learn a translation from pairs of feature maps of the same cells.

    Args:
        pairs: pairs of maps (B, C, h, w): the targets, which are the images' own features, and the
            features to translate into them.
        penalty: see :func:`fit_translation`.

    Raises:
        ValueError: ``pairs`` is empty, or the penalty is not above 0.
    """
    return learn_from(pairs, penalty, "pairs")


def learn_from(pairs: Iterable[tuple[Tensor, Tensor]], penalty: float, label: str) -> Translation:
    """Learn a translation from pairs; ``label`` is the name of the caller's argument."""
    if not penalty > 0:
        raise ValueError(f"penalty={penalty} must be above 0")
    gram: Tensor | None = None
    moment: Tensor | None = None
    for own, second in pairs:
        inputs, targets = (one.double().transpose(0, 1).flatten(1) for one in (second, own))
        inputs = torch.cat([inputs, torch.ones_like(inputs[:1])])
        here = inputs @ inputs.T, inputs @ targets.T
        if gram is None or moment is None:
            gram, moment = here
        else:
            gram, moment = gram + here[0], moment + here[1]
    if gram is None or moment is None:
        raise ValueError(f"{label} is empty; give at least one")
    count, means = gram[-1, -1], gram[:-1, -1:] / gram[-1, -1]  # (C, 1)
    level = moment[-1] / count
    gram = gram[:-1, :-1] - count * means @ means.T
    moment = moment[:-1] - count * means * level
    weight = ridge(gram, moment, penalty * gram.diagonal().mean()).T
    return Translation(weight.float(), (level - weight @ means[:, 0]).float())


def fit_to_image(own: Tensor, second: Tensor, penalty: float = PENALTY_OF_ONE) -> Translation:
    """Learn the translation of each image from its own cells.

    The matrix is the identity plus a correction that is fitted by ridge regression in its dual
    form. An image may have fewer cells than channels; directions of the channel space in which its
    cells do not vary are then left unchanged.

    Args:
        own: (B, C, h, w), the image's features.
        second: (B, C, h, w), features of the enlarged image, averaged to the same cells.
        penalty: ridge penalty of the correction, in units of the mean squared norm of a cell, after
            the mean over cells is subtracted.
    """
    inputs, targets = (one.flatten(2).to(torch.float32) for one in (second, own))
    centre, level = inputs.mean(2, keepdim=True), targets.mean(2, keepdim=True)
    inputs, targets = inputs - centre, targets - level
    gram = inputs.mT @ inputs  # (B, N, N)
    spread = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    # Cells of a blank image differ by rounding alone, in proportion to their features.
    rounding = _ROUNDING * centre.square().sum(1)
    least = (penalty * (spread + rounding)).clamp(min=torch.finfo(spread.dtype).tiny)
    found = ridge(gram, inputs.mT, least)  # (B, N, C)
    weight = torch.eye(inputs.shape[1]).to(inputs) + (targets - inputs) @ found
    bias = (level - weight @ centre)[..., 0]
    return Translation(weight.to(own.dtype), bias.to(own.dtype))


def shipped_translation(backbone: Backbone, kind: str = "translation") -> Translation | None:
    """The translation that comes with the package; ``None`` if none fits the backbone's weights.

    Args:
        backbone: backbone whose features are translated.
        kind: prefix of the file's name: "translation" for features of the enlarged image, "views"
            for features fitted to many views.
    """
    path = _SHIPPED / f"{kind}_{backbone.name}.safetensors"
    if not path.is_file():
        return None
    try:
        return Translation.load(path, backbone)
    except ValueError:  # a backbone of the same name with other weights
        return None
