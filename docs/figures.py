"""Figures within the sentences of documents: read from benchmarks/*.json, never typed by hand.

A sentence holds an expression and, after it, its value, which ``docs/generate.py`` writes::

    a fit takes <!-- = data("implicit_consistency")["median_seconds"]:.1f -->19.1<!-- / --> s

The expression is Python, with a format after the colon as in an f-string. It knows the functions
below, and arithmetic. A line must not begin with one: Markdown takes such a line for HTML.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
_FIGURE = re.compile(r"(<!-- = (.+?) -->)(.*?)(<!-- / -->)", re.DOTALL)
_SIGNED_ZERO = re.compile(r"(?<![\w.])[+−-](?=0(\.0*)?(?![\w.]))")
_AT_START = re.compile(r"^ {0,3}<!-- = ", re.MULTILINE)


def data(name: str) -> Any:
    """The contents of ``benchmarks/NAME.json``."""
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


def probe(
    title: str, protocol: str, method: str, score: str = "miou", over: str | None = None
) -> float:
    """A score of ``benchmarks/probes.json`` in percent; with ``over``, the gain over that method.

    Args:
        title: a word or two of the table's title each, such as "Lite0 roads".
        protocol: "own" or "transfer".
        method: as the table names it.
        score: "miou" or "boundary_f".
        over: another method, whose score is subtracted.
    """
    titles = [name for name in data("probes") if all(word in name for word in title.split())]
    if len(titles) != 1:
        raise ValueError(f"{len(titles)} tables of probes.json are called {title!r}: {titles}")
    rows = data("probes")[titles[0]]["protocols"][protocol]
    return 100 * (rows[method][score][0] - (rows[over][score][0] if over else 0))


def cell(table: str, row: str, column: int, part: int = 0, below: str | None = None) -> float:
    """A number in a table of ``benchmarks/earlier.json``.

    Args:
        table: its name.
        row: the row's first words, whole.
        column: from 1; 0 is the row's name.
        part: of several numbers in the cell, from 0.
        below: the row after which to look, where names occur more than once.
    """
    rows = data("earlier")[table]["rows"]
    start = next(i for i, line in enumerate(rows) if line[0] == below) if below else 0
    line = next(line for line in rows[start:] if line[0] == row)
    numbers = re.findall(r"[−-]?\d[\d,]*(?:\.\d+)?", line[column])
    return float(numbers[part].replace(",", "").replace("−", "-"))


def gain(column: int, part: str = "own", row: str = "detail (the default then)") -> float:
    """Points over bilinear in the table ``probes`` of ``benchmarks/earlier.json``."""
    below = f"*{part}*"
    own, base = (cell("probes", one, column, below=below) for one in (row, "bilinear"))
    return own - base


def implicit_probe(name: str, score: str = "miou", protocol: str = "own") -> float:
    """A score of ``benchmarks/implicit_probes.json`` in percent."""
    rows = data("implicit_probes")["rows"]
    row = next(row for row in rows if (row["upsampler"], row["protocol"]) == (name, protocol))
    return 100 * row["scores"][score]["mean"]


def implicit_share(
    part: str, name: str, protocol: str = "own", score: str = "miou", over: str | None = None
) -> float:
    """A score of ``benchmarks/implicit_share.json`` in percent; with ``over``, the gain over it."""

    def mean(label: str) -> float:
        rows = data("implicit_share")[part]["rows"]
        row = next(row for row in rows if (row["upsampler"], row["protocol"]) == (label, protocol))
        values = row["scores"][score]
        return 100 * sum(values) / len(values)

    return mean(name) - (mean(over) if over else 0)


def lead_of_fits(protocol: str = "own", score: str = "miou") -> tuple[float, float]:
    """Least and largest gain of fits over the best other method, over all sets and backbones."""
    gains = []
    for part, found in data("implicit_share").items():
        others = {row["upsampler"] for row in found["rows"]} - {"implicit@0.2"}
        gains.append(
            min(implicit_share(part, "implicit@0.2", protocol, score, one) for one in others)
        )
    return min(gains), max(gains)


def digits(kind: str, name: str = "", table: str = "rows") -> str:
    """The difference of the row named, or the largest of all upsamplers, as 2.5e−6."""
    rows = data("digits")[table]
    chosen = [name] if name else [one for one in rows if one != "backbone"]
    return f"{max(rows[one][kind] for one in chosen):.1e}".replace("e-0", "e-")


def passes(protocol: str, score: str, over: str = "one pass") -> float:
    """The mean gain of five passes over the backbones and sets of ``benchmarks/passes.json``."""
    place = 2 * (protocol == "transfer") + (score == "boundary_f")
    gains = [
        group["rows"]["**five passes** (share 0.75)"][place] - group["rows"][over][place]
        for group in data("passes")["passes"]
    ]
    return sum(gains) / len(gains)


def sharper(place: int, passes: str = "one pass", sets: str = "") -> list[float]:
    """Changes by the temperature of early layers' networks, of sets whose names contain ``sets``.

    ``place`` is 0 for mIoU and 1 for boundary F in *own*, 2 and 3 for *transfer*.
    """
    groups = data("passes")["temperature_early"]
    found = []
    for group in groups:
        rows = group["rows"]
        after = rows.get(f"**{passes}, τ × 1.6** (shipped)")
        if after is not None and sets in f"{group['backbone']}: {group['data']}":
            found.append(after[place] - rows[f"{passes}, before"][place])
    return found


def raised(place: int, of: str, passes: str = "one pass", over: str | None = None) -> float:
    """Change by ``least_contrast`` on a set; ``of`` begins "Lite0: " or "DINOv2: ".

    ``place`` is that of :func:`sharper`. With ``over``, the gain over that row.
    """
    model, _, part = of.partition(": ")
    [rows] = [
        group["rows"]
        for group in data("passes")["contrast"]
        if model in group["backbone"] and group["data"] == part
    ]
    return rows[f"**{passes}**"][place] - rows[over or f"{passes}, before"][place]


def plain(text: str) -> str:
    """Text with minus signs for hyphens, and without a sign where a figure rounds to 0."""
    return _SIGNED_ZERO.sub("", text.replace("-", "−"))


def filled(text: str) -> str:
    """A page with its figures written anew.

    Raises:
        ValueError: a line begins with a figure, or an expression fails.
    """
    if match := _AT_START.search(text):
        line = text[match.start() :].partition("\n")[0]
        raise ValueError(f"a line begins with a figure, put a word before it: {line}")
    known = (
        "data",
        "probe",
        "cell",
        "gain",
        "implicit_probe",
        "implicit_share",
        "lead_of_fits",
        "sharper",
        "raised",
        "digits",
        "passes",
    )
    names = {name: globals()[name] for name in known}

    def write(match: re.Match[str]) -> str:
        begin, expression, _, end = match.groups()
        try:
            value = eval(f"f'''{{{expression}}}'''", dict(names))
        except Exception as error:
            raise ValueError(f"the figure {expression!r} fails: {error!r}") from error
        return f"{begin}{plain(value)}{end}"

    return _FIGURE.sub(write, text)
