"""Figures of the report: a chart of every seed's scores, and predictions next to their targets."""

from __future__ import annotations

import base64
import colorsys
import io
import math
from html import escape

import numpy as np
from PIL import Image

from upfeat.evaluation.data.targets import IGNORE_INDEX
from upfeat.evaluation.results import Results, Row, summary
from upfeat.evaluation.task import Task

_LEAST_LEFT, _WIDTH, _STEP = 190, 700, 21
_CHARACTER = 7  # width of a letter, pixels


def draw_chart(results: Results, name: str, factor: float) -> str:
    """Draw every seed's score as a dot, with one line per row, grouped by protocol.

    Args:
        results: results with at least one row.
        name: name of the score.
        factor: number by which scores are multiplied.

    Returns:
        HTML with an SVG; empty if no row has more than one value of the score.
    """
    if all(len(row.scores[name]) < 2 for row in results.rows):
        return ""
    groups = {
        protocol: [
            row
            for row in results.rows
            if row.protocol == protocol and summary(row.scores[name])["mean"] is not None
        ]
        for protocol in results.protocols
    }
    values = [
        value * factor for rows in groups.values() for row in rows for value in row.scores[name]
    ]
    if not values:
        return ""
    ticks = nice_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]
    longest = max(len(row.upsampler) for rows in groups.values() for row in rows)
    left = max(_LEAST_LEFT, _CHARACTER * longest + 12)
    parts, y = [], 6
    for protocol, rows in groups.items():
        if not rows:
            continue
        y += _STEP
        parts.append(f'<text class="strong" x="0" y="{y + 4}">{escape(protocol)}</text>')
        for row in rows:
            y += _STEP
            scaled = [(value * factor - low) / (high - low) for value in row.scores[name]]
            parts.append(_line(row, [left + part * _WIDTH for part in scaled], left, y))
    rules = []
    for tick in ticks:
        x = left + (tick - low) / (high - low) * _WIDTH
        rules.append(
            f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{y + 10}"/>'
            f'<text class="soft" x="{x:.1f}" y="{y + 26}" text-anchor="middle">{tick:g}</text>'
        )
    size = f"{left + _WIDTH + 40} {y + 34}"
    return (
        f'<svg viewBox="0 0 {size}" width="{left + _WIDTH + 40}" role="img" '
        f'aria-label="{escape(name)} by row">{"".join(rules + parts)}</svg>'
        "<p class=pm>Dots: seeds. Bars: means. Orange: bilinear.</p>"
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers, evenly spaced, that enclose the range from low to high."""
    size = max(abs(low), abs(high))
    # If the values differ by rounding alone, their size is the span; if all are 0, the span is 1.
    span = next((one for one in (high - low, size) if one > 1e-9 * size + 1e-300), 1.0)
    unit = 10 ** math.floor(math.log10(span))
    step = next(part * unit for part in (0.2, 0.25, 0.5, 1, 2) if span / (part * unit) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    # Rounded to one digit more than the step has: 3 · 0.1 becomes 0.3, and tiny steps stay apart.
    digits = 2 - math.floor(math.log10(step))
    return [round(index * step, digits) for index in range(first, last + 1)]


def _line(row: Row, xs: list[float], left: int, y: int) -> str:
    kind = "base" if row.upsampler == "bilinear" else "mark"
    mean = sum(xs) / len(xs)
    dots = "".join(
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y}" r="3.5" fill-opacity=".55" '
        'stroke-opacity="0"/>'
        for x in xs
    )
    return (
        f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(row.upsampler)}</text>'
        f'<line class="rule" x1="{left}" x2="{left + _WIDTH}" y1="{y}" y2="{y}"/>{dots}'
        f'<line class="{kind}" x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 7}" y2="{y + 7}" '
        'stroke-width="2"/>'
    )


def draw_samples(results: Results, task: type[Task]) -> str:
    """Show every example: image and target, then each upsampler's prediction and its errors."""
    if not results.examples:
        return ""
    parts = [f"<h2>{task.pictures_title}</h2>"]
    classes = task.pictures == "classes"
    if classes:
        parts.append(_key(results.data["classes"]))
    parts += [_sample(results, task, name) for name in results.examples]
    note = (
        "Images are evenly spaced over the test list, not hand-picked. Predictions are "
        "those of the first seed."
    )
    if classes:
        note += " Next to each prediction: errors in red, ignored pixels in grey."
    return "".join([*parts, f"<p class=pm>{note}</p>"])


def _sample(results: Results, task: type[Task], name: str) -> str:
    example = results.examples[name]
    side = [("image", example["image"])]
    if "target" in example:
        side.append((task.target or "target", _shown_target(results, task, example)))
    left = "".join(f"<div class=cell>{label}{_img(source, label)}</div>" for label, source in side)
    n_columns = max(sum(row.protocol == p for row in results.rows) for p in results.protocols)
    right = []
    for protocol in results.protocols:
        rows = [row for row in results.rows if row.protocol == protocol and name in row.pictures]
        if rows and len(results.protocols) > 1:
            right.append(f"<h3>{escape(protocol)}</h3>")
        right += [_prediction(results, task, example, row, name) for row in rows]
    # Class maps, shown with their errors, fill the width; other pictures are as wide as the image.
    width = "1fr" if task.pictures == "classes" else "8.5rem"
    columns = f"grid-template-columns:repeat({n_columns},minmax(0,{width}))"
    return (
        f"<figure><figcaption>{escape(name)}</figcaption><div class=sample>"
        f'<div class=side>{left}</div><div class=rows style="{columns}">{"".join(right)}</div>'
        "</div></figure>"
    )


def _prediction(
    results: Results, task: type[Task], example: dict[str, str], row: Row, name: str
) -> str:
    sources, shape = _shown_prediction(results, task, example, row.pictures[name])
    images = "".join(_img(source, f"{row.upsampler}, {row.protocol}") for source in sources)
    # Two tall pictures are placed side by side, two wide pictures one above the other.
    kind = "tall" if shape[0] > shape[1] and len(sources) > 1 else "wide"
    return f"<div class=cell>{escape(row.upsampler)}<div class='pair {kind}'>{images}</div></div>"


def _shown_target(results: Results, task: type[Task], example: dict[str, str]) -> str:
    if task.pictures != "classes":
        return _source(example["target"])
    return _png(palette(len(results.data["classes"]))[_indices(example["target"])])


def _shown_prediction(
    results: Results, task: type[Task], example: dict[str, str], picture: str
) -> tuple[list[str], tuple[int, int]]:
    """Return the sources of a prediction's pictures, and the (height, width) of class maps."""
    if task.pictures != "classes":
        return [_source(picture)], (1, 1)
    label, predicted = _indices(example["target"]), _indices(picture)
    errors = np.full((*label.shape, 3), 255, np.uint8)
    errors[label != predicted] = (204, 41, 41)
    errors[label == IGNORE_INDEX] = (190, 190, 190)
    colours = palette(len(results.data["classes"]))[predicted]
    return [_png(colours), _png(errors)], (label.shape[0], label.shape[1])


def _source(encoded: str) -> str:
    """Return the source of a picture for HTML, by the first bytes of a PNG file in base64."""
    kind = "png" if encoded.startswith("iVBOR") else "jpeg"
    return f"data:image/{kind};base64,{encoded}"


def palette(n_classes: int) -> np.ndarray:
    """Return distinct colours (256, 3) uint8: light grey for the first class, white for ignored."""
    table = np.full((256, 3), 255, np.uint8)
    table[0] = (225, 228, 232)
    for index in range(1, n_classes):
        hue = (index - 1) * 0.618034 % 1
        colour = colorsys.hls_to_rgb(hue, (0.45, 0.62, 0.33)[index % 3], 0.72)
        table[index] = [round(value * 255) for value in colour]
    return table


def _key(classes: list[str]) -> str:
    colours = palette(len(classes))
    items = [
        f"<span><i style='background:rgb({r},{g},{b})'></i>{escape(name)}</span>"
        for name, (r, g, b) in zip(classes, colours.tolist(), strict=False)
    ]
    return f"<div class=key>{''.join(items)}</div>"


def _img(source: str, name: str) -> str:
    return f'<img src="{source}" alt="{escape(name)}">'


def _indices(encoded: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        return np.array(image)


def _png(colours: np.ndarray) -> str:
    file = io.BytesIO()
    picture = Image.fromarray(colours).quantize(colors=256, dither=Image.Dither.NONE)
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
