"""Report of an evaluation in one HTML file: settings, scores of all seeds, classes, pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from upfeat.evaluation.differences import BASELINE, LEAST
from upfeat.evaluation.report.figures import draw_chart, draw_samples
from upfeat.evaluation.report.front import draw_front
from upfeat.evaluation.results import Results, Row, summary
from upfeat.evaluation.task import Score, Task
from upfeat.evaluation.tasks import find_task
from upfeat.marks import html_mark
from upfeat.storage import write_bytes

_MAX_COLUMNS = 12

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--soft:#5b6675;--line:#d9dee6;--best:#0b6e4f;
--panel:#f6f8fa;--page:#fff;--mark:#1f6feb;--base:#b3541e;--tint:11 110 79}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa5b4;--line:#333b47;
--best:#4fd1a0;--panel:#1b2129;--page:#12161c;--mark:#6ea8ff;--base:#ef9a5b;--tint:79 209 160}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:2.5rem 1.5rem 5rem;color:var(--ink);
background:var(--page);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:2.6rem 0 .7rem}
p,dl{max-width:78ch}.lead{color:var(--soft);margin:0 0 1.5rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .75rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{border-bottom:2px solid var(--ink);vertical-align:bottom;font-weight:600}
th.l,td.l{text-align:left}
tr.group th{text-align:left;padding-top:1.1rem;font-weight:600;white-space:normal}
tr.group span{font-weight:400;color:var(--soft);font-size:.82rem;margin-left:.6rem}
tr.base td{background:var(--panel)}
.pm{color:var(--soft);font-size:.82em}.best{color:var(--best);font-weight:700}
.delta{display:block;color:var(--soft);font-size:.74rem;line-height:1.2}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(19rem,1fr));gap:.1rem 2.2rem;
max-width:none;margin:0;border-top:2px solid var(--ink);padding-top:.7rem;font-size:.88rem}
.facts div{display:flex;gap:.6rem;border-bottom:1px solid var(--line);padding:.15rem 0}
.facts dt{flex:0 0 6.2rem;font-weight:400;color:var(--soft)}
.facts dd{margin:0;color:var(--ink);overflow-wrap:anywhere}
figure{margin:0 0 1.8rem;break-inside:avoid}
figcaption{font-size:.85rem;color:var(--soft);margin-bottom:.35rem}
.sample{display:flex;gap:1.1rem;align-items:flex-start}
.side{flex:0 0 8.5rem;display:grid;gap:.5rem}
.rows{flex:1;min-width:0;display:grid;gap:.35rem .6rem}
.rows h3{grid-column:1/-1;font-size:.8rem;margin:.35rem 0 0;font-weight:600}
.rows h3:first-child{margin-top:0}
.cell{font-size:.76rem;color:var(--soft);min-width:0}
.pair{display:flex;gap:2px}.pair.tall img{width:calc(50% - 1px)}.pair.wide{flex-direction:column}
img{width:100%;display:block;border-radius:2px;outline:1px solid var(--line);outline-offset:-1px}
.key{display:flex;flex-wrap:wrap;gap:.3rem 1rem;font-size:.85rem;margin:.2rem 0 1.2rem}
.key i{display:inline-block;width:.85rem;height:.85rem;border-radius:2px;margin-right:.4rem;
vertical-align:-.1rem;border:1px solid #0002}
dt{font-weight:600}dd{margin:0 0 .5rem 1.2rem;color:var(--soft)}
details{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.6rem 1rem;
margin:.6rem 0;font-size:.88rem}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:.8rem;white-space:pre-wrap;overflow-wrap:anywhere}
svg{max-width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
svg .soft{fill:var(--soft)}svg .strong{font-weight:600}svg .rule{stroke:var(--line)}
svg .mark{fill:var(--mark);stroke:var(--mark)}svg .base{fill:var(--base);stroke:var(--base)}
svg .front{fill:none;stroke:var(--mark);stroke-opacity:.45;stroke-width:1.5}
svg .name{paint-order:stroke;stroke:var(--page);stroke-width:3px}
@media print{:root{color-scheme:light}body{max-width:none;padding:0;font-size:11px}
th,td{padding:.2rem .4rem}h2{break-after:avoid}tr{break-inside:avoid}
.scroll{overflow:visible}*{print-color-adjust:exact}}
"""

