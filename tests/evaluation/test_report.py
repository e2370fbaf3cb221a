"""The table, its JSON and the page: what rows hold is what is shown, in their order, escaped."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from upfeat.evaluation.data.folders import Problem
from upfeat.evaluation.report import figures, page, pictures
from upfeat.evaluation.results import FORMAT, Results, Row, summary
from upfeat.evaluation.task import Score
from upfeat.evaluation.tasks import find_task, list_tasks
from upfeat.marks import REPORT, kind_of

PERCENT, PLAIN = Score("rate", "", percent=True), Score("error", "", higher_is_better=False)
NAN = math.nan


def rows_of(task, upsamplers, values=(0.5, 0.75), **parts):
    """Every protocol with every upsampler, its scores a little higher from one to the next."""
    return [
        Row(name, protocol, f"w{name}", {
            score: [value + 0.01 * number for value in values] for score in task.scores
        }, **parts)
        for protocol in task.protocols
        for number, name in enumerate(upsamplers)
    ]  # fmt: skip


def results_of(task, rows, **parts):
    test = {"images": 2, "digest": "d"}
    data = {"name": "set", "layout": "folder", "classes": ["a", "b"], "test": test}
    backbone = {"name": "net", "weights": "b", "stride": 8}
    settings = {"size": 48, "seeds": 2, "pixels": 9, "views": 5}
    return Results(task.name(), data, backbone, settings, rows, parts.pop("problems", []), **parts)


class Page(HTMLParser):
    """Tags that are opened are closed; the texts of table rows."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", list_tasks())
def test_every_task_has_a_page(name):
    task = find_task(name)
    results = results_of(task, rows_of(task, ["nearest", "bilinear"]))
    text = page.render(results)
    shown = Page(text)
    assert task.question in shown.texts
    for score in task.scores.values():
        assert any(page.heading(score) in cell for cell in shown.rows[0])
        assert score.meaning in shown.texts
    for protocol, meaning in task.protocols.items():
        assert [protocol + meaning] in shown.rows
    listed = [row[0] for row in shown.rows if row[0] in ("nearest", "bilinear")]
    assert listed == ["nearest", "bilinear"] * len(task.protocols)
    assert "http" not in text


def test_a_row_shows_mean_spread_and_the_difference_from_bilinear():
    task = find_task("cam")
    rows = rows_of(task, ["bilinear", "mine"])
    # With the backbone for every row: some methods know no time without it.
    rows[1].cost.update(passes=None, seconds=0.15, total_seconds=0.25, memory_mib=12.4)
    (base, mine) = (row for row in Page(page.render(results_of(task, rows))).rows[2:4])
    cells = [re.sub(r"\s+", " ", cell).strip() for cell in mine]
    assert cells[0] == "mine"
    assert cells[1] == "63.50 ±17.68+1.00 ±0.00"
    assert cells[3] == "0.6350 ±0.1768+0.0100 ±0.0000"
    assert cells[-3:] == ["–", "0.250", "12"]
    assert base[1].split("±")[0] == "62.50 "
    assert base[-3:] == ["–"] * 3


@pytest.mark.parametrize(
    ("score", "values", "expected"),
    [
        (PERCENT, [0.5], ("50.00", "")),
        (PERCENT, [0.25, 0.75], ("50.00", "±35.36")),
        (PLAIN, [1 / 3, 1 / 3], ("0.3333", "±0.0000")),
        (PLAIN, [1.0, NAN], ("–", "")),
        (PLAIN, [-1.5], ("−1.5000", "")),
        (PLAIN, [-0.00002, -0.00004], ("0.0000", "±0.0000")),  # never "-0.0000"
    ],
)
def test_scores_as_they_are_read(score, values, expected):
    assert page.shown(score, values) == expected


