"""``upfeat train`` as a user meets it."""

import argparse
import json
import os
from contextlib import suppress
from dataclasses import fields

import pytest
from training.small import write_photographs

from upfeat.cli import train as command
from upfeat.cli.main import main
from upfeat.settings import settings_of
from upfeat.training import TrainConfig

SMALL = (
    *(
        "--size",
        32,
        "--source-size",
        "none",
        "--steps",
        2,
        "--batch-size",
        1,
        "--views",
        1,
        "--projection-dim",
        2,
    ),
    *("--crf-weight", 0, "--backbone", "efficientnet_lite0.stride8", "--device", "cpu"),
    *("--max-pad", 4, "--upsampler", "jbu_stack", "--option", "radius=1", "--option", "n_stages=2"),
)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def photos(tmp_path):
    return write_photographs(tmp_path / "photos", 4)


def run(*arguments):
    return main(["train", *(str(argument) for argument in arguments)])


def settings(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(["photos", "-o", "run", *(str(one) for one in arguments)])
    return command._settings(options)[0]


@pytest.mark.filterwarnings("default")
def test_train_refuse_and_resume(photos, tmp_path, capsys):
    (photos / "bad.jpg").write_bytes(b"nonsense")
    out = tmp_path / "run"
    assert run(photos, "-o", out, *SMALL, "--validation-images", 1) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{out / 'upsampler'}  held-out error ")
    assert shown.err == (
        "upfeat: note: 1 of 5 photographs skipped: bad.jpg: not an image that Pillow can read\n"
    )
    assert json.loads((out / "config.json").read_text())["upsampler_options"]["radius"] == 1
    assert run(photos, "-o", out, *SMALL, "--validation-images", 1) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "holds a run already; go on with it by --resume" in shown.err
    assert run(photos, "-o", out, *SMALL, "--validation-images", 1, "--resume") == 0


def test_a_run_is_repeated_from_its_settings(photos, tmp_path):
    """``config.json`` of a run starts the same run, backbone included, in another folder."""
    assert run(photos, "-o", tmp_path / "run", *SMALL) == 0
    for name in ("config.json", "config.yaml"):
        again = tmp_path / name
        if (tmp_path / "run" / name).exists():  # YAML needs a package
            assert run(photos, "-o", again, "--config", tmp_path / "run" / name) == 0
            for file in ("config.json", "upsampler/model.safetensors"):
                assert (again / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_resuming_needs_nothing_again(photos, tmp_path, capsys):
    """A run goes on with its own settings, backbone and photographs, from any folder."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    small = [*SMALL, "--validation-images", 0, "--seed", 3, "--schedule", "constant"]
    assert run(photos, "-o", whole, *small, "--steps", 3) == 0
    assert run(photos, "-o", out, *small, "--keep", 1) == 0
    assert run("-o", out, "--resume") == 0
    assert run("-o", out, "--resume", "--steps", 3) == 0
    weights = [folder / "upsampler" / "model.safetensors" for folder in (out, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # What the run was told last is what it goes on with.
    config = json.loads((out / "config.json").read_text())
    assert (config["steps"], config["keep"], config["seed"]) == (3, 1, 3)
    history = json.loads((out / "upsampler" / "training.json").read_text())
    assert "started_with" not in history
    assert str(tmp_path) not in json.dumps(history)
    capsys.readouterr()
    for given, words in (
        (("--seed", 4), "seed: 3 there, 4 here"),
        (("--preset", "reference"), "upsampler_options: "),
        (("--backbone", "efficientnet_lite0"), "backbone: efficientnet_lite0.stride8 there"),
        (("--stpes", 4), "unrecognized arguments"),
        (("--keep", 0), "keep=0 must be 1 or more"),
    ):
        with suppress(SystemExit):
            assert run("-o", out, "--resume", *given) == 2
        shown = capsys.readouterr().err
        assert words in shown
        assert shown.count("\n") == 1


def test_resuming_nothing_says_so(tmp_path, capsys):
    assert run("-o", tmp_path / "run", "--resume") == 2
    assert "run: holds no run to resume; name the folder of one" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", "not JSON"),
        ("config.json", '{"steps": 2, "steps": 3}', '"steps" is given twice'),
        ("config.json", '{"stpes": 2}', "did you mean steps"),
        ("config.json", '{"steps": NaN}', "NaN is no number"),
        ("config.json", "[" * 100_000, "nested too deeply"),
        ("config.json", None, "no such file"),
        ("run.json", "{}", "lacks the settings"),
        ("run.json", '{"config": 1, "backbones": []}', "lacks the settings"),
        ("run.json", "\udc80", "not JSON"),
        ("photographs.json", "{}", "lacks files"),
        ("photographs.json", '{"files": [3]}', "lacks files"),
        ("photographs.json", '{"files": [["a", "b"]]}', "lacks files"),
        ("photographs.json", '{"files": [], "skipped": ["x"]}', "lacks skipped"),
        ("photographs.json", '{"files": [], "skipped": [], "train": [3]}', "lacks train"),
    ],
)
def test_damaged_runs_are_one_line(photos, tmp_path, capsys, name, content, words):
    assert run(photos, "-o", tmp_path / "run", *SMALL, "--validation-images", 0) == 0
    capsys.readouterr()
    path = tmp_path / "run" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert run("-o", tmp_path / "run", "--resume") == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1


@pytest.mark.filterwarnings("default")
def test_the_detail_recipe_without_a_start_says_so(photos, tmp_path, capsys):
    """On one line, with the fix, and that is taken."""
    small = [*SMALL[: SMALL.index("--upsampler")], "--validation-images", 1, "--preset", "detail"]
    small += ["--source-size", 32]
    assert run(photos, "-o", tmp_path / "bare", *small, "--option", "width=4") == 0
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("upfeat: note: frozen=['neighbourhood'] without a start")
    fix = "start=neighbourhood_efficientnet_lite0"
    assert f"give --option {fix}, or" in shown
    out = tmp_path / "started"
    assert run(photos, "-o", out, *small, "--option", "width=4", "--option", fix) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--stepz", "3"), "unrecognized arguments: --stepz"),
        (("--steps", "many"), "steps='many' must be a whole number"),
        (("--upsampler", "jbu"), "did you mean jbu_stack"),
        (("--backbone", "efficientnet"), "did you mean efficientnet_lite0"),
        (("--option", "radius"), "give NAME=VALUE, as radius=2"),
        (("--option", "raduis=2"), "did you mean radius"),
        (("--preset", "best"), 'preset "best" is unknown'),
        (("--config", "none.yaml"), "none.yaml: no such file"),
        (("--size", "500"), "smaller than 500×500 pixels"),
    ],
)
def test_bad_input_is_one_line(photos, tmp_path, capsys, arguments, words):
    try:
        code = run(photos, "-o", tmp_path / "run", *arguments)
    except SystemExit as leaving:
        code = leaving.code
    shown = capsys.readouterr()
    assert code == 2
    assert words in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", "-o", tmp_path / "run") == 2
    assert "holds no photographs" in capsys.readouterr().err


@pytest.mark.parametrize("begun", [False, True])
def test_interruption_says_how_to_go_on(photos, tmp_path, capsys, monkeypatch, begun):
    out = tmp_path / "my run"

    def interrupted(*arguments, on_step, **options):
        out.mkdir()
        if begun:
            (out / "run.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("upfeat.training.train", interrupted)
    assert run(photos, "-o", out, *SMALL) == 130
    shown = capsys.readouterr().err
    quoted = f'"{out}"' if os.name == "nt" else f"'{out}'"
    assert (f"upfeat train -o {quoted} --resume goes on" in shown) == begun
    assert ("there is nothing to resume" in shown) == (not begun)


@pytest.mark.parametrize("backbone", [3, [], {"a": 1}, [None]])
def test_backbones_of_a_file_are_names(photos, tmp_path, capsys, backbone):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"backbone": backbone}))
    assert run(photos, "-o", tmp_path / "run", "--config", file) == 2
    shown = capsys.readouterr().err
    assert "c.json: backbone=" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(("name", "value"), [("steps", "many"), ("frozen", 3), ("max_zoom", [])])
def test_a_wrong_value_in_a_file_names_the_file(photos, tmp_path, capsys, name, value):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({name: value}))
    assert run(photos, "-o", tmp_path / "run", "--config", file, "--steps", 3) == 2
    shown = capsys.readouterr().err
    assert f"c.json: {name}=" in shown
    assert shown.count("\n") == 1


def test_options_are_added_to_those_of_the_file(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"upsampler_options": {"radius": 3, "width": 8}}))
    found = settings("--config", file, "--option", "radius=2")
    assert found["upsampler_options"] == {"radius": 2, "width": 8}
    file.write_text(json.dumps({"upsampler_options": 3}))
    with pytest.raises(ValueError, match=r"c.json: upsampler_options=3 must be names and values"):
        settings("--config", file, "--option", "radius=2")


def test_flags_go_before_the_file_and_the_file_before_the_recipe(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"preset": "reference", "steps": 7, "views": 3, "backbone": "x"}))
    found = settings("--config", file, "--views", 2, "--source-size", "none", "--tensorboard")
    assert found == {
        "preset": "reference",
        "steps": 7,
        "views": 2,
        "backbone": "x",
        "source_size": None,
        "tensorboard": True,
    }
    file.write_text(json.dumps({"out": "elsewhere"}))
    assert "out" not in settings("--config", file)


def test_every_setting_has_a_flag():
    flags = {name for name, one in settings_of(TrainConfig).items() if one.flag}
    others = {"out": "-o", "upsampler_options": "--option", "tensorboard": "--tensorboard"}
    others["frozen"] = "--config, or --preset"
    assert {field.name for field in fields(TrainConfig)} == {*flags, *others}


def test_values_of_options():
    texts = ("a=1", "b=0.5", "c=none", "d=word", "e=[1, 2]", "f=true")
    found = dict(command._pair(text) for text in texts)
    assert found == {"a": 1, "b": 0.5, "c": None, "d": "word", "e": [1, 2], "f": True}


@pytest.mark.parametrize("name", ["nearest", "joint_bilateral"])
def test_an_upsampler_without_weights_is_refused(photos, tmp_path, capsys, name):
    assert run(photos, "-o", tmp_path / "run", "--upsampler", name) == 2
    assert "has no weights to train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