_FRONT = (
    "<p class=pm>Time for all channels of one image, the backbone's passes included. The line "
    "joins the methods that are better than every faster one.</p>"
)


def write_report(results: Results, path: Path, task: type[Task] | None = None) -> None:
    """Write the report, whole or not at all; the file needs no other file and no network."""
    write_bytes(path, render(results, task).encode())


def render(results: Results, task: type[Task] | None = None) -> str:
    """Render the report as one HTML document.

    Args:
        results: results with at least one row.
        task: task of the results; ``None`` to find it by its name.
    """
    task = task or find_task(results.task)
    title = f"{task.title} on {results.data['name']}"
    name = next(iter(results.rows[0].scores))
    score = task.scores[name]
    factor = 100 if score.percent else 1
    chart = draw_chart(results, name, factor)
    front = draw_front(results, name, factor, higher=score.higher_is_better)
    parts = [
        f"<h1>{escape(title)}</h1><p class=lead>{escape(task.question)}</p>",
        _facts(results, task),
        _score_table(results, task),
        f"<h2>{escape(score.label)} of each seed</h2>{chart}" if chart else "",
        f"<h2>{escape(score.label)} and time</h2>{front}{_FRONT}" if front else "",
        _difference_table(results, task),
        _class_table(results, task),
        draw_samples(results, task),
        _explanations(results, task),
        _provenance(results),
    ]
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8>{html_mark()}"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(parts)}</body></html>\n"
    )


def shown(score: Score, values: Sequence[float], *, signed: bool = False) -> tuple[str, str]:
    """Format the mean and the spread of a score; the spread is empty for one value."""
    found = summary(list(values))
    spread = found["spread"]
    mean = score.text(found["mean"], signed=signed)
    return mean, "" if spread is None else f"±{score.text(spread)}"


class ShownDifference(NamedTuple):
    """A difference between two rows, formatted for readers."""

    protocol: str
    upsampler: str
    against: str
    score: str
    mean: str
    interval: str
    seeds: str
    certain: bool
    """True if the interval excludes 0."""


def differences(results: Results, task: type[Task] | None = None) -> list[ShownDifference]:
    """Format the differences between rows for readers."""
    task = task or find_task(results.task)
    found = []
    for one in results.differences:
        score = task.scores[one["score"]]
        low, high = (score.text(one[name], signed=True) for name in ("low", "high"))
        found.append(
            ShownDifference(
                *(one["protocol"], one["upsampler"], one["against"], score.label),
                mean=score.text(one["mean"], signed=True),
                interval="–" if one["low"] is None else f"{low} to {high}",
                seeds=" ".join(score.text(value, signed=True) for value in one["values"]),
                certain=_known(one["low"]) > 0 or _known(one["high"]) < 0,
            )
        )
    return found


def _known(value: float | None) -> float:
    return 0.0 if value is None else value


def heading(score: Score) -> str:
    """Return the heading of a score's column, with an arrow in its good direction."""
    return f"{score.label} {'↑' if score.higher_is_better else '↓'}"


def best_mean(rows: Iterable[Row], name: str, score: Score) -> float | None:
    """Return the best mean of a score; ``None`` if no row has a mean, or all means are equal."""
    means = [summary(row.scores[name])["mean"] for row in rows]
    known = [mean for mean in means if mean is not None]
    if len(set(known)) < 2:
        return None
    return max(known) if score.higher_is_better else min(known)


