"""An evaluation that goes on gives what a fresh one gives: stopped, changed or damaged."""

import json
from contextlib import suppress
from dataclasses import asdict, replace

import numpy as np
import pytest
from evaluation.scenes import write_scene
from PIL import Image

from upfeat import locks
from upfeat.evaluation import EvalConfig, evaluate
from upfeat.evaluation.results import Row, RowStore
from upfeat.storage import read_tensors

TINY = EvalConfig(size=32, seeds=1, pixels=12, pictures=1, protocols=("own", "transfer"))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "scenes"
    for split, seeds in (("train", (0, 1)), ("test", (20, 21))):
        for seed in seeds:
            write_scene(root / split, f"s{seed}", seed)
    (root / "classes.json").write_text('["ground", "box", "disc"]')
    return root


@pytest.fixture
def run(folder, colour_backbone, tmp_path):
    def call(out="out", task="seg", config=TINY, **options):
        options = {"upsamplers": ("bilinear",), "backbone": colour_backbone, **options}
        return evaluate(task, folder, tmp_path / out, config=config, **options)

    return call


def content(results):
    """All that must repeat: everything but the cost."""
    rows = json.dumps([asdict(replace(row, cost={})) for row in results.rows])  # with NaN
    return {**results.to_json(), "rows": rows, "examples": results.examples}


def rename(folder):
    for part in ("images", "labels"):
        (folder / "train" / part / "s0.png").rename(folder / "train" / part / "a.png")


def relabel(folder):
    path = folder / "test" / "labels" / "s20.png"
    label = np.array(Image.open(path))
    label[:9] = 2
    Image.fromarray(label).save(path)


def write_classes(text):
    return lambda folder: (folder / "classes.json").write_text(text)


CHANGES = {
    "another name of a photograph": rename,
    "another label": relabel,
    "another name of a class": write_classes('["ground", "box", "ball"]'),
    "another ignored index": write_classes(
        '{"classes": ["ground", "box", "disc"], "ignore_index": 1}'
    ),
    "fewer photographs": lambda folder: (folder / "test" / "labels" / "s21.png").unlink(),
    "nothing": lambda folder: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_noticed(run, folder, change):
    before = content(run("kept"))
    CHANGES[change](folder)
    after = content(run("kept"))
    assert after == content(run("fresh"))
    assert (after["rows"] == before["rows"]) == (change == "nothing")


@pytest.mark.parametrize("change", [{"pixels": 13}, {"size": 40}])
def test_settings_that_changed_are_noticed(run, change):
    run("kept")
    config = replace(TINY, **change)
    assert content(run("kept", config=config)) == content(run("fresh", config=config))


def test_depth_in_another_unit_is_noticed(run, folder):
    for split in ("train", "test"):
        (folder / split / "labels").rename(folder / split / "depth")
        for path in (folder / split / "depth").iterdir():
            Image.fromarray(50 * np.array(Image.open(path)) + 50).save(path)
    found = []
    for scale in (1, 1024):  # a power of two changes no digit
        (folder / "depth.json").write_text(json.dumps({"scale": scale}))
        rows = run(task="depth").rows
        found.append([value for row in rows for value in row.scores["abs_rel"]])
        found.append([value for row in rows for value in row.scores["rmse"]])
    assert found[2] == pytest.approx(found[0], rel=1e-3)
    assert found[3] == pytest.approx([1024 * value for value in found[1]], rel=1e-3)


class StoppedError(Exception):
    """In place of an interrupt from the keyboard."""


def steps_of(run, out, stop=None):
    """Run, perhaps until a step: the results, ``None`` where it was stopped, and the steps."""
    count = 0

    def on_step(label, done, total):
        nonlocal count
        assert 0 <= done <= total
        count += 1
        if count == stop:
            raise StoppedError(label)

    with suppress(StoppedError):
        return run(out, on_step=on_step, upsamplers=("nearest", "bilinear")), count
    return None, count


def test_stopped_at_any_step_it_goes_on_to_the_same_end(run, tmp_path):
    whole, count = steps_of(run, "whole")
    assert count > 20
    stop, resumed = 0, None
    while resumed is None:  # on and on in one folder, each time a little further
        stop += 3
        resumed, _ = steps_of(run, "part", stop)
        assert resumed or not list((tmp_path / "part").glob("re*.*"))
        for path in (tmp_path / "part" / "cache").iterdir():
            read_tensors(path) if path.suffix == ".safetensors" else json.loads(path.read_bytes())
    assert 12 < stop < count  # the rows of the first upsampler were there at the end
    assert content(resumed) == content(whole)
    assert {path.name for path in (tmp_path / "part").iterdir()} == {
        *("cache", "report.html", "results.json"),
    }
    _, again = steps_of(run, "part")
    assert again < count / 2  # photographs are counted, rows are not made


@pytest.mark.parametrize("damage", [b"[]", None])
def test_a_damaged_cache_is_made_again(run, tmp_path, damage):
    whole = content(run())
    for path in (tmp_path / "out" / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-7] if damage is None else damage)
    assert content(run()) == whole
    rows = [json.loads(path.read_bytes()) for path in (tmp_path / "out" / "cache").glob("*.json")]
    assert [row[0]["upsampler"] for row in rows] == ["bilinear"]


