"""A report of one file: the table, the classes, and what the predictions look like."""

from __future__ import annotations

import base64
import colorsys
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from upfeat.evaluation.datasets import IGNORE_INDEX
from upfeat.evaluation.results import HIGHER_IS_BETTER, Results, Row, summary
from upfeat.storage import write_bytes

SCORE_NAMES = {
    "miou": "mIoU",
    "accuracy": "accuracy",
    "boundary_f": "boundary F",
    "boundary_miou": "mIoU at edges",
    "drift": "cosine to coarse",
    "rmse": "RMSE",
    "abs_rel": "relative error",
    "delta_1.25": "δ < 1.25",
    "average_drop": "average drop",
    "average_increase": "average increase",
    "error": "view error",
    "cosine": "view cosine",
}
"""How people read the names of scores."""

PERCENT = {
    "miou",
    "accuracy",
    "boundary_f",
    "boundary_miou",
    "delta_1.25",
    "average_drop",
    "average_increase",
}
"""Scores shown times 100."""

_EXPLANATIONS = {
    "own": "the probe is trained on the upsampled features of the training images",
    "transfer": "the probe is trained on the coarse features and applied to the upsampled ones; "
    "upsampling its logits gives the same",
    "probabilities": "the probe is trained on the coarse features and its softmax on the coarse "
    "grid is upsampled instead of the features",
    "views": "features upsampled once must explain the backbone's features of jittered views",
    "cam": "the image is masked by its class activation map, and classified again",
    "miou": "intersection over union, mean over the classes that the test labels hold, %",
    "accuracy": "share of labelled pixels that are right, %",
    "boundary_f": "harmonic mean of precision and recall of class boundaries, where two edges "
    "match within 0.75 % of the image's diagonal, %",
    "boundary_miou": "mIoU over the pixels within that distance of a label edge, %",
    "drift": "cosine between the upsampled features, averaged over each cell, and the coarse ones; "
    "1 means that upsampling leaves the features' meaning alone",
    "rmse": "root mean square error after the best scale and shift of each image, in the unit of "
    "the depth maps",
    "abs_rel": "mean error over the true depth, after the same alignment",
    "delta_1.25": "share of pixels within a factor of 1.25 of the true depth, %",
    "average_drop": "mean loss of the class's probability when only the activated part shows, %",
    "average_increase": "share of images whose class grows more probable then, %",
    "error": "squared error of the predicted features of unseen views over their variance; 0 is "
    "perfect, 1 is as good as their mean",
    "cosine": "mean cosine between predicted and actual centred features of unseen views",
}

_STYLE = """
:root{color-scheme:light;--ink:#1d2430;--soft:#5b6675;--line:#d9dee6;--best:#0b6e4f;--panel:#f6f8fa}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:2.5rem 1.5rem 5rem;color:var(--ink);background:#fff;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:2.6rem 0 .7rem}
p,dl{max-width:75ch}.lead{color:var(--soft);margin:0 0 1.5rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.38rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{border-bottom:2px solid var(--ink);vertical-align:bottom;font-weight:600}
th.l,td.l{text-align:left}tr.group td,tr.group th{border-top:2px solid var(--line)}
.pm{color:var(--soft);font-size:.82em}.best{color:var(--best);font-weight:700}
.delta{display:block;color:var(--soft);font-size:.76rem}
figure{margin:0 0 1.6rem}figcaption{font-size:.85rem;color:var(--soft);margin-bottom:.35rem}
.strip{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(96px,170px);gap:.45rem;overflow-x:auto}
.strip div{font-size:.76rem;text-align:center;color:var(--soft)}
.strip img{width:100%;display:block;border-radius:3px;image-rendering:auto}
.strip img+img{margin-top:.35rem}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1rem;font-size:.85rem;margin:.2rem 0 1.2rem}
.key i{display:inline-block;width:.85rem;height:.85rem;border-radius:2px;margin-right:.4rem;
vertical-align:-.1rem;border:1px solid #0002}
dt{font-weight:600}dd{margin:0 0 .5rem 1.2rem;color:var(--soft)}
details{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.6rem 1rem;
margin:.6rem 0;font-size:.88rem}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:.8rem}svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
@media print{body{max-width:none;padding:0}details{break-inside:avoid}figure{break-inside:avoid}}
"""


def write_report(results: Results, path: Path) -> None:
    """Write the report, whole or not at all; it needs no other file and no network."""
    write_bytes(path, render(results).encode())


def render(results: Results) -> str:
    """The report as one HTML document."""
    data = results.data
    title = f"Upsamplers on {data['name']}"
    counts = ", ".join(
        f"{data[part]['images']} {part} images" for part in ("train", "test") if part in data
    )
    lead = (
        f"{counts}; backbone {results.backbone['name']}, one feature per "
        f"{results.backbone['stride']} pixels; shorter side {results.settings['size']} pixels; "
        f"{_count(results.settings['seeds'], 'seed')}, mean ± standard deviation."
    )
    parts = [
        f"<h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p>",
        _score_table(results),
        _chart(results),
        _class_table(results),
        _figures(results),
        _explanations(results),
        _provenance(results),
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(parts)}</body></html>\n"
    )