def _facts(results: Results, task: type[Task]) -> str:
    """Render an overview of data, settings and versions."""
    data, settings, versions = results.data, results.settings, results.versions
    counts = ", ".join(
        f"{data[part]['images']} {'for fitting' if part == 'train' else 'for testing'}"
        for part in ("train", "test")
        if part in data
    )
    if "pairs" in data:
        counts += f", {data['pairs']['number']} pairs"
    stride = results.backbone["stride"]
    facts = {
        "data": data["name"],
        "photographs": counts,
        "shorter side": f"{settings['size']} pixels",
        "backbone": f"{results.backbone['name']}, one feature per {stride}×{stride} pixels",
        "repetitions": f"{_count(settings['seeds'], 'seed')}; mean ± standard deviation",
        "left out": _count(len(results.problems), "note") + " below"
        if results.problems
        else "nothing",
        "upfeat": f"{versions['upfeat']}, source {versions['source'][:8]}",
        "PyTorch": f"{versions['torch']}, {versions.get('device', 'cpu')}",
    }
    facts |= task.facts(settings)
    items = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items()
    )
    return f"<dl class=facts>{items}</dl>"


COSTS = {"passes": 1, "total_seconds": 3, "memory_mib": 0}
"""Number of decimal places of each cost in the table. The time is that with the backbone, for every
row: some methods start from the image, and their time without it is unknown."""


def _score_table(results: Results, task: type[Task]) -> str:
    names = list(results.rows[0].scores)
    head = "".join(f"<th>{escape(heading(task.scores[name]))}</th>" for name in names)
    body = []
    for protocol in results.protocols:
        rows = [row for row in results.rows if row.protocol == protocol]
        best = {name: best_mean(rows, name, task.scores[name]) for name in names}
        body.append(_group(protocol, task, len(names) + 1 + len(COSTS)))
        for row in rows:
            cells = [_score_cell(name, task.scores[name], row, rows, best[name]) for name in names]
            cells += [_cost_cell(row, name, digits) for name, digits in COSTS.items()]
            base = " class=base" if row.upsampler == BASELINE else ""
            body.append(f"<tr{base}><td class=l>{escape(row.upsampler)}</td>{''.join(cells)}</tr>")
    return (
        "<h2>Scores</h2><div class=scroll><table><thead><tr>"
        f"<th class=l>upsampler</th>{head}<th>passes</th><th>s / image</th>"
        "<th>MiB</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div><p class=pm>Bold: best of each group. Small "
        f"figures: difference from {BASELINE} (shaded), computed seed by seed.</p>"
    )


def _group(protocol: str, task: type[Task], columns: int) -> str:
    """Render the heading of a protocol's rows, with its explanation."""
    return (
        f"<tr class=group><th colspan={columns}>{escape(protocol)}"
        f"<span>{escape(task.protocols[protocol])}</span></th></tr>"
    )


def _score_cell(name: str, score: Score, row: Row, rows: list[Row], best: float | None) -> str:
    mean, spread = shown(score, row.scores[name])
    own = summary(row.scores[name])["mean"]
    base = next((other for other in rows if other.upsampler == BASELINE), None)
    below = ""
    if base is not None:
        delta = "&nbsp;" if base is row else _difference(name, score, row, base)
        below = f"<span class=delta>{delta}</span>"
    mark = " class=best" if own is not None and own == best else ""
    return f"<td><span{mark}>{mean}</span> <span class=pm>{spread}</span>{below}</td>"


def _difference(name: str, score: Score, row: Row, base: Row) -> str:
    """Format mean and spread of the differences of each seed, in which common variation cancels."""
    pairs = zip(row.scores[name], base.scores[name], strict=True)
    return " ".join(shown(score, [own - other for own, other in pairs], signed=True)).strip()


