"""Results of an evaluation: rows of scores, with the data they were measured on, as JSON."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from upfeat.evaluation.data.folders import Problem
from upfeat.provenance import versions
from upfeat.storage import write_bytes

FORMAT = "upfeat-eval-1"


@dataclass
class Row:
    """The scores of one upsampler under one protocol.

    Attributes:
        upsampler: its label in the table.
        protocol: how it was used.
        weights: digest of its weights.
        scores: name to one value per seed.
        per_class: class name to one IoU per seed; segmentation only.
        cost: seconds and memory of one image; not repeatable to the digit, unlike scores.
        pictures: sample name to a base64 PNG of the prediction of the first seed.
        sums: what each test image adds to the scores, packed; see
            :mod:`upfeat.evaluation.differences`.
    """

    upsampler: str
    protocol: str
    weights: str
    scores: dict[str, list[float]]
    per_class: dict[str, list[float]] = field(default_factory=dict)
    cost: dict[str, float | None] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    sums: dict[str, Any] = field(default_factory=dict)


@dataclass
class Results:
    """A whole table.

    Attributes:
        task: what was evaluated.
        data: names, counts and digests of the data.
        backbone: name and digest.
        settings: everything that changes scores.
        rows: in the order asked for.
        problems: what was left out, and why.
        examples: sample name to base64 pictures of the image and its label, for the report.
        differences: between the rows, as JSON values of
            :class:`upfeat.evaluation.differences.Difference`.
    """

    task: str
    data: dict[str, Any]
    backbone: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    problems: list[Problem]
    examples: dict[str, dict[str, str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    differences: list[dict[str, Any]] = field(default_factory=list)

    @property
    def protocols(self) -> list[str]:
        """Those of the rows, in order."""
        return list(dict.fromkeys(row.protocol for row in self.rows))

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without pictures."""
        rows = []
        for row in self.rows:
            content = asdict(row)
            del content["pictures"], content["sums"]
            for key in ("scores", "per_class"):
                content[key] = {name: summary(values) for name, values in content[key].items()}
            rows.append(content)
        return {
            "format": FORMAT,
            "task": self.task,
            "data": self.data,
            "backbone": self.backbone,
            "settings": self.settings,
            "versions": self.versions,
            "problems": [asdict(problem) for problem in self.problems],
            "rows": rows,
            "differences": self.differences,
        }

    def write(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        write_bytes(path, (text + "\n").encode())


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, spread (sample standard deviation; ``None`` for one seed) and the values.

    Values that are not defined are ``None``, and so is a mean over any of them.
    """
    defined = all(math.isfinite(value) for value in values)
    return {
        "mean": statistics.fmean(values) if defined else None,
        "spread": statistics.stdev(values) if defined and len(values) > 1 else None,
        "values": [value if math.isfinite(value) else None for value in values],
    }


class RowStore:
    """Finished rows on disk, so that an interrupted evaluation goes on after the last one."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        """Use an existing folder; rows are found again only under an equal recipe."""
        self.folder = folder
        self.recipe = json.dumps(recipe, sort_keys=True)

    def load(self, label: str, weights: str) -> list[Row] | None:
        """The rows of an upsampler, or ``None``."""
        path = self._path(label, weights)
        if not path.is_file():
            return None
        try:
            return [Row(**content) for content in json.loads(path.read_bytes())] or None
        except (ValueError, TypeError, RecursionError):
            return None

    def save(self, label: str, weights: str, rows: list[Row]) -> None:
        """Keep the rows of an upsampler."""
        content = json.dumps([asdict(row) for row in rows])
        write_bytes(self._path(label, weights), content.encode())

    def _path(self, label: str, weights: str) -> Path:
        key = hashlib.sha256(f"{self.recipe}|{label}|{weights}".encode()).hexdigest()
        return self.folder / f"{key[:32]}.json"
