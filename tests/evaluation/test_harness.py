"""Whole evaluations on generated scenes: known answers, repeatability, bad input, resuming."""

import json

import numpy as np
import pytest
import torch
from evaluation.scenes import write_scene
from PIL import Image

import upfeat
from upfeat.evaluation import EvalConfig, evaluate
from upfeat.evaluation.data.folders import read_folder, split_randomly, subset
from upfeat.evaluation.report.figures import nice_ticks
from upfeat.evaluation.report.page import render
from upfeat.evaluation.results import Results, Row, summary
from upfeat.implicit.fit import FitConfig
from upfeat.upsamplers import Nearest

FAST = EvalConfig(size=48, seeds=2, pixels=60, pictures=2)


@pytest.fixture
def run(folder, colour_backbone, tmp_path):
    def call(out="out", upsamplers=("nearest", "bilinear"), config=FAST, **options):
        options.setdefault("backbone", colour_backbone)
        return evaluate(
            "seg", folder, tmp_path / out, upsamplers=upsamplers, config=config, **options
        )

    return call


def scores(results, name="miou"):
    return {(row.upsampler, row.protocol): row.scores[name] for row in results.rows}


def test_files_and_rows(run, folder, tmp_path):
    for seed in (23, 24):  # an interval needs five test images
        write_scene(folder / "test", f"s{seed}", seed)
    results = run()
    assert [(row.upsampler, row.protocol) for row in results.rows] == [
        (name, protocol)
        for name in ("nearest", "bilinear")
        for protocol in ("own", "transfer", "probabilities")
    ]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["data"]["train"]["images"] == 6
    assert content["rows"][0]["scores"]["miou"]["values"] == results.rows[0].scores["miou"]
    assert content["versions"]["upfeat"] == upfeat.__version__
    assert set(content["rows"][0]["per_class"]) == {"ground", "box", "disc"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert (page.count("<figure>"), page.count("<h3>")) == (2, 2 * 3)
    assert "http" not in page.replace("http-equiv", "")
    assert content["rows"][0]["cost"]["seconds"] > 0
    differences = content["differences"]
    assert {one["score"] for one in differences} == {"miou", "boundary_f"}
    assert all(one["low"] <= one["high"] for one in differences)
    assert results.rows[0].scores["drift"][0] == pytest.approx(1, abs=1e-5)


def test_images_in_both_splits_are_named(run, folder):
    for part in ("images", "labels"):
        content = (folder / "train" / part / "s3.png").read_bytes()
        (folder / "test" / part / "copy.png").write_bytes(content)
    problems = [str(one) for one in run().problems]
    assert problems == [
        "test/copy: is in the training split, too (train/s3), so its score is not that of an "
        "unseen image"
    ]


def test_implicit_features_have_rows_of_their_own(run, monkeypatch):
    few = FitConfig(views=4, held_out=2, anchors=32, components=3, max_pad=4)
    monkeypatch.setattr("upfeat.evaluation.methods.FitConfig", lambda: few)
    results = run(upsamplers=("bilinear", "implicit"))
    rows = {row.protocol: row for row in results.rows if row.upsampler == "implicit"}
    assert set(rows) == {"own", "transfer"}  # probabilities are no features: nothing to fit
    assert rows["own"].scores["miou"][0] > 0.3
    assert rows["own"].cost["seconds"] > 0
    again = run(upsamplers=("implicit",))
    assert again.rows[0].scores == rows["own"].scores


def test_one_seed_gives_the_same_digits(run):
    first, second = run("a"), run("b")
    for row, again in zip(first.rows, second.rows, strict=True):
        assert row.scores == again.scores
        assert row.per_class == again.per_class
    more = run("c", config=EvalConfig(size=48, seeds=3, pixels=60, pictures=2))
    for name, values in scores(more).items():
        assert values[:2] == scores(first)[name]


def test_nearest_gains_nothing_from_training_on_it(run):
    found = scores(run(upsamplers=["nearest"]))
    assert found["nearest", "own"] == found["nearest", "transfer"]
    assert found["nearest", "transfer"] == found["nearest", "probabilities"]


def test_features_at_full_resolution_score_nearly_one(run):
    perfect = upfeat.load_backbone(lambda x: torch.cat([x, x.square()], dim=1))
    results = run(upsamplers=["nearest"], backbone=perfect)
    for values in scores(results).values():
        assert min(values) > 0.99
    assert min(scores(results, "boundary_f")["nearest", "own"]) > 0.99


def test_features_that_know_nothing_score_chance(run):
    blind = upfeat.load_backbone(lambda x: torch.ones(len(x), 2, *(s // 8 for s in x.shape[2:])))
    results = run(upsamplers=["bilinear"], backbone=blind)
    for row in results.rows:
        # All ground: its share of the pixels, and nothing for the others.
        assert row.per_class["box"] == row.per_class["disc"] == [0, 0]
        assert row.per_class["ground"] == row.scores["accuracy"]


def test_resumes_with_what_is_finished(run, monkeypatch, folder):
    whole = run("whole")
    calls = []
    prepare = Nearest.prepare

    def counted(self, *arguments):
        calls.append(arguments)
        return prepare(self, *arguments)

    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Nearest, "prepare", counted)
    monkeypatch.setattr(upfeat.Bilinear, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("part")
    assert calls
    calls.clear()
    monkeypatch.undo()
    monkeypatch.setattr(Nearest, "prepare", counted)
    resumed = run("part")
    assert not calls
    assert scores(resumed) == scores(whole)
    write_scene(folder / "train", "s0", 77)
    assert scores(run("part")) != scores(whole)
    assert calls


def test_other_code_or_configuration_is_not_mistaken(run, monkeypatch):
    from upfeat import provenance

    run(upsamplers=["joint_bilateral"])
    calls = []
    prepare = upfeat.JointBilateral.prepare

    def counted(self, *arguments):
        calls.append(arguments)
        return prepare(self, *arguments)

    monkeypatch.setattr(upfeat.JointBilateral, "prepare", counted)
    run(upsamplers=["joint_bilateral"])
    assert not calls
    monkeypatch.setattr(provenance, "source_digest", lambda *modules: "other")
    run(upsamplers=["joint_bilateral"])
    assert calls


def test_functions_are_told_apart_by_what_they_give():
    from upfeat.provenance import identify_backbone

    def backbone(scale):
        return upfeat.load_backbone(lambda x: scale * torch.nn.functional.avg_pool2d(x, 8))

    first, again, other = (identify_backbone(backbone(scale)) for scale in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("device", ["cpux", "cuda:99", "meta"])
def test_bad_devices(run, device):
    with pytest.raises(ValueError, match=f'device="{device}" cannot be used: [^\n]+$'):
        run(device=device)


def test_cost_is_known_or_said_to_be_unknown(run):
    for row in run().rows:
        memory = row.cost["memory_mib"]
        assert memory is None or memory > 0


def test_bad_samples_are_named_and_left_out(run, folder):
    train = folder / "train"
    expected = {}
    write_scene(train, "lonely", 50)
    (train / "labels" / "lonely.png").unlink()
    expected["train/images/lonely.png"] = "has no label"
    Image.new("L", (64, 48)).save(train / "labels" / "widow.png")
    expected["train/labels/widow.png"] = "has no image"
    for name in ("corrupt", "corrupt_label", "small", "outside", "void", "colours"):
        write_scene(train, name, 51)
    for path in (train / "images" / "corrupt.png", train / "labels" / "corrupt_label.png"):
        path.write_bytes(path.read_bytes()[:60])
    expected |= {"train/corrupt": "damaged", "train/corrupt_label": "not a readable picture"}
    Image.new("L", (32, 24)).save(train / "labels" / "small.png")
    expected["train/small"] = "24×32 pixels but the image 48×64"
    Image.new("L", (64, 48), 7).save(train / "labels" / "outside.png")
    expected["train/outside"] = "class indices 7 are outside the list of 3"
    Image.new("L", (64, 48), 255).save(train / "labels" / "void.png")
    expected["train/void"] = "all are ignored"
    Image.new("RGB", (64, 48)).save(train / "labels" / "colours.png")
    expected["train/colours"] = "mode RGB"
    results = run(upsamplers=["bilinear"])
    found = {problem.name: problem.reason for problem in results.problems}
    assert set(found) == set(expected)
    for name, words in expected.items():
        assert words in found[name]
    assert results.data["train"]["images"] == 6


def test_missing_classes_are_named_and_not_scored_as_zero(run, folder):
    (folder / "classes.json").write_text('["ground", "box", "disc", "ghost"]')
    for split, label in (("train", 2), ("test", 1)):
        for path in (folder / split / "labels").iterdir():
            values = np.array(Image.open(path))
            Image.fromarray(np.where(values == label, 0, values)).save(path)
    results = run(upsamplers=["bilinear"])
    reasons = {problem.name: problem.reason for problem in results.problems}
    assert "not in train" in reasons["class disc"]
    assert "absent from test" in reasons["class box"]
    assert "absent from train and test" in reasons["class ghost"]
    for row in results.rows:
        assert summary(row.per_class["disc"])["mean"] is None
        assert row.scores["miou"] == row.per_class["ground"]


def test_what_cannot_be_scored_is_refused(run, folder):
    for path in (folder / "test" / "labels").iterdir():
        Image.new("L", (64, 48), 9).save(path)
    with pytest.raises(ValueError, match=r"no usable sample to test on .*outside the list"):
        run()
    for path in (folder / "test" / "labels").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"no usable sample to test on .*has no label"):
        run()
    (folder / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"classes\.json"):
        run()


@pytest.mark.parametrize("content", ["{", "3", "[]", '["one"]', '{"classes": [1, 2]}', '{"a": 1}'])
def test_bad_class_lists(folder, content):
    (folder / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=r"classes\.json"):
        read_folder(folder)


def test_other_ignore_index_and_palette_pictures(folder):
    (folder / "classes.json").write_text(
        '{"classes": ["ground", "box", "disc"], "ignore_index": 0}'
    )
    dataset = read_folder(folder)
    picture = Image.open(dataset.train[0].target).convert("P")
    values = np.array(Image.open(dataset.train[0].target))
    picture.putdata(values.flatten().tolist())
    picture.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200])
    picture.save(dataset.train[0].target)
    label = dataset.read_target(dataset.train[0])
    assert (label == np.where(values == 0, 255, values)).all()


def test_automatic_split(folder):
    flat = folder / "flat"
    for seed in range(8):
        write_scene(flat, f"s{seed}", seed)
    (flat / "classes.json").write_text((folder / "classes.json").read_text())
    first, again, other = (read_folder(flat, split_seed=seed) for seed in (0, 0, 1))
    assert len(first.test) == 2
    assert not {s.name for s in first.train} & {s.name for s in first.test}
    assert first.test == again.test != other.test
    assert split_randomly(first.train[::-1]) == split_randomly(first.train)
    assert len(subset(first.train, 3)) == 3
    assert subset(first.train, 99) == first.train


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": 0},
        {"pixels": 1},
        {"size": -3},
        {"protocols": ()},
        {"protocols": ("mine",)},
        {"max_test": 0},
        {"pictures": -1},
    ],
)
def test_bad_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EvalConfig(**options)


