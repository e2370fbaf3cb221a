"""Tables of gains over several evaluations: upsamplers by backbones and data.

A gain is the difference of a score from that of a simple upsampler in the same evaluation, signed
so that a positive gain is an improvement. Evaluations are read from the ``results.json`` that
``upfeat eval`` wrote.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from upfeat.bounds import number, paths_of, shown
from upfeat.evaluation.results import FORMAT
from upfeat.evaluation.task import Score
from upfeat.evaluation.tasks import find_task
from upfeat.registry import unknown_name
from upfeat.storage import write_bytes
from upfeat.strict_json import read_object

COMPARISON = "upfeat-comparison-1"
"""Mark of JSON files of comparisons."""

FORMATS = (".md", ".csv", ".json")
"""Suffixes of the files that :func:`write_comparison` writes."""

_LARGEST = 1 << 28
_IRRELEVANT = ("pictures",)
"""Settings that change no score."""


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        label: short name of backbone and data, different for each run.
        path: file of the results.
        task: name of the task.
        settings: settings of the evaluation, version of upfeat, and device.
        means: mean over seeds of each score, by protocol, upsampler and score; ``None`` where it is
            undefined.
    """

    label: str
    path: str
    task: str
    settings: dict[str, Any]
    means: dict[str, dict[str, dict[str, float | None]]]


@dataclass(frozen=True)
class Gains:
    """One row of a table.

    Attributes:
        upsampler: label of the upsampler.
        gains: gain in each run; ``None`` where the row or the score is missing.
        mean: mean over the runs that have a gain; ``None`` without any.
        runs: number of these runs.
    """

    upsampler: str
    gains: list[float | None]
    mean: float | None
    runs: int


@dataclass(frozen=True)
class Comparison:
    """Gains of upsamplers over a simple one, in several evaluations of one task.

    Attributes:
        task: name of the task.
        score: name of the score.
        over: label of the upsampler whose score is subtracted.
        runs: labels of the runs, the columns of the tables.
        bases: for each protocol, the score of ``over`` in each run.
        tables: for each protocol, its rows, in the order of the runs.
        notes: differences between the runs, and missing rows, in sentences.
    """

    task: str
    score: str
    over: str
    runs: list[str]
    bases: dict[str, list[float | None]]
    tables: dict[str, list[Gains]]
    notes: list[str]

    @property
    def described(self) -> Score:
        """Description of the score."""
        return find_task(self.task).scores[self.score]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {"format": COMPARISON, **asdict(self)}


def compare(
    paths: str | Path | Sequence[str | Path], *, over: str = "nearest", score: str | None = None
) -> Comparison:
    """Compare the upsamplers of several evaluations of one task.

    Args:
        paths: outputs of ``upfeat eval``, each a folder with ``results.json``, or the file itself.
        over: label of the upsampler whose score is subtracted.
        score: name of the score; ``None`` for the task's main score.

    Raises:
        FileNotFoundError: a path has no results.
        ValueError: a file was not written by ``upfeat eval``, tasks differ, a run is given twice,
            no run, score or row ``over`` is known.
    """
    runs = read_runs(paths)
    scores = find_task(runs[0].task).scores
    name = next(iter(scores)) if score is None else score
    if name not in scores:
        raise ValueError(f"score: {unknown_name('score', name, list(scores))}")
    for run in runs:
        if not any(over in rows for rows in run.means.values()):
            known = dict.fromkeys(one for rows in run.means.values() for one in rows)
            raise ValueError(
                f"over={shown(over)} has no row in {run.path}; choose one of {', '.join(known)}"
            )
    sign = 1 if scores[name].higher_is_better else -1
    bases, tables, notes = {}, {}, _settings_that_differ(runs)
    for protocol in dict.fromkeys(one for run in runs for one in run.means):
        rows = [run.means.get(protocol, {}) for run in runs]
        bases[protocol] = [row.get(over, {}).get(name) for row in rows]
        labels = dict.fromkeys(label for row in rows for label in row if label != over)
        tables[protocol] = [
            _gains(label, [row.get(label, {}).get(name) for row in rows], bases[protocol], sign)
            for label in labels
        ]
        notes += _missing(protocol, over, runs, bases[protocol], tables[protocol])
    labels = [run.label for run in runs]
    return Comparison(runs[0].task, name, over, labels, bases, tables, notes)