def shown(name: str, values: Sequence[float]) -> tuple[str, str]:
    """Mean and spread of a score as people read them; the spread is empty for one value."""
    found = summary(list(values))
    factor, digits = (100, 2) if name in PERCENT else (1, 4)
    if found["mean"] is None:
        return "–", ""
    spread = found["spread"]
    mean = f"{found['mean'] * factor:.{digits}f}"
    return mean, "" if spread is None else f"±{spread * factor:.{digits}f}"


def _score_table(results: Results) -> str:
    names = list(results.rows[0].scores)
    head = "".join(
        f"<th>{escape(SCORE_NAMES[name])} {'↑' if HIGHER_IS_BETTER[name] else '↓'}</th>"
        for name in names
    )
    body = []
    for protocol in _protocols(results):
        rows = [row for row in results.rows if row.protocol == protocol]
        best = {name: _best(rows, name) for name in names}
        for index, row in enumerate(rows):
            cells = [_score_cell(name, row, rows, best[name]) for name in names]
            cells += [_cost_cell(row, "seconds", 3), _cost_cell(row, "memory_mib", 0)]
            group = " class=group" if index == 0 else ""
            body.append(
                f"<tr{group}><td class=l>{escape(protocol)}</td>"
                f"<td class=l>{escape(row.upsampler)}</td>{''.join(cells)}</tr>"
            )
    return (
        "<h2>Scores</h2><div class=scroll><table><thead><tr><th class=l>protocol</th>"
        f"<th class=l>upsampler</th>{head}<th>s / image</th><th>MiB</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div><p class=pm>Best of each protocol in green; "
        "small figures: difference from bilinear.</p>"
    )


def _score_cell(name: str, row: Row, rows: list[Row], best: float | None) -> str:
    mean, spread = shown(name, row.scores[name])
    own = summary(row.scores[name])["mean"]
    base = next((other for other in rows if other.upsampler == "bilinear"), None)
    delta = ""
    if base is not None and base is not row and own is not None:
        against = summary(base.scores[name])["mean"]
        if against is not None:
            factor, digits = (100, 2) if name in PERCENT else (1, 4)
            delta = f"<span class=delta>{(own - against) * factor:+.{digits}f}</span>"
    mark = " class=best" if own is not None and own == best else ""
    return f"<td><span{mark}>{mean}</span> <span class=pm>{spread}</span>{delta}</td>"


def _cost_cell(row: Row, name: str, digits: int) -> str:
    value = row.cost.get(name)
    return f"<td>{'–' if value is None else f'{value:.{digits}f}'}</td>"


def _best(rows: list[Row], name: str) -> float | None:
    means = [summary(row.scores[name])["mean"] for row in rows]
    known = [mean for mean in means if mean is not None]
    if not known:
        return None
    return max(known) if HIGHER_IS_BETTER[name] else min(known)


def _chart(results: Results) -> str:
    """Every seed's first score as a dot, one line per row, grouped by protocol."""
    name = next(iter(results.rows[0].scores))
    factor = 100 if name in PERCENT else 1
    lines = [
        (protocol, row)
        for protocol in _protocols(results)
        for row in results.rows
        if row.protocol == protocol and summary(row.scores[name])["mean"] is not None
    ]
    if not lines:
        return ""
    values = [value * factor for _, row in lines for value in row.scores[name]]
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or 1
    low, high = low - pad, high + pad
    left, width, step = 230, 640, 22
    parts = []
    for index, (protocol, row) in enumerate(lines):
        y = 18 + index * step
        parts.append(
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">'
            f"{escape(row.upsampler)} · {escape(protocol)}</text>"
            f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#e4e8ee"/>'
        )
        xs = [left + (value * factor - low) / (high - low) * width for value in row.scores[name]]
        colour = "#b3541e" if row.upsampler == "bilinear" else "#1f6feb"
        parts += [f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{colour}b0"/>' for x in xs]
        mean = sum(xs) / len(xs)
        parts.append(
            f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 7}" y2="{y + 7}" '
            f'stroke="{colour}" stroke-width="2"/>'
        )
    bottom = 18 + len(lines) * step
    for value in (low + pad, high - pad):
        x = left + (value - low) / (high - low) * width
        parts.append(f'<text x="{x:.1f}" y="{bottom + 6}" text-anchor="middle">{value:.2f}</text>')
    return (
        f"<h2>{escape(SCORE_NAMES[name])}, every seed</h2><div class=scroll>"
        f'<svg width="{left + width + 40}" height="{bottom + 16}" role="img" '
        f'aria-label="{escape(SCORE_NAMES[name])} by row">{"".join(parts)}</svg></div>'
        "<p class=pm>A dot per seed, a bar at the mean; bilinear in brown.</p>"
    )