def _difference_table(results: Results, task: type[Task]) -> str:
    rows = []
    for one in differences(results, task):
        names = (one.protocol, one.upsampler, one.against, one.score)
        cells = "".join(f"<td class=l>{escape(name)}</td>" for name in names)
        mark = " class=best" if one.certain else ""
        rows.append(
            f"<tr>{cells}<td><span{mark}>{one.mean}</span></td><td>{one.interval}</td>"
            f"<td class=pm>{one.seeds}</td></tr>"
        )
    if not rows:
        return ""
    return (
        "<h2>Differences</h2><details><summary>Every row minus bilinear, and minus the best other "
        "row</summary><div class=scroll><table><thead><tr><th class=l>protocol</th>"
        "<th class=l>upsampler</th><th class=l>minus</th><th class=l>score</th><th>mean</th>"
        f"<th>95 %</th><th>each seed</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=pm>95 %: confidence interval from a thousand test sets, drawn from the test set "
        "with replacement, the same for both rows; wider the fewer images there are, and – for "
        f"fewer than {LEAST}. Bold: the interval excludes 0.</p>"
        "</details>"
    )


def _cost_cell(row: Row, name: str, digits: int) -> str:
    value = row.cost.get(name)
    return f"<td>{'–' if value is None else f'{value:.{digits}f}'}</td>"


def _class_table(results: Results, task: type[Task]) -> str:
    """Render the scores of classes: a line per upsampler, or a line per class for many classes."""
    if not any(row.per_class for row in results.rows):
        return ""
    classes = list(results.rows[0].per_class)
    body = []
    if len(classes) <= _MAX_COLUMNS:
        corner, head = "upsampler", classes
        for protocol in results.protocols:
            body.append(_group(protocol, task, len(classes) + 1))
            for row in (row for row in results.rows if row.protocol == protocol):
                cells = "".join(_iou_cell(row, name) for name in classes)
                body.append(f"<tr><td class=l>{escape(row.upsampler)}</td>{cells}</tr>")
    else:
        corner, head = (
            task.per_class_title[0],
            [f"{row.upsampler}, {row.protocol}" for row in results.rows],
        )
        for name in classes:
            cells = "".join(_iou_cell(row, name) for row in results.rows)
            body.append(f"<tr><td class=l>{escape(name)}</td>{cells}</tr>")
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    kind, title = task.per_class_title
    return (
        f"<h2>{escape(title)}</h2><div class=scroll><table><thead><tr><th class=l>{corner}</th>"
        f"{columns}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f"<p class=pm>Mean over seeds; – if the {kind} is not in the scored test labels.</p>"
    )


def _iou_cell(row: Row, name: str) -> str:
    mean = summary(row.per_class[name])["mean"]
    if mean is None:
        return "<td>–</td>"
    tint = f"background:rgb(var(--tint)/{0.04 + 0.3 * mean:.2f})"
    return f'<td style="{tint}">{mean * 100:.1f}</td>'


def _explanations(results: Results, task: type[Task]) -> str:
    items = [
        f"<dt>{escape(score.label)}</dt><dd>{escape(score.meaning)}</dd>"
        for score in (task.scores[name] for name in results.rows[0].scores)
    ]
    items.append(
        "<dt>s / image</dt><dd>median time for all channels of one image, the backbone's passes "
        "included</dd>"
        "<dt>MiB</dt><dd>largest increase of the memory in use while one image is upsampled, "
        "including the result and, for methods that start from the image, such as those of several "
        "passes or early layers, the backbone; – if the system does not report it</dd>"
    )
    return f"<h2>Explanation of the scores</h2><dl>{''.join(items)}</dl>"


def _provenance(results: Results) -> str:
    content = results.to_json()
    facts = {key: content[key] for key in ("data", "backbone", "settings", "versions")}
    facts["upsamplers"] = {row.upsampler: row.weights for row in results.rows}
    problems = "".join(f"<li>{escape(str(problem))}</li>" for problem in results.problems)
    text = escape(json.dumps(facts, indent=2, ensure_ascii=False))
    listed = f"<ul>{problems}</ul>" if problems else "<p>Nothing was left out.</p>"
    return (
        "<h2>Provenance</h2>"
        f"<details{' open' if results.problems else ''}><summary>"
        f"{_count(len(results.problems), 'note')} on the data</summary>{listed}</details>"
        "<details><summary>Data, weights, settings and versions</summary>"
        f"<pre>{text}</pre></details>"
    )


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
