"""How a command starts: what it imports before it answers, and how its threads wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation.scenes import write_dataset

import upfeat
from upfeat import loading
from upfeat.cli import choices, main
from upfeat.cli.main import COMMANDS
from upfeat.evaluation import harness
from upfeat.upsamplers import pretrained
from upfeat.upsamplers.base import UPSAMPLERS

# A command line that is refused, or that asks for help, has no use for these.
HEAVY = ("torch", "numpy", "PIL", "rich", "safetensors", "scipy", "torchvision", "timm")
SHOW_HEAVY = f"""
import json, sys
from upfeat.cli import main
for line in json.loads(sys.argv[1]):
    try:
        main(line)
    except SystemExit as left:
        print("LOADED", left.code, [name for name in {HEAVY!r} if name in sys.modules])
"""


def python(code, *arguments, **environment):
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=plain | environment,
    )
    return done.stdout.splitlines()


def loaded(*lines):
    shown = python(SHOW_HEAVY, json.dumps(lines))
    return [line for line in shown if line.startswith("LOADED")]


def test_help_lists_the_names_that_there_are(capsys):
    assert choices.DEFAULT_UPSAMPLER == pretrained.DEFAULT_UPSAMPLER
    assert choices.DEFAULT_BACKBONE == loading.DEFAULT_BACKBONE
    assert choices.BASELINES == harness.BASELINES
    by_name = set(UPSAMPLERS) & set(upfeat.list_upsamplers())
    assert sorted(choices.UPSAMPLERS) == sorted(by_name)
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ", ".join(choices.UPSAMPLERS) in shown
    assert (
        "(default: detail with --early; for efficientnet_lite0 and lite1 early_detail, trained"
        in shown
    )


def test_help_imports_nothing_heavy():
    lines = [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS)]
    assert loaded(*lines) == ["LOADED 0 []"] * len(lines)


def test_errors_of_arguments_import_nothing_heavy():
    lines = [[], ["nonsense"], ["run"], ["run", "x.jpg", "-o", "y", "--dtype", "int8"]]
    assert loaded(*lines) == ["LOADED 2 []"] * len(lines)


def test_the_package_is_imported_without_pytorch():
    code = """
import sys, upfeat
print("torch" in sys.modules, set(upfeat.__all__) - set(dir(upfeat)), hasattr(upfeat, "no"))
"""
    assert python(code) == ["False set() False"]
    assert set(upfeat.__all__) == {*upfeat._LAZY, "functional", "__version__"}
    assert upfeat.backbones.Backbone is upfeat.Backbone
    modules = {path.stem for path in Path(upfeat.__file__).parent.iterdir()}
    assert not modules & set(upfeat._LAZY)


SHOW_THREADS = """
import os, sys
from upfeat.cli.main import calm_threads
calm_threads()
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    assert python(SHOW_THREADS) == ["1000 None False"]
    assert python(SHOW_THREADS, GOMP_SPINCOUNT="7") == ["7 None False"]
    assert python(SHOW_THREADS, OMP_WAIT_POLICY="ACTIVE") == ["None ACTIVE False"]


def test_what_commands_import(tmp_path):
    """PyTorch, but not its compiler, which takes as long as all the rest of it, nor SymPy."""
    write_dataset(tmp_path / "data")
    code = """
import json, os, sys
from upfeat.cli import main
for line in json.loads(sys.argv[1]):
    assert main(line) == 0, line
print(os.environ["GOMP_SPINCOUNT"], [m for m in ("torch._dynamo", "sympy") if m in sys.modules])
"""
    photo, out = str(tmp_path / "data" / "train" / "images" / "s0.png"), str(tmp_path / "out")
    run = ["run", photo, "-o", out]
    fit = ["fit", photo, "-o", str(tmp_path / "a.safetensors"), "--views", "2", "--size", "32"]
    train = [
        "--steps",
        "1",
        "--views",
        "1",
        "--validation-images",
        "0",
        "--batch-size",
        "1",
        "--size",
        "32",
    ]
    train = ["train", str(tmp_path / "data"), "-o", str(tmp_path / "run"), *train]
    evaluate = ["--size", "32", "--seeds", "1", "--pixels", "16", "--upsamplers", "bilinear"]
    evaluate = ["eval", "seg", str(tmp_path / "data"), "-o", str(tmp_path / "eval"), *evaluate]
    lines = json.dumps([run, fit, train, evaluate])
    assert python(code, lines)[-1] == "1000 []"


def test_operators_are_there_where_pytorch_is():
    """``torch.export.load`` looks for them by name; and it is too late for settings of threads."""
    code = "import torch, upfeat\nprint(bool(dir(torch.ops.upfeat)))" + SHOW_THREADS
    assert python(code) == ["True", "None None True"]
