"""Differences between methods, with confidence intervals from the paired bootstrap.

A test set is a sample of images, so a difference between two methods depends on the images that
happen to be in it. To measure this dependence, test sets are drawn from the test images with
replacement, the same images for every method, and the difference is computed on each of them.

Sets that are drawn from n images vary less than sets of n other images would, the less so the fewer
they are. Therefore the interval contains more than 95 % of the drawn sets, as many as Student's t
requires (Hesterberg, What teachers should know about the bootstrap, 2015, the expanded percentile
interval). With fewer than :data:`LEAST` images, none would be wide enough, and none is given.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upfeat.evaluation.results import Row, summary

BASELINE = "bilinear"
"""Label of the method with which all others are compared."""

ROUNDS = 1000
"""Number of test sets drawn by the bootstrap."""

LEAST = 5
"""Least number of test images for which there is an interval."""

_CERTAIN = 0.95
_DTYPES = ("int64", "float64")

ScoresOf = Callable[[Tensor], Mapping[str, Tensor]]
"""Function from sums over images (…, M) to scores by name, each (…)."""


@dataclass(frozen=True)
class Difference:
    """Difference of one score between two methods.

    Attributes:
        upsampler: label of the method whose score is the minuend.
        against: label of the method whose score is subtracted.
        protocol: protocol of both scores.
        score: name of the score.
        values: difference for each seed.
        low: lower end of the 95 % interval of the mean over seeds; NaN with fewer than
            :data:`LEAST` images.
        high: upper end of the interval.
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
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, Any]:
        """Return the difference as JSON values; undefined numbers are ``None``."""
        values = {**asdict(self), "mean": self.mean}
        del values["values"]
        shown = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        return {**shown, "values": summary(self.values)["values"]}


def pack_sums(sums: Tensor, images: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """Compress each image's contribution to the scores, (images, seeds, M), to short text.

    Args:
        sums: contributions, int64 or float64.
        images: for contributions of several images each, such as pairs, the numbers of these
            images, counted from 0; ``None`` if each contribution is of an image of its own.
    """
    array = sums.cpu().numpy()
    if array.dtype.name not in _DTYPES:
        raise ValueError(f"sums is {array.dtype}; give one of {_DTYPES}")
    packed = base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()
    several = {} if images is None else {"images": [list(group) for group in images]}
    return {"shape": list(array.shape), "dtype": array.dtype.name, "values": packed, **several}


def unpack_sums(packed: Mapping[str, Any]) -> Tensor:
    """Recover the sums (images, seeds, M), as float64, from the result of :func:`pack_sums`."""
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
        rows: rows to compare; rows without ``sums`` are left out.
        scores_of: function from sums over images to scores.
        higher_is_better: names of the scores to compare, in order, each with its good direction;
            the first score decides which row is best.
        rounds: number of test sets to draw.
        seed: seed of the draws, which are the same for all rows.
    """
    found = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        group = [row for row in rows if row.protocol == protocol and row.sums]
        if len(group) < 2:
            continue
        sums = [unpack_sums(row.sums) for row in group]
        drawn, count = _weights(group[0].sums, rounds, seed)
        spread = [scores_of(_resampled(one, drawn)) for one in sums]
        for index, row in enumerate(group):
            for other in _others(index, group, higher_is_better):
                found += [
                    _difference(name, row, group[other], spread[index], spread[other], count)
                    for name in higher_is_better
                ]
    return found


def _weights(packed: Mapping[str, Any], rounds: int, seed: int) -> tuple[Tensor, int]:
    """Weigh the contributions in each drawn set, (rounds, contributions); count the images.

    A contribution of several images counts as often as the product of their numbers says, since
    contributions with an image in common are not independent (Owen, The pigeonhole bootstrap,
    2007; its intervals are too wide rather than too narrow).
    """
    groups = packed.get("images")
    if groups is None:
        count = packed["shape"][0]
        return _draw(count, rounds, seed), count
    members = torch.tensor(groups).T  # (images of a contribution, contributions)
    count = int(members.max()) + 1
    drawn = _draw(count, rounds, seed)
    return torch.stack([drawn[:, each] for each in members]).prod(0), count


def _draw(count: int, rounds: int, seed: int) -> Tensor:
    """Count how often each image is in each drawn set, (rounds, images)."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(count, (rounds, count), generator=generator)
    drawn = torch.zeros(rounds, count, dtype=torch.float64)
    return drawn.scatter_add_(1, places, torch.ones_like(places, dtype=torch.float64))


def _resampled(sums: Tensor, drawn: Tensor) -> Tensor:
    """Sum the contributions of images over each drawn set: (rounds, seeds, M)."""
    return (drawn @ sums.flatten(1)).unflatten(1, sums.shape[1:])


def _others(index: int, group: Sequence[Row], scores: Mapping[str, bool]) -> list[int]:
    """Return indices of the rows to compare a row with: bilinear, then the best other row."""
    first, higher = next(iter(scores.items()))
    means = [summary(row.scores[first])["mean"] for row in group]
    signed = [-math.inf if one is None else one if higher else -one for one in means]
    rest = [place for place in range(len(group)) if place != index]
    best = max(rest, key=lambda place: signed[place])
    base = [place for place in rest if group[place].upsampler == BASELINE]
    return list(dict.fromkeys([*base, best]))


def _difference(
    name: str,
    row: Row,
    other: Row,
    own: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    count: int,
) -> Difference:
    values = [a - b for a, b in zip(row.scores[name], other.scores[name], strict=True)]
    drawn = (own[name] - theirs[name]).mean(1)
    drawn = drawn[drawn.isfinite()]
    if count < LEAST or not len(drawn):
        low = high = math.nan
    else:
        edge = tail(count)
        low, high = torch.quantile(drawn, drawn.new_tensor([edge, 1 - edge])).tolist()
    return Difference(row.upsampler, other.upsampler, row.protocol, name, values, low, high)


def tail(count: int) -> float:
    """Return the fraction of drawn test sets on either side of the interval, for ``count`` images.

    It tends to 2.5 % for many images, and is 0.6 % for 8.
    """
    normal, free = NormalDist(), count - 1
    z = normal.inv_cdf((1 + _CERTAIN) / 2)
    # Student's quantile, to 0.3 % from 4 degrees of freedom on (Abramowitz and Stegun, 26.7.5).
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    return normal.cdf(-t * math.sqrt(count / free))
