"""The chart of quality against cost."""

import re

import pytest
from evaluation.test_report import Page, results_of, rows_of

from upfeat.evaluation.report import front, page
from upfeat.evaluation.report.front import draw_front
from upfeat.evaluation.results import Row
from upfeat.evaluation.tasks import find_task

NAMES = ["nearest", "bilinear", "a_very_long_name_of_an_upsampler.pth", "other", "close", "closer"]


def rows(seconds, scores):
    made = [
        Row(name, "own", "w", {"miou": [score]}, {}, {"total_seconds": time})
        for name, time, score in zip(NAMES, seconds, scores, strict=False)
    ]
    return results_of(find_task("seg"), made)


def test_the_line_joins_methods_that_are_better_than_every_faster_one():
    results = rows([0.1, 0.2, 0.3, 0.4, 0.05], [0.5, 0.6, 0.55, 0.7, 0.4])
    svg = draw_front(results, "miou", 100, higher=True)
    ((points),) = re.findall(r'<polyline class="front" points="([^"]*)"', svg)
    circles = re.findall(r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)"', svg)
    places = {name: f"{x},{y}" for name, (_, x, y) in zip(NAMES, circles, strict=False)}
    expected = [places[name] for name in ("close", "nearest", "bilinear", "other")]
    assert points.split() == expected
    assert [kind for kind, _, _ in circles] == ["mark", "base", "mark", "mark", "mark"]
    low = draw_front(results, "miou", 100, higher=False)
    assert re.findall(r'points="([^"]*)"', low) == [places["close"]]


def test_labels_cover_neither_dots_nor_each_other():
    results = rows([0.1, 0.11, 0.1, 0.102, 0.105, 3.0], [0.5, 0.5, 0.505, 0.51, 0.502, 0.5])
    svg = draw_front(results, "miou", 100, higher=True)
    labels = re.findall(
        r'<text class="name" x="([\d.-]+)" y="([\d.-]+)" text-anchor="(\w+)">([^<]*)', svg
    )
    boxes = []
    for x, y, anchor, name in labels:
        length = front._CHARACTER * len(name)
        left = float(x) - (length if anchor == "end" else 0)
        boxes.append(front._Box(left, float(y) - 10, left + length, float(y) + 3))
        assert left >= 0
    for x, y in re.findall(r'<circle class="\w+" cx="([\d.]+)" cy="([\d.]+)"', svg):
        boxes.append(front._Box(float(x) - 4, float(y) - 4, float(x) + 4, float(y) + 4))
    assert len(boxes) == 12
    for index, box in enumerate(boxes):
        assert not any(box.meets(other) for other in boxes[:index])


@pytest.mark.parametrize("seconds", [[0.1, 0.2], [None, 0.1, 0.2], [0.0, 0.1, 0.2], []])
def test_no_chart_of_fewer_than_three_times(seconds):
    assert draw_front(rows(seconds, [0.5, 0.6, 0.7]), "miou", 100, higher=True) == ""


def test_equal_times_and_scores_are_drawn():
    svg = draw_front(rows([0.1] * 3, [0.5] * 3), "miou", 100, higher=True)
    assert svg.count("<circle") == 3
    assert "nan" not in svg


@pytest.mark.parametrize("first", [-5.03, -2.0, -1.96, -1.3, -0.69, 0.0, 0.31, 1.02])
@pytest.mark.parametrize("width", [0.5, 0.55, 0.9, 1.6, 2.0, 5.3])
def test_the_axis_of_seconds_has_two_numbers_at_least(first, width):
    """A single number on a logarithmic axis does not tell its scale."""
    times = front._round_times(first, first + width)
    assert 2 <= len(times) <= 9
    assert all(
        10**first <= time * 1.001 and time <= 1.001 * 10 ** (first + width) for time in times
    )


def test_stands_in_the_report_with_every_protocol():
    task = find_task("seg")
    made = rows_of(task, ["bilinear", "<b>", "c"])
    for number, row in enumerate(made):
        row.cost["total_seconds"] = 0.1 * (1 + number % 3)
    text = page.render(results_of(task, made))
    assert text.count('class="front"') == len(task.protocols)
    assert "mIoU and time" in text
    assert "<b>" not in text
    Page(text)
