"""The picture of the package's rooms: which may import which, drawn from the source as it stands.

A room is a row of the table in architecture.md. Rooms that rest on nothing stand at the bottom; an
arrow leads from a room to one that it imports. Arrows that follow from others are left out.
"""

from __future__ import annotations

import ast
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "upfeat"
WIDTH, BOX, LINE, GAP, MARGIN = 1040, 270, 17, 46, 14
_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1d2433 }
  .box { fill: #eef1fb; stroke: #4051b5; stroke-width: 1.2 }
  .arrow { fill: none; stroke: #6b7390; stroke-width: 1.2 }
  .head { fill: #6b7390 }
"""

Rooms = dict[str, list[str]]
Edges = dict[str, set[str]]


def rooms() -> Rooms:
    """Names of each row of the table of modules, lowest first, by the row's first name."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Modules, lowest first")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
    names = [re.findall(r"`(.+?)`", row) for row in rows]
    return {row[0]: row for row in names}


def imports(room_of: dict[str, str]) -> Edges:
    """Rooms that each room imports."""
    edges: Edges = {room: set() for room in room_of.values()}
    for path in sorted(SOURCE.rglob("*.py")):
        own = room_of.get(path.relative_to(SOURCE).with_suffix("").parts[0])
        if own is None:
            continue
        edges[own] |= {room_of[name] for name in _names(path) if name in room_of} - {own}
    return edges


def _names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module == "upfeat":
            found |= {alias.name for alias in node.names}
        elif node.module.startswith("upfeat."):
            found.add(node.module.split(".")[1])
    return found


def reduced(edges: Edges) -> Edges:
    """Edges without those that a longer way implies."""
    reach: Edges = {}

    def reached(room: str) -> set[str]:
        if room not in reach:
            reach[room] = set().union(*({one} | reached(one) for one in edges[room]), set())
        return reach[room]

    for room in edges:
        reached(room)
    return {
        room: {one for one in below if not any(one in reach[other] for other in below - {one})}
        for room, below in edges.items()
    }


def levels(edges: Edges) -> list[list[str]]:
    """Rooms by the length of the longest way down."""
    depth: dict[str, int] = {}

    def measure(room: str) -> int:
        if room not in depth:
            depth[room] = 1 + max((measure(one) for one in edges[room]), default=-1)
        return depth[room]

    rows: list[list[str]] = []
    for room in edges:
        place = measure(room)
        rows += [[] for _ in range(place + 1 - len(rows))]
        rows[place].append(room)
    return rows


class Box(NamedTuple):
    """A room's place in the picture."""

    centre: float
    top: float
    width: float
    lines: list[str]

    @property
    def height(self) -> float:
        """Of all lines."""
        return len(self.lines) * LINE + MARGIN


def _wrapped(names: list[str], width: float) -> list[str]:
    lines = [""]
    for name in names:
        if lines[-1] and (len(lines[-1]) + 3 + len(name)) * 6.8 > width:
            lines.append("")
        lines[-1] += f" · {name}" if lines[-1] else name
    return lines


def architecture() -> str:
    """The picture as SVG."""
    table = rooms()
    room_of = {name.strip("/"): room for room, names in table.items() for name in names}
    edges = reduced(imports(room_of))
    boxes = _placed(table, edges)
    parts = [_arrow(boxes[room], boxes[one]) for room in table for one in sorted(edges[room])]
    parts += [_box(boxes[room]) for room in table]
    height = max(box.top + box.height for box in boxes.values()) + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img" '
        f'aria-label="Rooms of the package and their imports">\n<style>{_STYLE}</style>\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker></defs>\n'
        '<rect width="100%" height="100%" rx="8" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _placed(table: Rooms, edges: Edges) -> dict[str, Box]:
    boxes: dict[str, Box] = {}
    centres: dict[str, float] = {}
    order = {room: place for place, room in enumerate(table)}
    top = float(MARGIN)
    for row in reversed(levels(edges)):
        # Below what imports it, so that few arrows cross.
        row.sort(key=lambda room: (centres.get(room, WIDTH / 2), order[room]))
        step = WIDTH / len(row)
        width = min(BOX, step - MARGIN)
        for index, room in enumerate(row):
            centre = (index + 0.5) * step
            boxes[room] = Box(centre, top, width, _wrapped(table[room], width - MARGIN))
            for below in edges[room]:
                centres[below] = (centres.get(below, centre) + centre) / 2
        top += max(boxes[room].height for room in row) + GAP
    return boxes


def _box(box: Box) -> str:
    shown = "".join(
        f'<tspan x="{box.centre:.0f}" y="{box.top + MARGIN / 2 + LINE * (i + 0.75):.0f}">'
        f"{escape(line)}</tspan>"
        for i, line in enumerate(box.lines)
    )
    return (
        f'<rect class="box" x="{box.centre - box.width / 2:.0f}" y="{box.top:.0f}" '
        f'width="{box.width:.0f}" height="{box.height:.0f}" rx="7"/>'
        f'<text text-anchor="middle">{shown}</text>'
    )


def _arrow(upper: Box, lower: Box) -> str:
    x, y, to, end = upper.centre, upper.top + upper.height, lower.centre, lower.top - 2
    bend = max((end - y) / 2, 16)
    return (
        f'<path class="arrow" marker-end="url(#head)" d="M{x:.0f} {y:.0f}'
        f'C{x:.0f} {y + bend:.0f} {to:.0f} {end - bend:.0f} {to:.0f} {end:.0f}"/>'
    )