def _class_table(results: Results) -> str:
    if not any(row.per_class for row in results.rows):
        return ""
    classes = list(results.rows[0].per_class)
    head = "".join(f"<th>{escape(name)}</th>" for name in classes)
    body = []
    for protocol in _protocols(results):
        for index, row in enumerate(r for r in results.rows if r.protocol == protocol):
            cells = []
            for name in classes:
                mean = summary(row.per_class[name])["mean"]
                if mean is None:
                    cells.append("<td>–</td>")
                else:
                    tint = f"background:rgb(11 110 79/{0.05 + 0.35 * mean:.2f})"
                    cells.append(f'<td style="{tint}">{mean * 100:.1f}</td>')
            group = " class=group" if index == 0 else ""
            body.append(
                f"<tr{group}><td class=l>{escape(protocol)}</td>"
                f"<td class=l>{escape(row.upsampler)}</td>{''.join(cells)}</tr>"
            )
    return (
        "<h2>IoU of every class, %</h2><div class=scroll><table><thead><tr><th class=l>protocol"
        f"</th><th class=l>upsampler</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        "</div><p class=pm>– : the class is not in the scored test labels.</p>"
    )


def _figures(results: Results) -> str:
    """For every example: image and target, then each upsampler's prediction over its errors."""
    if not results.examples:
        return ""
    classes = results.data.get("classes") or []
    parts = ["<h2>Predictions</h2>"]
    if results.task == "seg":
        parts.append(_key(classes))
    protocols = [p for p in _protocols(results) if any(r.pictures for r in results.rows)]
    for sample, example in results.examples.items():
        for protocol in protocols:
            columns = [("image", [example["image"]]), ("label", [_shown_target(results, example)])]
            columns += [
                (row.upsampler, _shown_prediction(results, example, row.pictures[sample]))
                for row in results.rows
                if row.protocol == protocol and sample in row.pictures
            ]
            strip = "".join(
                f"<div>{escape(name)}{''.join(_img(source, name) for source in sources)}</div>"
                for name, sources in columns
                if all(sources)
            )
            parts.append(
                f"<figure><figcaption>{escape(sample)}, {escape(protocol)}</figcaption>"
                f"<div class=strip>{strip}</div></figure>"
            )
    note = "Images are evenly spaced over the test list, not chosen; predictions of the first seed."
    if results.task == "seg":
        note += " Below each: wrong pixels in red, ignored ones in grey."
    return "".join([*parts, f"<p class=pm>{note}</p>"])


def _shown_target(results: Results, example: dict[str, str]) -> str:
    if results.task != "seg":
        return example.get("target", "")
    return _png(palette(len(results.data["classes"]))[_indices(example["target"])])


def _shown_prediction(results: Results, example: dict[str, str], picture: str) -> list[str]:
    if results.task != "seg":
        # PNG and JPEG differ in their first bytes, also in base64.
        kind = "png" if picture.startswith("iVBOR") else "jpeg"
        return [f"data:image/{kind};base64,{picture}"]
    label, predicted = _indices(example["target"]), _indices(picture)
    errors = np.full((*label.shape, 3), 255, np.uint8)
    errors[label != predicted] = (204, 41, 41)
    errors[label == IGNORE_INDEX] = (190, 190, 190)
    return [_png(palette(len(results.data["classes"]))[predicted]), _png(errors)]


def palette(n_classes: int) -> np.ndarray:
    """Distinct colours: (256, 3) uint8, the first class light grey, ignored pixels white."""
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


def _explanations(results: Results) -> str:
    names = [*_protocols(results), *results.rows[0].scores]
    items = [
        f"<dt>{escape(SCORE_NAMES.get(name, name))}</dt><dd>{escape(_EXPLANATIONS[name])}</dd>"
        for name in names
    ]
    return f"<h2>How to read it</h2><dl>{''.join(items)}</dl>"


def _provenance(results: Results) -> str:
    content = results.to_json()
    facts = {key: content[key] for key in ("data", "backbone", "settings", "versions")}
    facts["upsamplers"] = {row.upsampler: row.weights for row in results.rows}
    problems = "".join(f"<li>{escape(str(problem))}</li>" for problem in results.problems)
    text = escape(json.dumps(facts, indent=2, ensure_ascii=False))
    listed = f"<ul>{problems}</ul>" if problems else "<p>Nothing was left out.</p>"
    return (
        "<h2>What was measured</h2>"
        f"<details{' open' if results.problems else ''}><summary>"
        f"{_count(len(results.problems), 'note')} on the data</summary>{listed}</details>"
        "<details><summary>Data, weights, settings and versions</summary>"
        f"<pre>{text}</pre></details>"
    )


def _protocols(results: Results) -> list[str]:
    return list(dict.fromkeys(row.protocol for row in results.rows))


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


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
