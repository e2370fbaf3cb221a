"""Results of an evaluation, rows of scores with their provenance, and their JSON file."""

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
        upsampler: label of the upsampler in the table.
        protocol: name of the protocol.
        weights: digest of the upsampler's weights.
        scores: a list for each name of a score, one value per seed.
        per_class: a list of scores for each class name, one per seed: IoU for segmentation, PCK at
            0.1 for correspondence; J&F of each video for propagation; empty for other tasks.
        cost: passes, seconds and memory of one image; unlike scores, they vary between runs.
        pictures: for each sample name, the prediction of the first seed as base64 PNG or JPEG.
        sums: contributions of the test images (or pairs) to the scores, packed by
            :func:`upfeat.evaluation.differences.pack_sums`.
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
    """Results of one evaluation.

    Attributes:
        task: name of the task.
        data: names, counts and digests of the data.
        backbone: name, digest of the weights, and stride.
        settings: settings of the evaluation.
        rows: rows of the table, in the order of the upsamplers given.
        problems: omissions and weaknesses of the data, with their reasons.
        examples: for each sample name, base64 pictures of the image and its target, for the report.
        versions: versions of the packages used, and the device.
        differences: differences between the rows, as JSON values of
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
        """Protocols of the rows, each once, in order."""
        return list(dict.fromkeys(row.protocol for row in self.rows))

    def to_json(self) -> dict[str, Any]:
        """Return the results as JSON values, without pictures and sums."""
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

    def write(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        write_bytes(path, (text + "\n").encode())


def summary(values: list[float]) -> dict[str, Any]:
    """Return the mean, the spread and the values of a score over seeds.

    The spread is the sample standard deviation; ``None`` for one seed. Undefined values are
    ``None``, and the mean and the spread are ``None`` if any value is undefined.
    """
    defined = all(math.isfinite(value) for value in values)
    return {
        "mean": statistics.fmean(values) if defined else None,
        "spread": statistics.stdev(values) if defined and len(values) > 1 else None,
        "values": [value if math.isfinite(value) else None for value in values],
    }


class RowStore:
    """Finished rows on disk, so that an interrupted evaluation continues after the last row."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        """Store rows in an existing folder; they are loaded again only for an equal recipe."""
        self.folder = folder
        self.recipe = json.dumps(recipe, sort_keys=True)

    def load(self, label: str, weights: str) -> list[Row] | None:
        """Return the stored rows of an upsampler, or ``None``."""
        path = self._path(label, weights)
        if not path.is_file():
            return None
        try:
            rows = [Row(**content) for content in json.loads(path.read_bytes())]
        except (ValueError, TypeError, RecursionError):
            return None
        return rows if rows and all(map(_is_whole, rows)) else None

    def save(self, label: str, weights: str, rows: list[Row]) -> None:
        """Store the rows of an upsampler."""
        content = json.dumps([asdict(row) for row in rows])
        write_bytes(self._path(label, weights), content.encode())

    def _path(self, label: str, weights: str) -> Path:
        key = hashlib.sha256(f"{self.recipe}|{label}|{weights}".encode()).hexdigest()
        return self.folder / f"{key[:32]}.json"


def _is_whole(row: Row) -> bool:
    """Return whether the fields of a stored row have their types."""
    texts = all(isinstance(one, str) for one in (row.upsampler, row.protocol, row.weights))
    tables = (row.scores, row.per_class)
    if not texts or not all(isinstance(one, dict) for one in (*tables, row.cost, row.pictures)):
        return False
    values = [one for table in tables for one in table.values()]
    numbers = all(isinstance(one, list) and one and all(map(_is_number, one)) for one in values)
    costs = all(one is None or _is_number(one) for one in row.cost.values())
    return numbers and costs and isinstance(row.sums, dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
