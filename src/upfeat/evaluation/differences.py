"""Differences between methods, and how far they are to be trusted.

A test set is a sample of images. Drawn again with replacement, the same images for every method, it
tells how much a difference owes to those that happen to be in it: the paired bootstrap.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upfeat.evaluation.results import Row, summary

BASELINE = "bilinear"
"""The method that every other is compared with."""

ROUNDS = 1000
"""Test sets that are drawn."""

_CERTAIN = 0.95
_DTYPES = ("int64", "float64")

ScoresOf = Callable[[Tensor], Mapping[str, Tensor]]
"""From sums over images (…, M) to scores by name, each (…)."""


@dataclass(frozen=True)
class Difference:
    """One method less another, in one score.

    Attributes:
        upsampler: the one.
        against: the other.
        protocol: of both.
        score: name of the score.
        values: for each seed.
        low: of the mean over seeds, below which 2.5 % of the drawn test sets lie.
        high: above which 2.5 % lie.
    """

    upsampler: str
    against: str
    protocol: str
    score: str
    values: list[float]
    low: float
    high: float

    @property
    def mean(self) -> float:
        """Mean difference over seeds."""
        return sum(self.values) / len(self.values)

    @property
    def certain(self) -> bool:
        """True if 0 lies outside the interval."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is not defined is ``None``."""
        values = {**asdict(self), "mean": self.mean}
        del values["values"]
        shown = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        return {**shown, "values": summary(self.values)["values"]}


def pack_sums(sums: Tensor) -> dict[str, Any]:
    """Put what each image adds to the scores, (images, seeds, M), in few characters."""
    array = sums.cpu().numpy()
    if array.dtype.name not in _DTYPES:
        raise ValueError(f"sums is {array.dtype}; give one of {_DTYPES}")
    packed = base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()
    return {"shape": list(array.shape), "dtype": array.dtype.name, "values": packed}


def unpack_sums(packed: Mapping[str, Any]) -> Tensor:
    """The inverse of :func:`pack_sums`, float64."""
    raw = zlib.decompress(base64.b64decode(packed["values"]))
    array = np.frombuffer(raw, packed["dtype"]).reshape(packed["shape"])
    return torch.from_numpy(array.astype("float64"))


def find_differences(
    rows: Sequence[Row],
    scores_of: ScoresOf,
    higher_is_better: Mapping[str, bool],
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> list[Difference]:
    """Compare every row with bilinear, and with the best of the other rows of its protocol.

    Args:
        rows: those without sums of their images are left out.
        scores_of: from summed sums to scores.
        higher_is_better: which scores to compare, in order, and the good direction of each; the
            first one decides which row is best.
        rounds: test sets to draw.
        seed: of the draws; the same for all rows.
    """
    found = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        group = [row for row in rows if row.protocol == protocol and row.sums]
        if len(group) < 2:
            continue
        sums = [unpack_sums(row.sums) for row in group]
        drawn = _draw(len(sums[0]), rounds, seed)
        spread = [scores_of(_resampled(one, drawn)) for one in sums]
        for index, row in enumerate(group):
            for other in _others(index, group, higher_is_better):
                found += [
                    _difference(name, row, group[other], spread[index], spread[other])
                    for name in higher_is_better
                ]
    return found


def _draw(count: int, rounds: int, seed: int) -> Tensor:
    """Count how often each image is in each drawn set, (rounds, images)."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(count, (rounds, count), generator=generator)
    drawn = torch.zeros(rounds, count, dtype=torch.float64)
    return drawn.scatter_add_(1, places, torch.ones_like(places, dtype=torch.float64))


def _resampled(sums: Tensor, drawn: Tensor) -> Tensor:
    """(images, seeds, M) -> (rounds, seeds, M)."""
    return (drawn @ sums.flatten(1)).unflatten(1, sums.shape[1:])


def _others(index: int, group: Sequence[Row], scores: Mapping[str, bool]) -> list[int]:
    """Rows to compare one with: bilinear, then the best of the others."""
    first, higher = next(iter(scores.items()))
    means = [summary(row.scores[first])["mean"] for row in group]
    signed = [-math.inf if one is None else one if higher else -one for one in means]
    rest = [place for place in range(len(group)) if place != index]
    best = max(rest, key=lambda place: signed[place])
    base = [place for place in rest if group[place].upsampler == BASELINE]
    return list(dict.fromkeys([*base, best]))


def _difference(
    name: str, row: Row, other: Row, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> Difference:
    values = [a - b for a, b in zip(row.scores[name], other.scores[name], strict=True)]
    drawn = (own[name] - theirs[name]).mean(1)
    drawn = drawn[drawn.isfinite()]
    edge = (1 - _CERTAIN) / 2
    if not len(drawn):
        low = high = math.nan
    else:
        low, high = torch.quantile(drawn, drawn.new_tensor([edge, 1 - edge])).tolist()
    return Difference(row.upsampler, other.upsampler, row.protocol, name, values, low, high)