DAMAGE = [b"", b"[]", b"{}", b"null", b"3", b'[{"a": 1}]', b'["a"]', b"[" * 99_999, b"\xff", b"[{"]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: repr(damage[:9]))
def test_rows_that_are_none_are_not_found(tmp_path, damage):
    store = RowStore(tmp_path, {})
    store.save("a", "w", [Row("a", "own", "w", {"miou": [0.5]})])
    (path,) = tmp_path.iterdir()
    assert store.load("a", "w")
    path.write_bytes(damage)
    assert store.load("a", "w") is None


def test_rows_are_those_of_a_recipe_a_label_and_weights(tmp_path):
    row = Row("a", "own", "w", {"miou": [0.5, float("nan")]}, {"é": [1.0]}, {"seconds": None})
    RowStore(tmp_path, {"size": 1}).save("a", "w", [row])
    (found,) = RowStore(tmp_path, {"size": 1}).load("a", "w") or []
    assert str(found) == str(row)  # NaN is not equal to itself
    assert RowStore(tmp_path, {"size": 2}).load("a", "w") is None
    assert RowStore(tmp_path, {"size": 1}).load("b", "w") is None
    assert RowStore(tmp_path, {"size": 1}).load("a", "x") is None


def test_a_folder_that_another_writes_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    with locks.hold_folder(tmp_path / "out"), pytest.raises(ValueError, match="out"):
        run()
    assert run().rows


def test_a_cache_that_cannot_be_is_said(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cache").write_text("mine")
    with pytest.raises(ValueError, match="out: cannot be written"):
        run()
    assert (tmp_path / "out" / "cache").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": replace(TINY, size=7)}, r"size=7 must be at least the stride of .* \(8\)"),
        ({"task": "cam", "layout": "voc"}, "layout=voc is for labelled sets; cam takes any folder"),
        ({"task": "consistency", "layout": "nyuv2"}, "layout=nyuv2 .*; consistency takes any"),
        ({"layout": "nyuv2"}, "layout=nyuv2 is for the task depth"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(run, tmp_path, options, words):
    if options.get("task") == "cam":
        options = {**options, "backbone": None}
    with pytest.raises(ValueError, match=words):
        run(**options)
    assert not (tmp_path / "out" / "cache").exists()
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": None}, "task=None is no task; give a name or a subclass of Task"),
        ({"task": EvalConfig}, "is no task"),
        ({"config": {"size": 32}}, r"config=\{'size': 32\} is no EvalConfig"),
    ],
)
def test_what_is_of_another_kind_is_named(run, tmp_path, options, words):
    with pytest.raises(TypeError, match=words):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_protocols_that_suit_no_upsampler_are_refused(run, folder):
    only = replace(TINY, protocols=("probabilities",))
    with pytest.raises(ValueError, match="suit none of the upsamplers detail@5; give others"):
        run(config=only, upsamplers=("detail@5",))
    for split in ("train", "test"):
        (folder / split / "labels").rename(folder / split / "depth")
    with pytest.raises(ValueError, match="suit none of the upsamplers bilinear; give"):
        run(config=only, task="depth")