@pytest.mark.parametrize(
    ("score", "means", "best"),
    [
        (PERCENT, [0.1, 0.3, 0.2], 0.3),
        (PLAIN, [0.1, 0.3, 0.2], 0.1),
        (PLAIN, [NAN, 0.3, 0.2], 0.2),
        (PLAIN, [NAN, 0.3], None),  # alone is not best
        (PLAIN, [0.3, 0.3], None),
        (PLAIN, [NAN, NAN], None),
    ],
)
def test_the_best_of_a_group(score, means, best):
    rows = [Row(str(index), "p", "", {"s": [mean]}) for index, mean in enumerate(means)]
    assert page.best_mean(rows, "s", score) == best


def test_differences_are_signed_marked_and_open_where_there_are_none():
    task = find_task("seg")
    given = {"protocol": "own", "upsampler": "<mine>", "against": "bilinear", "score": "miou"}
    found = [
        {**given, "values": [0.01, -0.002], "mean": 0.004, "low": 0.001, "high": 0.02},
        {**given, "values": [None], "mean": None, "low": None, "high": None},
        {**given, "values": [-0.03], "mean": -0.03, "low": -0.04, "high": -0.01},
        {**given, "values": [0.01], "mean": 0.01, "low": -0.00002, "high": 0.02},
    ]
    results = results_of(task, rows_of(task, ["bilinear", "<mine>"]), differences=found)
    shown = page.differences(results)
    assert [(one.mean, one.interval, one.seeds, one.certain) for one in shown] == [
        ("+0.40", "+0.10 to +2.00", "+1.00 −0.20", True),
        ("–", "–", "–", False),
        ("−3.00", "−4.00 to −1.00", "−3.00", True),
        ("+1.00", "0.00 to +2.00", "+1.00", False),
    ]
    rows = [row for row in Page(page.render(results)).rows if row[:2] == ["own", "<mine>"]]
    assert [row[4] for row in rows] == [one.mean for one in shown]


HOSTILE = "</pre><script>x</script>\"'&<b>"


def test_nothing_that_is_named_is_taken_for_markup():
    task = find_task("seg")
    photo = torch.zeros(3, 4, 6, dtype=torch.uint8)
    label = pictures.encode_indices(torch.zeros(4, 6))
    rows = rows_of(task, [HOSTILE], per_class={HOSTILE: [0.5], "b": [NAN]})
    for row in rows:
        row.pictures = {HOSTILE: label}
    example = {"image": f"data:image/jpeg;base64,{pictures.encode_photo(photo)}", "target": label}
    results = results_of(
        task, rows, problems=[Problem(HOSTILE, HOSTILE)], examples={HOSTILE: example}
    )
    results.data.update(name=HOSTILE, classes=[HOSTILE, "b"])
    results.backbone["name"] = HOSTILE
    text = page.render(results)
    assert "<script" not in text
    assert "<b>" not in text
    assert f"Segmentation probes on {HOSTILE}" in Page(text).texts
    assert '"1 note"' not in text
    assert "1 note below" in text


def test_classes_without_labels_have_a_dash():
    task = find_task("seg")
    rows = rows_of(task, ["bilinear"], per_class={"sky": [0.5, 0.7], "sea": [NAN, NAN]})
    assert ["bilinear", "60.0", "–"] in Page(page.render(results_of(task, rows))).rows


def test_the_json_is_json_and_holds_what_is_shown(tmp_path):
    task = find_task("seg")
    rows = rows_of(task, ["a", "é"], per_class={"sky": [NAN, 0.5]})
    rows[0].scores["miou"] = [NAN, 0.25]
    rows[0].pictures, rows[0].sums = {"x": "y"}, {"shape": [1]}
    results = results_of(task, rows, problems=[Problem("p", "r")])
    results.write(tmp_path / "results.json")

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "results.json").read_bytes().decode("utf-8")
    content = json.loads(text, parse_constant=refuse)
    assert list(content) == [
        *("format", "task", "data", "backbone", "settings", "versions", "problems", "rows"),
        "differences",
    ]
    assert content["format"] == FORMAT == kind_of(tmp_path / "results.json")
    assert content["problems"] == [{"name": "p", "reason": "r"}]
    assert {*content["rows"][0]} == {
        *("upsampler", "protocol", "weights", "scores", "per_class", "cost"),
    }
    assert content["rows"][0]["scores"]["miou"] == {
        "mean": None, "spread": None, "values": [None, 0.25],
    }  # fmt: skip
    assert [row["upsampler"] for row in content["rows"]] == ["a", "é"] * len(task.protocols)
    assert "é" in text
    page.write_report(results, tmp_path / "report.html")
    assert kind_of(tmp_path / "report.html") == REPORT


