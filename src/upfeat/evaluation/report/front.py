"""Chart of quality against cost: the main score of each method over its time for one image."""

from __future__ import annotations

import math
from html import escape
from typing import NamedTuple

from upfeat.evaluation.report.figures import nice_ticks
from upfeat.evaluation.results import Results, Row, summary

_LEFT, _RIGHT, _TOP, _WIDTH, _HEIGHT = 52, 150, 30, 640, 260
_CHARACTER, _LINE = 6.3, 13  # size of a label's letters and lines, pixels


class _Dot(NamedTuple):
    """A method in the chart."""

    row: Row
    seconds: float
    score: float


class _Box(NamedTuple):
    """A rectangle that a label or a dot covers."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def draw_front(results: Results, name: str, factor: float, *, higher: bool) -> str:
    """Draw one chart for each protocol with at least three methods of known time.

    Methods that no other method beats in both score and time are joined by a line.

    Args:
        results: results with at least one row.
        name: name of the score.
        factor: number by which scores are multiplied.
        higher: whether a high score is good.

    Returns:
        HTML with an SVG for each protocol; empty if there are none.
    """
    charts = []
    for protocol in results.protocols:
        dots = [
            _Dot(row, seconds, mean * factor)
            for row in results.rows
            if row.protocol == protocol
            and (mean := summary(row.scores[name])["mean"]) is not None
            and (seconds := row.cost.get("total_seconds")) is not None
            and seconds > 0
        ]
        if len(dots) >= 3:
            charts.append(_chart(protocol, dots, higher=higher))
    return "".join(charts)


class _Axes(NamedTuple):
    """Scales of a chart: seconds on a logarithmic axis, and scores."""

    first: float
    last: float
    """Ends of the axis of seconds, as powers of ten."""
    ticks: list[float]
    """Scores with a line."""

    def x(self, seconds: float) -> float:
        """Place of a time, pixels."""
        return _LEFT + (math.log10(seconds) - self.first) / (self.last - self.first) * _WIDTH

    def y(self, score: float) -> float:
        """Place of a score, pixels."""
        return _TOP + (self.ticks[-1] - score) / (self.ticks[-1] - self.ticks[0]) * _HEIGHT

    def draw(self) -> list[str]:
        """Draw the lines and their numbers."""
        right, bottom = _LEFT + _WIDTH, _TOP + _HEIGHT
        scores = [
            f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="soft" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
            for tick in self.ticks
            for y in [self.y(tick)]
        ]
        times = [
            f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
            f'<text class="soft" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{seconds:g} s</text>"
            for seconds in _round_times(self.first, self.last)
            for x in [self.x(seconds)]
        ]
        return scores + times


def _chart(protocol: str, dots: list[_Dot], *, higher: bool) -> str:
    scores = [dot.score for dot in dots]
    first = math.log10(min(dot.seconds for dot in dots)) - 0.1
    last = math.log10(max(dot.seconds for dot in dots)) + 0.1
    axes = _Axes(first, max(last, first + 0.5), nice_ticks(min(scores), max(scores)))
    places = [(axes.x(dot.seconds), axes.y(dot.score)) for dot in dots]
    line = " ".join(
        f"{axes.x(dot.seconds):.1f},{axes.y(dot.score):.1f}" for dot in _front(dots, higher=higher)
    )
    parts = [
        f'<text class="strong" x="0" y="14">{escape(protocol)}</text>',
        *axes.draw(),
        f'<polyline class="front" points="{line}"/>',
    ]
    labels = _labels(dots, places)
    for dot, (x, y), (label_x, label_y, anchor) in zip(dots, places, labels, strict=True):
        kind = "base" if dot.row.upsampler == "bilinear" else "mark"
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
            f'<text class="name" x="{label_x:.1f}" '
            f'y="{label_y:.1f}" text-anchor="{anchor}">{escape(dot.row.upsampler)}</text>'
        )
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + 24
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="score over seconds, {escape(protocol)}">{"".join(parts)}</svg>'
    )


def _round_times(first: float, last: float) -> list[float]:
    """Round numbers between two powers of ten, at least two; fewer digits over a wider range."""
    found: list[float] = []
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        made = (
            digit * 10.0**power
            for power in range(math.floor(first) - 1, math.ceil(last) + 1)
            for digit in digits
        )
        found = [float(f"{one:g}") for one in made if first <= math.log10(one) <= last]
        if len(found) > 2:
            break
    return found


def _front(dots: list[_Dot], *, higher: bool) -> list[_Dot]:
    """Return the methods with a better score than every faster one, fastest first."""
    sign, found = 1 if higher else -1, []
    for dot in sorted(dots, key=lambda dot: (dot.seconds, -sign * dot.score)):
        if not found or sign * dot.score > sign * found[-1].score:
            found.append(dot)
    return found


def _labels(dots: list[_Dot], places: list[tuple[float, float]]) -> list[tuple[float, float, str]]:
    """Choose a place for each label, x, y and anchor, where it covers no dot and no label."""
    taken = [_Box(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    found = []
    for dot, (x, y) in zip(dots, places, strict=True):
        length = _CHARACTER * len(dot.row.upsampler)
        choices = [
            (side * 8 + x, y + down, "start" if side > 0 else "end")
            for down in (4, 4 + _LINE, 4 - _LINE, 4 + 2 * _LINE, 4 - 2 * _LINE)
            for side in (1, -1)
        ]
        boxes = []
        for label_x, label_y, anchor in choices:
            left = label_x if anchor == "start" else label_x - length
            boxes.append(_Box(left, label_y - 10, left + length, label_y + 3))
        free = [
            index
            for index, box in enumerate(boxes)
            if box.left >= 0
            and box.right <= _LEFT + _WIDTH + _RIGHT
            and not any(box.meets(other) for other in taken)
        ]
        chosen = free[0] if free else 0
        taken.append(boxes[chosen])
        found.append(choices[chosen])
    return found