def test_upsamplers_must_fit(run, tmp_path):
    upfeat.JBUStack(9).save_pretrained(tmp_path / "stack")
    with pytest.raises(ValueError, match="expects 9 channels"):
        run(upsamplers=[str(tmp_path / "stack")])
    with pytest.raises(ValueError, match="name at least one"):
        run(upsamplers=[])
    with pytest.raises(ValueError, match="size=4"):
        run(config=EvalConfig(size=4))


def test_equal_names_of_folders_are_numbered(run, tmp_path):
    for part in ("a", "b"):
        upfeat.JointBilateral(radius=1).save_pretrained(tmp_path / part / "mine")
    results = run(upsamplers=[str(tmp_path / "a" / "mine"), str(tmp_path / "b" / "mine")])
    assert {row.upsampler for row in results.rows} == {"mine", "mine-2"}


@pytest.mark.parametrize(("low", "high"), [(0.342, 0.407), (0, 100), (3, 3), (0, 0), (-2, -1.9)])
def test_ticks_enclose_what_is_shown(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0])


def test_many_classes_stand_in_lines():
    names = [f"class {index}" for index in range(40)]
    row = Row("bilinear", "own", "", {"miou": [0.5]}, {name: [0.5] for name in names})
    settings = {"size": 48, "seeds": 1, "pixels": 9}
    data = {"name": "many", "classes": names}
    backbone = {"name": "some", "stride": 8}
    page = render(Results("seg", data, backbone, settings, [row], []))
    assert page.count("<td class=l>class ") == 40


def test_names_are_escaped():
    row = Row("<b>", "own", "", {"miou": [0.5]})
    settings = {"size": 48, "seeds": 1, "pixels": 9}
    backbone = {"name": "a & b", "stride": 8}
    page = render(Results("seg", {"name": "<i>", "classes": []}, backbone, settings, [row], []))
    assert "<b>" not in page
    assert "<i>" not in page


def test_summary():
    assert summary([0.5]) == {"mean": 0.5, "spread": None, "values": [0.5]}
    assert summary([1.0, 3.0])["spread"] == pytest.approx(2**0.5)
    assert summary([1.0, float("nan")]) == {"mean": None, "spread": None, "values": [1.0, None]}
    assert Row("a", "own", "", {}).pictures == {}
