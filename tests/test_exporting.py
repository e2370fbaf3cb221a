"""Exported files: equal to their models at other sizes, also where upfeat is not installed.

The rows of the table in docs/guides/deployment.md are these tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_upsamplers import stack_of
from torch import nn

import upfeat
from upfeat.cli import main
from upfeat.exporting import export
from upfeat.guided import GUIDE
from upfeat.heads import SavedHead, describe_backbone, save_head
from upfeat.portable import PORTABLE
from upfeat.portable.formats import FORMATS, METADATA, READERS
from upfeat.upsamplers.base import UPSAMPLERS

SMALL = {"query_dim": 8, "levels": 2}
MADE = {
    "nearest": upfeat.Nearest,
    "bilinear": upfeat.Bilinear,
    "bicubic": upfeat.Bicubic,
    "joint_bilateral": lambda: upfeat.JointBilateral(radius=1),
    "jbu_stack": lambda: stack_of(8, radius=1, n_stages=2),
    "neighbourhood": lambda: upfeat.NeighbourhoodUpsampler(back_projections=1, **SMALL),
    "detail": lambda: upfeat.DetailUpsampler(8, width=4, depth=1, **SMALL),
    "early_detail": lambda: upfeat.EarlyDetailUpsampler(
        8, hidden_dim=5, width=4, depth=1, smoothing=2, **SMALL
    ),
}
FIXED = {
    "anyup": lambda: UPSAMPLERS["anyup"](width=32),
    "jafar": lambda: UPSAMPLERS["jafar"](8, width=32),
    "uplift": lambda: UPSAMPLERS["uplift"](8, encoder_widths=(4, 6, 8), width=18),
    "naf": lambda: UPSAMPLERS["naf"](width=32),
}
"""Those that are exported for one size of images."""

ELSEWHERE = """
import json, sys
import numpy as np

try:
    import upfeat
except ImportError:
    pass
else:
    raise SystemExit("upfeat is here")
path, inputs, output = sys.argv[1:]
inputs = list(np.load(inputs).values())
if path.endswith("onnx"):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    names = [one.name for one in session.get_inputs()]
    found = session.run(None, dict(zip(names, inputs)))[0]
