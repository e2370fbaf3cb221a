"""``upfeat eval`` as a user meets it."""

import argparse
import json

import pytest
from evaluation.scenes import write_dataset

from upfeat.cli import eval as command
from upfeat.evaluation import downsampler_fit


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "scenes")


def run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.execute(parser.parse_args([str(argument) for argument in arguments]))


SMALL = ("--size", 32, "--seeds", 1, "--pixels", 20)


def test_table_and_files(folder, tmp_path, capsys):
    (folder / "train" / "labels" / "s0.png").unlink()
    out = tmp_path / "out"
    arguments = ("--upsamplers", "nearest", "bilinear", "--protocol", "transfer", *SMALL)
    assert run("seg", folder, "-o", out, *arguments, "--max-test", 1) == 0
    shown = capsys.readouterr()
    assert "5 train images, 1 test image, " in shown.out
    assert "bilinear" in shown.out
    assert "mIoU" in shown.out
    assert "s0.png: has no label" in shown.err
    content = json.loads((out / "results.json").read_text())
    assert [row["protocol"] for row in content["rows"]] == ["transfer", "probabilities"] * 2
    assert content["data"]["train"]["images"] == 5
    assert (out / "report.html").stat().st_size > 5000


def test_consistency(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(downsampler_fit, "_STEPS", 3)
    arguments = ("--upsamplers", "bilinear", "--downsampler", "simple", "--views", 1, *SMALL)
    assert run("consistency", folder, "-o", tmp_path / "out", *arguments) == 0
    shown = capsys.readouterr().out
    assert "view error" in shown
    assert "simple" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--upsamplers", "bilinaer"), "did you mean bilinear"),
        (("--backbone", "efficientnet"), "did you mean efficientnet_lite0"),
        (("--size", 3), "size=3"),
        (("--seeds", 0), "seeds=0"),
        (("--device", "gpu0"), 'device="gpu0" cannot be used'),
    ],
)
def test_bad_options(folder, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        run("seg", folder, "-o", tmp_path / "out", "--upsamplers", "nearest", *arguments)


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run("seg", tmp_path / "none", "-o", tmp_path / "out", "--upsamplers", "nearest")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        run("seg", folder, "-o", tmp_path / "file", "--upsamplers", "nearest")
