"""Gains over several evaluations: known differences, missing rows, what must not be mixed."""

import csv
import json

import pytest

from upfeat.cli import main
from upfeat.evaluation import compare
from upfeat.evaluation.comparison import cells, to_csv, to_markdown, write_comparison
from upfeat.evaluation.config import EvalConfig
from upfeat.evaluation.results import Results, Row

NAMES = {"seg": "miou", "depth": "rmse"}


def write(root, folder, rows, *, task="seg", backbone="vits16", data="clothing", **settings):
    """Results of one evaluation: a mean for each protocol and upsampler."""
    results = Results(
        task,
        {"name": data, "layout": "folder", "classes": []},
        {"name": backbone, "weights": "", "stride": 16},
        EvalConfig(**settings).to_json(),
        [
            Row(upsampler, protocol, "", {NAMES[task]: [value - 0.01, value + 0.01], "drift": [1]})
            for (protocol, upsampler), value in rows.items()
        ],
        [],
        versions={"upfeat": "1.0", "device": "cpu"},
    )
    (root / folder).mkdir()
    results.write(root / folder / "results.json")
    return root / folder


FIRST = {("own", "nearest"): 0.4, ("own", "bilinear"): 0.45, ("own", "detail"): 0.5}
SECOND = {("own", "nearest"): 0.5, ("own", "bilinear"): 0.49, ("own", "detail"): 0.56}


@pytest.fixture
def two(tmp_path):
    return [write(tmp_path, "a", FIRST), write(tmp_path, "b", SECOND, data="rooms", seeds=5)]


def gains(comparison, protocol="own"):
    return {row.upsampler: (row.gains, row.mean) for row in comparison.tables[protocol]}


def test_gains_and_their_mean(two):
    found = compare(two)
    assert found.runs == ["vits16, clothing", "vits16, rooms"]
    assert found.bases == {"own": [pytest.approx(0.4), pytest.approx(0.5)]}
    table = gains(found)
    assert list(table) == ["bilinear", "detail"]
    assert table["bilinear"] == (pytest.approx([0.05, -0.01]), pytest.approx(0.02))
    assert table["detail"] == (pytest.approx([0.1, 0.06]), pytest.approx(0.08))
    assert found.notes == ["settings differ, in the order of the columns: seeds 3 | 5"]
    # The order of the runs changes the order of the columns alone; files stand for their folders.
    turned = gains(compare([path / "results.json" for path in reversed(two)]))
    assert turned["detail"] == (pytest.approx([0.06, 0.1]), pytest.approx(0.08))


def test_gains_over_another_upsampler(two):
    over = gains(compare(two, over="bilinear"))
    assert over["nearest"] == (pytest.approx([-0.05, 0.01]), pytest.approx(-0.02))
    assert gains(compare(two, score="drift"))["detail"] == ([0, 0], 0)


def test_errors_that_fall_are_gains(tmp_path):
    rows = {("own", "nearest"): 0.4, ("own", "detail"): 0.3}
    found = compare([write(tmp_path, "a", rows, task="depth")])
    assert gains(found)["detail"] == (pytest.approx([0.1]), pytest.approx(0.1))
    assert "lower scores are better" in to_markdown(found)


def test_missing_rows_are_named_and_no_zero(two, tmp_path):
    third = write(tmp_path, "c", {("own", "nearest"): 0.3, ("own", "bilinear"): 0.33}, data="c")
    found = compare([*two, third])
    assert gains(found)["detail"] == (pytest.approx([0.1, 0.06, None]), pytest.approx(0.08))
    assert found.notes[1:] == ["own: detail is missing in vits16, c; its mean is over 2 of 3 runs"]
    assert cells(found)["own"][2] == ["detail", "+10.00", "+6.00", "–", "+8.00 (2 of 3)"]
    # A score that is undefined is missing too, and so are all gains without the base.
    half = {**FIRST, ("transfer", "bilinear"): 0.3}
    half[("own", "detail")] = float("nan")
    found = compare([two[0], write(tmp_path, "d", half, data="d")])
    assert gains(found)["detail"][0][1] is None
    assert gains(found, "transfer")["bilinear"] == ([None, None], None)
    assert "transfer: nearest, and so every gain, is missing in" in found.notes[-1]