else:
    import torch

    extra = {"upfeat.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    facts = json.loads(extra["upfeat.json"])
    found = module(*map(torch.from_numpy, inputs)).detach().numpy()
np.savez(output, found)
print(json.dumps(facts))
"""


@pytest.fixture(autouse=True)
def quiet(recwarn):
    """PyTorch's exporter warns of its own parts."""
    return recwarn


def made(name):
    torch.manual_seed(0)
    upsampler = {**MADE, **FIXED}[name]().eval().requires_grad_(False)
    for parameter in upsampler.parameters():  # what starts as 0 counts too
        if not parameter.any():
            parameter.normal_(std=0.1)
    return upsampler


def run_elsewhere(path, tmp_path, *inputs):
    """Run a file in a process without upfeat: what it gives, and its facts."""
    np = pytest.importorskip("numpy")
    np.savez(tmp_path / "in.npz", *(one.numpy() for one in inputs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # -S -E would hide the libraries too; an import that fails stands for a package that is missing.
    code = "import sys; sys.modules['upfeat'] = None\n" + ELSEWHERE
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), tmp_path / "in.npz", tmp_path / "out.npz"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.from_numpy(np.load(tmp_path / "out.npz")["arr_0"]), json.loads(done.stdout)


def agree(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def needs(kind):
    if kind == "onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(library)


def parts(batch, grid, size):
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(batch, 8, *grid, generator=generator)
    return features, torch.randn(batch, 3, *size, generator=generator)


def layers(upsampler, batch, grid):
    """Early layers, by name, for an upsampler that was trained on them."""
    if not upsampler.wants_hidden:
        return {}
    return {"hidden": torch.randn(batch, 5, 2 * grid[0], 2 * grid[1])}


def test_every_class_has_a_row():
    assert {*MADE, *FIXED} == set(UPSAMPLERS)
    assert set(MADE) == set(PORTABLE)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_runs_where_upfeat_is_not_installed(kind, tmp_path):
    needs(kind)
    upsampler, path = made("bilinear"), tmp_path / f"up.{kind}"
    export(upsampler, path, channels=8)
    given = parts(3, (4, 9), (50, 91))
    found, facts = run_elsewhere(path, tmp_path, *given)
    agree(found, upsampler(*given))
    assert facts["upsampler"] == "bilinear"
    assert facts["channels"] == "8"


@pytest.mark.slow
@pytest.mark.exports
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", sorted({*MADE} - {"bilinear"}))
def test_upsamplers_of_any_size(name, kind, tmp_path):
    needs(kind)
    upsampler, path = made(name), tmp_path / f"up.{kind}"
    facts = export(upsampler, path, channels=8)
    assert float(facts["largest_error"]) < 1e-4
    assert "size" not in facts
    given, hidden = parts(1, (4, 9), (50, 91)), layers(upsampler, 1, (4, 9))
    found, _ = run_elsewhere(path, tmp_path, *given, *hidden.values())
    agree(found, upsampler(*given, **hidden))


@pytest.mark.slow
@pytest.mark.exports
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", FIXED)
def test_upsamplers_of_one_size(name, kind, tmp_path):
    needs(kind)
    upsampler, path = made(name), tmp_path / f"up.{kind}"
    with pytest.raises(ValueError, match=r"give size=\(height, width\)"):
        export(upsampler, path, channels=8)
    export(upsampler, path, channels=8, size=(24, 32))
    given = parts(3, (3, 4), (24, 32))
    found, facts = run_elsewhere(path, tmp_path, *given)
    agree(found, upsampler(*given))
    assert json.loads(facts["size"]) == [24, 32]


@pytest.mark.slow
@pytest.mark.exports
@pytest.mark.parametrize("upsampler", ["detail", "detail_universal", "early_detail"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_default(kind, upsampler, tmp_path):
    """Several windows of the regression, and sides that are no multiples of the stride."""
    needs(kind)
    model, path = upfeat.load(upsampler=upsampler), tmp_path / f"model.{kind}"
    facts = export(model, path)
    x = torch.nn.functional.interpolate(torch.randn(1, 3, 9, 9), (100, 553), mode="bicubic")
    found, stored = run_elsewhere(path, tmp_path, x)
    agree(found, model(x))
    assert json.loads(stored["mean"]) == [0.5, 0.5, 0.5]
    assert stored["stride"] == "16"
    assert stored["backbone_sha256"] == facts["backbone_sha256"]


def staged():
    """A network whose second stage has cells half as wide as the features'."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.GELU()),
        nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.GELU()),
        nn.Conv2d(5, 8, 3, stride=2, padding=1),
    )


@pytest.mark.slow
@pytest.mark.exports
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("make", [staged, lambda: nn.Conv2d(3, 8, 14, 14)], ids=["own", "guide's"])
def test_early_layers(make, kind, tmp_path):
    """A stage that was found in a network, and those of a guide that resizes the image."""
    needs(kind)
    torch.manual_seed(0)
    model, path = upfeat.load(make(), early=True), tmp_path / f"model.{kind}"
    facts = export(model, path)
    assert facts["early_layers_of"] in ("Sequential", GUIDE)
    run = READERS[kind](path)
    for size in ((60, 117), (112, 224)):
        x = torch.randn(2, 3, *size)
        agree(run([x]), model(x))


@pytest.mark.slow  # a trace and a reload
def test_early_layers_of_images_of_one_size(tmp_path):
    model = upfeat.load(staged(), early=True)
    facts = export(model, tmp_path / "model.pt2", size=(33, 50))
    assert facts["early_layers_of"] == "Sequential"
    x = torch.randn(3, 3, 33, 50)
    agree(READERS["pt2"](tmp_path / "model.pt2")([x]), model(x))


class Asking(nn.Module):
    """Tokens whose position embeddings are interpolated unless the grid is their own."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.positions = nn.Parameter(torch.randn(1, 8, 3, 3))

    def forward(self, x):
        """As transformers do."""
        x, positions = self.patches(x), self.positions
        if x.shape[2] * x.shape[3] != 9 or x.shape[2] != x.shape[3]:
            positions = nn.functional.interpolate(positions, x.shape[2:], mode="bicubic")
        return (x + positions).flatten(2).mT


def small_transformer(family):
    """A transformer as its users hold it, with random weights."""
    if family == "timm":
        timm = pytest.importorskip("timm", reason="timm is not installed")
        options = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 48}
        return timm.create_model("vit_tiny_patch16_224", **options).eval()
    if family == "dinov2":
        library = pytest.importorskip("transformers", reason="transformers is not installed")
        options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = library.Dinov2Config(**options, image_size=42, patch_size=14)
        return library.Dinov2Model(config).eval()
    return Asking()


@pytest.mark.slow  # libraries to import, traces, and files that are loaded elsewhere
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param("plain", "pt2"),
        *(
            pytest.param(family, kind, marks=pytest.mark.exports)
            for family in ("plain", "timm", "dinov2")
            for kind in FORMATS
            if (family, kind) != ("plain", "pt2")
        ),
    ],
)
@pytest.mark.usefixtures("torchvision_operators")
def test_transformers_of_any_size(family, kind, tmp_path):
    """Position embeddings are interpolated in the file, and their own grid is one of many."""
    needs(kind)
    model, path = upfeat.load(small_transformer(family), upsampler="bilinear"), f"model.{kind}"
    facts = export(model, tmp_path / path)
    assert "size" not in facts
    own, stride = 3, model.backbone.stride
    run = READERS[kind](tmp_path / path)
    for size in ((own * stride, own * stride), (2 * stride, 5 * stride + 3)):
        x = torch.randn(1, 3, *size)
        agree(run([x]), model(x))
    x = torch.randn(2, 3, 150, 61)
    found, _ = run_elsewhere(tmp_path / path, tmp_path, x)
    agree(found, model(x))


@pytest.mark.slow  # a trace and a reload
def test_what_nothing_reads_is_left_out(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 4096, 3, padding=1))
    model = upfeat.load(upfeat.load_backbone(network, layer="0"), upsampler="nearest")
    export(model, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").stat().st_size < 4 * network[1].weight.numel()
    x = torch.randn(2, 3, 33, 50)
    agree(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


def test_models_of_one_size_say_so(tmp_path):
    """Tiles are a loop over places, which no graph of any size holds."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 6, 8, 8)
            self.positions = nn.Parameter(torch.zeros(1, 6, 4, 4))

        def forward(self, x):
            """As models of one size do."""
            return self.patches(x) + self.positions

    model = upfeat.load(upfeat.load_backbone(Fixed(), input_size=32), upsampler="nearest")
    with pytest.raises(ValueError, match=r"tiled over others.*give size=\(height, width\), .*or"):
        export(model, tmp_path / "model.pt2")


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.GELU())
    return upfeat.load(network, upsampler="bilinear")


@pytest.mark.slow  # a trace and a reload
def test_heads_and_strides(tiny, tmp_path):
    weight, bias = torch.randn(3, 8), torch.randn(3)
    head = SavedHead(
        weight, bias, ["a", "b", "c"], "classes", describe_backbone(tiny.backbone), "bilinear"
    )
    save_head(tmp_path / "head.safetensors", head)
    path = tmp_path / "model.pt2"
    facts = export(tiny, path, head=tmp_path / "head.safetensors", stride=4)
    assert json.loads(facts["head_names"]) == ["a", "b", "c"]
    x = torch.randn(2, 3, 75, 52)
    extra = {METADATA: ""}
    program = torch.export.load(path, extra_files=extra)
    # Sizes that are formulas take the time of loading; only what goes in and comes out has them.
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "call_function"]
    maps = [value for value in values if isinstance(value, torch.Tensor)]
    assert sum(any(isinstance(side, torch.SymInt) for side in one.shape) for one in maps) == 1
    found = program.module()(x)
    agree(found, tiny.lazy(x, (18, 13)).project(weight, bias))
    # A file says of itself all that was returned, but for what was measured on it.
    stored = json.loads(extra[METADATA])
    assert {**stored, "largest_error": facts["largest_error"]} == facts


@pytest.mark.slow
def test_command(tmp_path, capsys):
    output = tmp_path / "model.pt2"
    arguments = ["export", "--upsampler", "nearest", "--size", "64x48", "-o", str(output)]
    assert main(arguments) == 0
    assert "112 channels, 64x48, error" in capsys.readouterr().out
    module = torch.export.load(output).module()
    x = torch.randn(3, 3, 48, 64)
    agree(module(x), upfeat.load(upsampler="nearest")(x))
    assert main(arguments) == 2
    assert "exists; name another file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.exports
def test_an_output_coarser_than_two_cells(tmp_path):
    upsampler, path = made("nearest"), tmp_path / "up.pt2"
    facts = export(upsampler, path, channels=8, stride=40)
    assert facts["smallest_side"] == "40"
    features, image = parts(1, (4, 9), (50, 91))
    found, _ = run_elsewhere(path, tmp_path, features, image)
    agree(found, upsampler(features, image, (1, 2)))


def test_an_input_is_never_replaced(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = nn.Conv2d(3, 4, 8, 8)
    torch.jit.trace(backbone, torch.zeros(1, 3, 16, 16)).save("backbone.pt2")
    before = Path("backbone.pt2").read_bytes()
    Path("link.pt2").symlink_to("backbone.pt2")
    for output in ("backbone.pt2", "link.pt2", "./backbone.pt2"):
        arguments = ["export", "--backbone", "backbone.pt2", "-o", output, "--overwrite"]
        assert main(arguments) == 2
        assert "is the input backbone.pt2; give another output" in capsys.readouterr().err
    assert Path("backbone.pt2").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "model.tflite"}, "unknown format; choose .onnx or .pt2"),
        ({"format": "tflite"}, "format='tflite': unknown format"),
        ({"path": "nowhere/model.onnx"}, "no such folder"),
        ({"stride": 0}, "stride=0 must be"),
        ({"stride": 2.5}, "stride=2.5 must be a whole number"),
        ({"channels": 0}, "channels=0 must be 1 or more"),
        ({"size": 32}, "size=32 must be"),
        ({"size": (32, 32, 32)}, r"size=\(32, 32, 32\) must be"),
        ({"size": (32, 7)}, r"size=\(32, 7\) .* at least 8 pixels on each side"),
        ({"size": (32, 32), "stride": 33}, "at least 33 pixels on each side"),
        ({"size": (0, 32)}, r"size=\(0, 32\) must be"),
        ({"head": (torch.zeros(2, 5), None)}, r"weight is \(2, 5\); give \(K, 8\)"),
        ({"head": "nothing.safetensors"}, "nothing.safetensors"),
    ],
)
def test_refusals(tiny, tmp_path, options, words):
    options = {"path": "model.pt2", **options}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        export(tiny, tmp_path / options.pop("path"), **options)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported(tmp_path):
    path = tmp_path / "model.pt2"
    with pytest.raises(TypeError, match=r"give what upfeat\.load returns"):
        export(nn.Conv2d(3, 8, 8, 8), path)
    with pytest.raises(ValueError, match="use passes=1"):
        export(upfeat.load(nn.Conv2d(3, 8, 8, 8), passes=5), path)
    with pytest.raises(ValueError, match="three of them"):
        export(upfeat.load(nn.Conv2d(4, 8, 8, 8), upsampler="bilinear"), path)
    with pytest.raises(ValueError, match="give channels=C"):
        export(upfeat.Bilinear(), path)
    with pytest.raises(ValueError, match="not in float32"):
        export(made("neighbourhood").double(), path, channels=8)
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_missing_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'upfeat\[onnx\]'"):
        export(tiny, tmp_path / "model.onnx")


def test_a_file_that_differs_is_not_kept(tiny, tmp_path, monkeypatch):
    from upfeat import exporting

    monkeypatch.setitem(exporting.READERS, "pt2", lambda path: lambda inputs: inputs[0].new_ones(1))
    with pytest.raises(ValueError, match="the exported file gives"):
        export(tiny, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
