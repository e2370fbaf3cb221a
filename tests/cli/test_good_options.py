"""Every option changes what it says that it changes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.place import write_place
from evaluation import test_readers
from PIL import Image

import upfeat
from upfeat.cli import main
from upfeat.evaluation import downsampler_fit
from upfeat.heads import load_head
from upfeat.marks import PICTURE, kind_of
from upfeat.outputs import file_digest
from upfeat.storage import read_tensors


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = write_place(tmp_path_factory.mktemp("place"))
    test_readers.write("voc", root / "voc")
    depth = root / "rooms"
    for split in ("train", "test"):
        shutil.copytree(root / "data" / split / "images", depth / split / "images")
        (depth / split / "depth").mkdir()
        for path in (root / "data" / split / "labels").iterdir():
            values = 50 * np.array(Image.open(path)) + 50
            Image.fromarray(values.astype(np.uint8)).save(depth / split / "depth" / path.name)
    return root


@pytest.fixture
def place(shared, tmp_path, monkeypatch):
    """Results go elsewhere than to what all tests share."""
    for path in shared.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line):
    assert main(line.split()) == 0


MINE = "--backbone mine.py:make"
SMALL = f"{MINE} --upsamplers nearest --size 24 --seeds 1 --pixels 9"


def evaluated(line):
    run(f"eval {line}")
    return json.loads(Path("out/results.json").read_bytes())


def protocols(content):
    return [row["protocol"] for row in content["rows"]]


def n_seeds(content):
    return {len(row["scores"]["miou"]["values"]) for row in content["rows"]}


EVAL = {
    "--seeds 2 --device cpu": (
        lambda content: (n_seeds(content), content["versions"]["device"]),
        ({2}, "cpu"),
    ),
    "--size 32": (lambda content: content["settings"]["size"], 32),
    "--pixels 10": (lambda content: content["settings"]["pixels"], 10),
    "--split-seed 3": (lambda content: content["settings"]["split_seed"], 3),
    "--max-train 1": (lambda content: content["data"]["train"]["images"], 1),
    "--max-test 1": (lambda content: content["data"]["test"]["images"], 1),
    "--protocol own": (protocols, ["own"]),
    "--protocol transfer": (protocols, ["transfer", "probabilities"]),
    "--protocol both": (protocols, ["own", "transfer", "probabilities"]),
    "--upsamplers own bilinear --protocol own": (
        lambda content: [row["upsampler"] for row in content["rows"]],
        ["own", "bilinear"],
    ),
    "--backbone efficientnet_lite0.stride8": (
        lambda content: (content["backbone"]["name"], content["backbone"]["stride"]),
        ("efficientnet_lite0.stride8", 8),
    ),
}


@pytest.mark.parametrize("options", EVAL)
def test_options_of_eval(place, options):
    read, expected = EVAL[options]
    assert read(evaluated(f"seg data -o out {SMALL} {options}")) == expected


def test_tasks_and_layouts_of_eval(place, monkeypatch, capsys):
    monkeypatch.setattr(downsampler_fit, "_STEPS", 3)
    content = evaluated(f"seg voc -o out --layout voc {SMALL} --size 16")
    assert (content["data"]["layout"], len(content["data"]["classes"])) == ("voc", 21)
    assert content["data"]["test"]["images"] == 2
    note = capsys.readouterr().err
    assert note.count("upfeat eval: note: ") == 11  # of the first photographs and classes
    assert "and 13 more, in results.json" in note  # of 2 test images that train has, too
    content = evaluated(f"depth rooms -o out {SMALL}")
    assert protocols(content) == ["own", "transfer"]
    options = "--downsampler simple box --views 2 --max-test 1"
    content = evaluated(f"consistency data -o out {SMALL} {options}")
    assert protocols(content) == ["simple", "box"]
    assert content["settings"]["views"] == 2
    assert "view error" in capsys.readouterr().out


def test_options_without_effect_are_said(place, monkeypatch, capsys):
    monkeypatch.setattr(downsampler_fit, "_STEPS", 3)
    run(f"probe labelled {MINE} --upsampler nearest --folds 2 -o h.safetensors --max-memory 2GB")
    for line, notes in {
        f"eval consistency data -o out {SMALL} --probe regression": ["pixels", "probe"],
        f"eval seg data -o out {SMALL} --views 2 --downsampler box": ["downsampler", "views"],
        f"eval seg data -o out {SMALL} --probe adamw --max-test 1": ["pixels"],
        f"extract photo.png -o lazy {MINE} --dtype fp32": ["dtype"],
        f"extract photo.png -o maps {MINE} --dtype fp32 --kind features": [],
        "render f.safetensors -o r.png --dtype fp16": ["dtype"],
        "render f.safetensors -o r.npy --dtype fp16": [],
    }.items():
        capsys.readouterr()
        run(line)
        found = [text for text in capsys.readouterr().err.splitlines() if "no effect" in text]
        assert [text.split()[3] for text in found] == [f"--{name}" for name in notes]


@pytest.mark.parametrize("command", ["run", "extract", "probe"])
def test_passes(place, command):
    """All commands with features as their result take several passes of the backbone."""
    source = "labelled" if command == "probe" else "photo.png"
    shared = f"{command} {source} {MINE} --upsampler nearest"
    shared += {"run": "", "extract": " --kind features", "probe": " --folds 2"}[command]
    stored = []
    for passes in (1, 5):
        out = f"{passes}.safetensors" if command == "probe" else str(passes)
        run(f"{shared} --passes {passes} -o {out}")
        (path,) = [Path(out)] if command == "probe" else Path(out).glob("*.safetensors")
        stored.append(read_tensors(path)[0])
    assert any(not torch.equal(stored[0][name], stored[1][name]) for name in stored[0])


def test_layers_by_name(place):
    Path("net.py").write_text(
        "from torch import nn\n\n\ndef make():\n    net = nn.Sequential(nn.Conv2d(3, 4, 8, 8))\n"
        "    net.add_module('last', nn.Sequential(nn.Conv2d(4, 5, 2, 2), nn.Flatten()))\n"
        "    return nn.Sequential(net)\n"
    )
    for layers, channels in (("0.0", 4), ("0.last.0", 5), ("0.0 0.last.0", 9)):
        run(f"run photo.png -o out --backbone net.py:make --upsampler nearest --layer {layers}")
        assert read_tensors("out/photo.safetensors")[0]["features"].shape == (channels, 48, 64)


def test_eval_replaces_files_of_others_where_it_is_told_to(place):
    (place / "out").mkdir()
    for name in ("results.json", "report.html"):
        (place / "out" / name).write_text("mine")
    assert evaluated(f"seg data -o out {SMALL} --overwrite")["task"] == "seg"
    assert evaluated(f"seg data -o out {SMALL}")["task"] == "seg"  # now its own


def test_options_of_fit(place):
    shared = f"fit photo.png {MINE} --views 1 --size 24 -o"
    run(f"{shared} a.safetensors")
    run(f"{shared} c.safetensors --share 1 --no-picture")
    views = upfeat.ImplicitFeatures.load("c.safetensors")
    assert views.facts["share"] == 1
    run(f"{shared} b.safetensors --seed 3 --no-guidance --no-picture --max-pixels 3072")
    assert kind_of(Path("a.features.png")) == PICTURE
    assert not Path("b.features.png").exists()
    whole = upfeat.ImplicitFeatures.load("a.safetensors")
    assert whole.shape == (1, 3, 24, 32)
    with pytest.raises(ValueError, match="does not hold its image"):
        upfeat.ImplicitFeatures.load("b.safetensors")
    other = upfeat.ImplicitFeatures.load("b.safetensors", "photo.png")
    assert (whole.facts["seed"], other.facts["seed"]) == (0, 3)
    assert (whole.facts["backbone"], whole.facts["preset"]) == ("mine", "fast")
    assert not torch.equal(whole.full(), other.full())
    assert not torch.equal(whole.full(), views.full())


def test_fits_of_dark_values(place, capsys):
    """The note on images of 12 bits names an option that fits take, too."""
    bright = (65535 * torch.rand(24, 32, generator=torch.Generator().manual_seed(0))).numpy()
    fits = []
    for divisor, white in ((1, "65535"), (16, "4095.9375"), (16, "65535")):
        Image.fromarray((bright / divisor).astype(np.uint16)).save("dark.png")
        run(f"fit dark.png -o out {MINE} --views 1 --size 24 --no-picture --max-value {white}")
        fits.append(upfeat.ImplicitFeatures.load("out/dark.safetensors").full())
    assert "done before" not in capsys.readouterr().out
    torch.testing.assert_close(fits[0], fits[1], atol=2e-2 * float(fits[0].std()), rtol=0)
    assert (fits[0] - fits[2]).abs().max() > fits[0].std()
    run(f"fit dark.png -o out {MINE} --views 1 --size 24 --no-picture --max-value 65535")
    assert "done before" in capsys.readouterr().out


def test_options_of_render(place, capsys):
    features = upfeat.ImplicitFeatures.load("f.safetensors")
    for dtype in ("fp16", "fp32"):
        run(f"render f.safetensors -o r.npy --size 30x20 --dtype {dtype}")
        found = np.load("r.npy")
        assert found.dtype == {"fp16": np.float16, "fp32": np.float32}[dtype]
        expected = features.render((20, 30))[0].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())
    run("render f.safetensors -o r.safetensors")
    stored, facts = read_tensors("r.safetensors")
    assert stored["features"].shape == (6, 24, 40)
    assert facts["format"] == "upfeat-features"
    for name, kind in (("r.PNG", "PNG"), ("r.jpg", "JPEG"), ("r.jpeg", "JPEG")):
        run(f"render f.safetensors -o {name} --size 30×20")
        with Image.open(name) as picture:
            assert (picture.format, picture.size) == (kind, (30, 20))
    assert capsys.readouterr().out.splitlines()[-1] == "r.jpeg  6×20×30"
    Path("mine.npy").write_text("mine")
    run("render f.safetensors -o mine.npy --overwrite")
    assert np.load("mine.npy").shape == (6, 24, 40)


def test_options_of_probe(place, capsys):
    base = f"probe labelled {MINE} --upsampler nearest --pixels 30 -o"
    heads = {}
    for name, options in {
        "base": "--folds 2",
        "seed": "--folds 2 --seed 1",
        "size": "--folds 2 --size 32",
        "pixels": "--folds 2 --pixels 31",
        "upsampler": "--upsampler bilinear",
    }.items():
        run(f"{base} {name}.safetensors {options}")
        folds = 3 if name == "upsampler" else 2  # five at most, and an image for each
        assert f"3 images or tiles in {folds} folds" in capsys.readouterr().out
        heads[name] = load_head(f"{name}.safetensors")
        assert heads[name].names == ["ground", "box", "disc"]
    assert heads["upsampler"].upsampler == "bilinear"
    for name in heads.keys() - {"base"}:
        assert not torch.equal(heads[name].weight, heads["base"].weight)
    run(f"{base} base.safetensors --folds 3")  # its own, with another number of folds
    assert torch.equal(load_head("base.safetensors").weight, heads["base"].weight)


def test_options_of_bench(place, capsys):
    Path("b.json").write_text("{}")
    run("bench --sizes 2:16 --channels 2 3 --jobs operator --repeats 2 -o b.json --overwrite")
    found = json.loads(Path("b.json").read_bytes())["measurements"]
    assert {one["job"] for one in found} == {"operator"}
    asked = [(2, 16, 2), (2, 16, 3)]
    for rival in ("ours", "unfold", "bilinear"):
        rows = [one for one in found if one["rival"] == rival]
        assert [(one["grid"], one["size"], one["channels"]) for one in rows] == asked
        assert all(one["seconds"] > 0 and one["spread"] >= 0 for one in rows)
    printed = capsys.readouterr().out
    assert printed.count("8→16") == 2 * 5


def test_export_shows_that_it_works(place, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(f"export -o m.pt2 {MINE} --upsampler nearest --size 32x16")
    shown = capsys.readouterr()
    assert "running the file" in shown.err
    assert shown.out.startswith("m.pt2  mine, nearest  3 channels, 32x16, error ")


@pytest.mark.parametrize("change", [str.lower, str.upper])
def test_options_of_convert(place, change):
    digest = change(file_digest(Path("naf.pth")))
    run(f"convert naf.pth naf.safetensors --sha256 {digest}")
    stored, facts = read_tensors("naf.safetensors")
    assert facts["source_sha256"] == digest.lower()
    run("convert naf.safetensors again.safetensors")
    again, _ = read_tensors("again.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