def test_runs_that_are_named_alike_are_told_apart(tmp_path):
    paths = [write(tmp_path, name, FIRST) for name in ("a", "b")]
    (tmp_path / "more").mkdir()
    paths.append(write(tmp_path / "more", "a", FIRST))
    assert compare(paths).runs == [
        "vits16, clothing (a)", "vits16, clothing (b)", "vits16, clothing (a) 2"
    ]  # fmt: skip


def test_tables_hold_the_same_numbers(two, tmp_path):
    found = compare(two)
    text = to_markdown(found)
    assert "| upsampler | vits16, clothing | vits16, rooms | mean gain |" in text
    assert "| nearest (score) | 40.00 | 50.00 |  |" in text
    assert "| bilinear | +5.00 | −1.00 | +2.00 |" in text
    assert "- settings differ" in text
    lines = list(csv.DictReader(to_csv(found).splitlines()))
    assert [line["upsampler"] for line in lines] == ["nearest (score)", "bilinear", "detail"]
    assert float(lines[1]["mean gain"]) == pytest.approx(0.02)
    assert lines[2]["runs"] == "2"
    write_comparison(found, tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["tables"]["own"][0]["gains"] == pytest.approx([0.05, -0.01])
    with pytest.raises(ValueError, match=r"t\.txt: must end in \.md, \.csv or \.json"):
        write_comparison(found, tmp_path / "t.txt")


def test_what_cannot_be_compared(two, tmp_path):
    depth = write(tmp_path, "depth", {("own", "nearest"): 0.4}, task="depth")
    with pytest.raises(ValueError, match=r"tasks differ: .*\(seg\).*\(depth\); give results of on"):
        compare([two[0], depth])
    with pytest.raises(ValueError, match="is given twice"):
        compare([two[0], two[0] / "results.json"])
    with pytest.raises(ValueError, match="paths is empty"):
        compare([])
    with pytest.raises(FileNotFoundError, match="none: no such file"):
        compare([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"over='lanczos' has no row in .*; choose one of nearest"):
        compare(two, over="lanczos")
    with pytest.raises(ValueError, match=r'score "miuo" is unknown; did you mean miou'):
        compare(two, score="miuo")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "upfeat-head"}, "format='upfeat-head' is not that of upfeat eval"),
        ({"task": "segm"}, 'task="segm" is unknown'),
        ({"task": None}, "damaged results|is unknown"),
        ({"rows": [{}]}, "damaged results"),
        ({"rows": 3}, "damaged results"),
        ({"settings": []}, "damaged results"),
        ({"backbone": {}}, "damaged results"),
        ({"rows": [{"protocol": "own", "upsampler": "a", "scores": {"miou": {"mean": "x"}}}]},
         "miou='x' must be a finite number"),
    ],
)  # fmt: skip
def test_files_that_are_damaged(two, change, words):
    path = two[0] / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"results.json: .*({words})") as raised:
        compare(two)
    assert "\n" not in str(raised.value)


def test_the_command(two, tmp_path, capsys):
    paths = [str(path) for path in two]
    table = tmp_path / "table.md"
    assert main(["compare", *paths, "-o", str(table)]) == 0
    shown = capsys.readouterr()
    assert "+8.00" in shown.out
    assert "upsampler       ┃ vits16, clothing ┃ vits16, rooms ┃ mean gain" in shown.out
    assert shown.err.startswith("upfeat compare: note: settings differ")
    assert table.read_text(encoding="utf-8") == to_markdown(compare(two))
    assert main(["compare", *paths, "-o", str(table)]) == 2
    assert "exists; name another file, or give --overwrite" in capsys.readouterr().err
    again = ["compare", *paths, "--over", "bilinear", "-o", str(table), "--overwrite"]
    assert main(again) == 0
    assert "over bilinear" in table.read_text(encoding="utf-8")
    before = (two[0] / "results.json").read_bytes()
    assert main(["compare", *paths, "-o", f"{paths[0]}/results.json", "--overwrite"]) == 2
    assert "is the input" in capsys.readouterr().err
    assert (two[0] / "results.json").read_bytes() == before