FINITE = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-200)


@settings(max_examples=300, deadline=None)
@given(FINITE, st.one_of(st.just(0.0), st.floats(1e-18, 1e9)))
@example(0.0078125, 1e-18)
@example(5e-324, 0.0)
def test_ticks_enclose_any_range_and_are_even(low, span):
    high = low + span
    ticks = figures.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    steps = np.diff(ticks)
    assert steps.min() > 0
    assert steps.max() < 1.01 * steps.min()
    slack = 1e-9 * (steps[0] + abs(low))
    assert ticks[0] - slack <= low <= high <= ticks[-1] + slack


@pytest.mark.parametrize(
    "values",
    [(1e-14, 3e-14), (0.3, 0.30000000000000004), (0.0, 0.0), (5e-324, 0.0), (-1e9, 1e9), (NAN, 1)],
)
def test_charts_of_any_values_lie_within_their_frame(values):
    task = find_task("depth")
    name = next(iter(task.scores))
    rows = [
        Row("bilinear", "own", "", {name: list(values)}),
        Row("a", "own", "", {name: [1.0] * 2}),
    ]
    chart = figures.draw_chart(results_of(task, rows), name, 1)
    Page(chart)
    width = float(re.search(r'viewBox="0 0 (\d+)', chart)[1])
    places = [float(value) for value in re.findall(r'c?x[12]?="([-\d.]+)"', chart)]
    assert all(0 <= place <= width for place in places)
    assert chart.count("<circle") == 2 * sum(
        not math.isnan(sum(values)) or row is rows[1] for row in rows
    )


def test_a_chart_needs_two_seeds_and_a_score():
    task = find_task("depth")
    name = next(iter(task.scores))
    for values in ([0.5], [NAN, NAN]):
        rows = [Row("bilinear", "own", "", {name: values})]
        assert figures.draw_chart(results_of(task, rows), name, 1) == ""


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_a_summary_is_of_all_values(values):
    found = summary(values)
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert found["values"] == values
    if len(values) > 1:
        assert found["spread"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)


def test_colours_of_classes_are_distinct():
    colours = figures.palette(40)
    assert len({tuple(colour) for colour in colours[:40].tolist()}) == 40
    assert (colours[255] == 255).all()


def decoded(text):
    import base64
    import io

    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        return np.array(picture)


def test_pictures_hold_what_they_show():
    label = torch.tensor([[0, 1, 255], [2, 7, 3]])
    assert (decoded(pictures.encode_indices(label)) == label.numpy()).all()
    depth = torch.tensor([[1.0, 2.0], [3.0, NAN]])
    assert decoded(pictures.encode_values(depth, 1, 3)).tolist() == [[255, 148], [40, 0]]
    flat = pictures.encode_values(torch.ones(2, 2), 1, 1)
    assert (decoded(flat) == 255).all()
    photo = torch.full((3, 8, 8), 200, dtype=torch.uint8)
    dark, bright = (
        decoded(pictures.encode_heat(photo, torch.full((8, 8), heat)))[4, 4].astype(int)
        for heat in (0.0, 1.0)
    )
    assert (abs(dark - 60) < 4).all()
    assert bright[0] > bright[1] > bright[2] > dark[2]