def read_runs(paths: str | Path | Sequence[str | Path]) -> list[Run]:
    """Read evaluations of one task; see :func:`compare`."""
    files = paths_of("paths", paths)
    if not files:
        raise ValueError("paths is empty; give at least one output of upfeat eval")
    files = [path / "results.json" if path.is_dir() else path for path in files]
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise ValueError(f"{path}: is given twice")
        seen.add(path.resolve())
    runs = [_read(path) for path in files]
    if len({run.task for run in runs}) > 1:
        listed = ", ".join(f"{run.path} ({run.task})" for run in runs)
        raise ValueError(f"tasks differ: {listed}; give results of one task")
    labels = _distinct([run.label for run in runs], files)
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _read(path: Path) -> Run:
    """Read one evaluation, with backbone and data as its label."""
    content = read_object(path, largest=_LARGEST)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format={shown(content.get('format'))} is not that of upfeat eval; give a "
            "folder that it wrote, or its results.json"
        )
    try:
        find_task(content["task"])
        versions = content["versions"]
        made_by = {"upfeat": versions["upfeat"], "device": versions["device"]}
        settings = {**content["settings"], **made_by}
        decisive = {name: value for name, value in settings.items() if name not in _IRRELEVANT}
        label = f"{content['backbone']['name']}, {content['data']['name']}"
        return Run(label, str(path), content["task"], decisive, _means(content["rows"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged results ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _means(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    means: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in rows:
        found = {name: one["mean"] for name, one in row["scores"].items()}
        scores = {
            name: None if value is None else number(name, value) for name, value in found.items()
        }
        means.setdefault(str(row["protocol"]), {})[str(row["upsampler"])] = scores
    return means


def _distinct(names: list[str], files: list[Path]) -> list[str]:
    """Append the folder's name to names that repeat, and a number if they still do."""
    labels: list[str] = []
    for name, path in zip(names, files, strict=True):
        label = name if names.count(name) == 1 else f"{name} ({path.resolve().parent.name})"
        same, count = label, 2
        while label in labels:
            label, count = f"{same} {count}", count + 1
        labels.append(label)
    return labels


def _gains(label: str, values: list[float | None], bases: list[float | None], sign: int) -> Gains:
    gains = [
        None if value is None or base is None else sign * (value - base)
        for value, base in zip(values, bases, strict=True)
    ]
    known = [gain for gain in gains if gain is not None]
    return Gains(label, gains, statistics.fmean(known) if known else None, len(known))


def _settings_that_differ(runs: list[Run]) -> list[str]:
    """Return one sentence that names the settings that differ, with the values of the runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = []
    for name in names:
        values = [json.dumps(run.settings.get(name)) for run in runs]
        if len(set(values)) > 1:
            differing.append(f"{name} {' | '.join(values)}")
    if not differing:
        return []
    return [f"settings differ, in the order of the columns: {'; '.join(differing)}"]


def _missing(
    protocol: str, over: str, runs: list[Run], bases: list[float | None], rows: list[Gains]
) -> list[str]:
    """Return sentences that name the runs in which the base or a row has no score."""
    notes = []
    without = [run.label for run, base in zip(runs, bases, strict=True) if base is None]
    if without:
        notes.append(f"{protocol}: {over}, and so every gain, is missing in {'; '.join(without)}")
    for row in rows:
        lacking = [
            run.label
            for run, gain, base in zip(runs, row.gains, bases, strict=True)
            if gain is None and base is not None
        ]
        if lacking:
            notes.append(
                f"{protocol}: {row.upsampler} is missing in {'; '.join(lacking)}; its mean is over "
                f"{row.runs} of {len(runs)} runs"
            )
    return notes


def cells(comparison: Comparison) -> dict[str, list[list[str]]]:
    """Format the tables for readers: lists of cells for each protocol, without headings.

    The first line of a table has the scores of the base, the others gains. Means of fewer than all
    runs name their number.
    """
    score, n_runs = comparison.described, len(comparison.runs)
    formatted = {}
    for protocol, rows in comparison.tables.items():
        base = [score.text(value) for value in comparison.bases[protocol]]
        lines = [[f"{comparison.over} (score)", *base, ""]]
        for row in rows:
            mean = score.text(row.mean, signed=True)
            if row.mean is not None and row.runs < n_runs:
                mean += f" ({row.runs} of {n_runs})"
            gains = [score.text(gain, signed=True) for gain in row.gains]
            lines.append([row.upsampler, *gains, mean])
        formatted[protocol] = lines
    return formatted


def headings(comparison: Comparison) -> list[str]:
    """Return the headings of the columns."""
    return ["upsampler", *comparison.runs, "mean gain"]


def title(comparison: Comparison) -> str:
    """Return a title in one line, which names the score, its unit and the sign of gains."""
    score = comparison.described
    unit = ", percentage points" if score.percent else ""
    lower = "" if score.higher_is_better else "; lower scores are better"
    return f"Gain in {score.label} over {comparison.over}{unit} (positive is better{lower})"


def to_markdown(comparison: Comparison) -> str:
    """Render the comparison as Markdown: a table for each protocol, then the notes."""
    head = headings(comparison)
    parts = [f"{title(comparison)}, task {comparison.task}."]
    for protocol, lines in cells(comparison).items():
        table = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in table)
        rows = [f"| {' | '.join(line)} |" for line in escaped]
        parts += [f"**{protocol}**", "\n".join(rows)]
    if comparison.notes:
        parts.append("\n".join(f"- {note}" for note in comparison.notes))
    return "\n\n".join(parts) + "\n"


def to_csv(comparison: Comparison) -> str:
    """Render the gains as CSV, unrounded, one line for each protocol and upsampler.

    Lines of ``over`` have its scores instead of gains. Undefined values are empty.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["protocol", *headings(comparison), "runs"])
    for protocol, rows in comparison.tables.items():
        bases = comparison.bases[protocol]
        known = sum(base is not None for base in bases)
        writer.writerow([protocol, f"{comparison.over} (score)", *bases, None, known])
        writer.writerows([protocol, row.upsampler, *row.gains, row.mean, row.runs] for row in rows)
    return file.getvalue()


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the comparison as Markdown, CSV or JSON by the suffix, whole or not at all.

    Raises:
        ValueError: the suffix is another.
    """
    check_suffix(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        text = json.dumps(comparison.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        text += "\n"
    else:
        text = to_markdown(comparison) if suffix == ".md" else to_csv(comparison)
    write_bytes(path, text.encode())


def check_suffix(path: Path) -> None:
    """Refuse files of other formats than :data:`FORMATS`.

    Raises:
        ValueError: the suffix is another.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
