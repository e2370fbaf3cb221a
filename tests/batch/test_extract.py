"""Every item once, whatever happens in between; bad ones are listed with their reasons."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import upfeat
from upfeat.batch import Engine, Extraction, extract, maker
from upfeat.batch.budget import Budget
from upfeat.batch.extract import read_extracted
from upfeat.batch.items import list_items
from upfeat.batch.replicas import replicate
from upfeat.cli import main
from upfeat.heads import SavedHead, describe_backbone
from upfeat.marks import encode_picture
from upfeat.training.photographs import find_photographs


def model():
    torch.manual_seed(0)
    return upfeat.load(torch.nn.Conv2d(3, 4, 8, 8), upsampler="detail")


def encoded(seed, size=(40, 56)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.png", "inner/a.png", "inner/c.png")):
        (folder / name).write_bytes(encoded(seed, (40 + 8 * seed, 56)))
    return folder


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["lazy", "features", "head"])
def test_files_hold_what_the_model_gives(tmp_path, photos, kind):
    made_by = model()
    head = None
    if kind == "head":
        names = ["x", "y", "z"]
        head = SavedHead(
            torch.randn(3, 4), torch.randn(3), names, "classes",
            describe_backbone(made_by.backbone), "detail",
        )  # fmt: skip
    out = tmp_path / "out"
    summary = extract(made_by, [photos], out, Extraction(kind, dtype="float32", head=head))
    assert (summary.made, summary.kept, summary.failures) == (4, 0, [])
    keys = [item["key"] for item in json.loads((out / "manifest.json").read_text())["items"]]
    assert keys == ["a.png", "b.png", "inner/a.png", "inner/c.png"]
    with torch.no_grad():
        expected = made_by(made_by.preprocess(photos / "inner" / "c.png"))
        path = out / "inner" / "c.png.safetensors"
        if kind == "lazy":
            found, close = read_extracted(path, made_by.upsampler).full(), 2e-3
        else:
            found, close = load_file(path)["features"][None], 1e-5
        if head is not None:
            expected = torch.einsum("kc,bchw->bkhw", head.weight, expected)
            expected = expected + head.bias[:, None, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=close)


def test_outputs_of_a_head_too_small_for_float16_are_failures(tmp_path, photos):
    described = describe_backbone(model().backbone)
    weight, bias = 1e-9 * torch.randn(1, 4), torch.zeros(1)
    head = SavedHead(weight, bias, ["x"], "values", described, "detail")
    summary = extract(model(), [photos / "b.png"], tmp_path / "out", Extraction("head", head=head))
    assert "too small for float16; use float32" in summary.failures[0][1]


def test_what_is_done_is_kept_and_what_changed_is_made_again(tmp_path, photos):
    out = tmp_path / "out"
    extract(model(), [photos], out, Extraction())
    before = tree(out)
    assert extract(model(), [photos], out, Extraction()).kept == 4
    assert tree(out) == before
    (photos / "b.png").write_bytes(encoded(9))
    (out / "a.png.safetensors").unlink()
    summary = extract(model(), [photos], out, Extraction())
    assert (summary.made, summary.kept) == (2, 2)
    with pytest.raises(ValueError, match="made with another size"):
        extract(model(), [photos], out, Extraction(size=32))
    assert extract(model(), [photos], out, Extraction(size=32), overwrite=True).made == 4


def test_bands_and_the_value_of_white(tmp_path):
    values = np.random.default_rng(0).integers(0, 3000, (40, 48, 3), dtype=np.uint16)
    folder, out = tmp_path / "scenes", tmp_path / "out"
    folder.mkdir()
    Image.fromarray(values[..., 0]).save(folder / "grey.tif")
    made_by, reading = model(), {"bands": (0, 0, 0), "max_value": 3000}
    extraction = Extraction("features", dtype="float32", **reading)
    assert extract(made_by, [folder], out, extraction).failures == []
    with torch.no_grad():
        expected = made_by(made_by.preprocess(folder / "grey.tif", **reading))[0]
    found = load_file(out / "grey.tif.safetensors")["features"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for other in ({"max_value": 4095}, {}):
        with pytest.raises(ValueError, match="made with another"):
            extract(made_by, [folder], out, Extraction("features", dtype="float32", **other))
    for bad in ({"bands": (0, -1)}, {"bands": "x"}, {"max_value": 0}, {"max_value": "x"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Extraction(**bad)
    options = ["--bands", "0,0,0", "--max-value", "3000", "--kind", "lazy"]
    command = ["extract", str(folder), "-o", str(tmp_path / "lazy"), *options]
    assert main([*command, "--upsampler", "bilinear"]) == 0
    settings = json.loads((tmp_path / "lazy" / "manifest.json").read_text())["settings"]
    assert (settings["bands"], settings["max_value"]) == ([0, 0, 0], 3000)


def test_bad_items_are_listed_and_the_others_done(tmp_path, photos, capsys):
    (photos / "damaged.png").write_bytes(encoded(1)[:200])
    (photos / "tiny.png").write_bytes(encoded(1, (3, 3)))
    (photos / "text.png").write_text("no picture")
    out = tmp_path / "out"
    assert main(["extract", str(photos), "-o", str(out)]) == 2
    printed = capsys.readouterr()
    assert "4 made, 0 there before, 3 failed" in printed.out
    assert [line.split(": ")[2] for line in printed.err.splitlines()] == [
        "damaged.png", "text.png", "tiny.png",
    ]  # fmt: skip
    items = json.loads((out / "manifest.json").read_text())["items"]
    assert sum("error" in item for item in items) == 3


def test_a_name_too_long_for_its_file_is_of_that_item(tmp_path, photos):
    (photos / ("a" * 250 + ".png")).write_bytes(encoded(1))
    summary = extract(model(), [photos], tmp_path / "out", Extraction())
    assert summary.made == 4
    assert [reason.split(": ")[-1] for _, reason in summary.failures] == ["File name too long"]


@pytest.mark.parametrize("place", [12, -5])
def test_a_file_that_was_changed_is_made_again(tmp_path, photos, place):
    """One of the same length: its header, or its values, are damaged."""
    out = tmp_path / "out"
    extract(model(), [photos], out, Extraction())
    calm, path = tree(out), out / "b.png.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)
    for file in (path, out / "a.png.safetensors"):  # the other is touched, and remains the same
        os.utime(file, ns=(0, (out / "manifest.json").stat().st_mtime_ns + 1))
    summary = extract(model(), [photos], out, Extraction())
    assert (summary.made, summary.kept, summary.failures) == (1, 3, [])
    assert tree(out) == calm


def test_a_result_does_not_outlive_its_image(tmp_path, photos):
    """An image that is damaged later has no features, also none of what it was before."""
    out = tmp_path / "out"
    extract(model(), [photos], out, Extraction())
    (photos / "b.png").write_bytes(encoded(1)[:200])
    summary = extract(model(), [photos], out, Extraction())
    assert (summary.made, summary.kept, len(summary.failures)) == (0, 3, 1)
    assert not summary.failures[0][1].startswith("image: ")  # the key is its name
    assert not (out / "b.png.safetensors").exists()
    (photos / "b.png").write_bytes(encoded(1, (48, 56)))
    assert extract(model(), [photos], out, Extraction()).made == 1


def test_a_head_of_another_bias_is_another_head(tmp_path, photos):
    weight, about = torch.randn(2, 4), describe_backbone(model().backbone)
    for bias in (torch.zeros(2), torch.ones(2)):
        head = SavedHead(weight, bias, ["a", "b"], "classes", about, "detail")
        if bias.any():
            with pytest.raises(ValueError, match="made with another head"):
                extract(model(), [photos], tmp_path / "out", Extraction("head", head=head))
        else:
            extract(model(), [photos], tmp_path / "out", Extraction("head", head=head))


def test_files_of_others_are_kept(tmp_path, photos):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.png.safetensors").write_text("mine")
    summary = extract(model(), [photos], out, Extraction())
    assert summary.made == 3
    assert "was not made by upfeat" in summary.failures[0][1]
    assert (out / "a.png.safetensors").read_text() == "mine"
    assert extract(model(), [photos], out, Extraction(), overwrite=True).made == 4


def test_archives_are_read_in_order_and_truncated_ones_up_to_there(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for seed in range(3):
            for name, content in ((f"{seed}.png", encoded(seed)), (f"{seed}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    out = tmp_path / "out"
    summary = extract(model(), [path], out, Extraction())
    assert summary.made == 3
    assert (out / "shard.tar" / "2.png.safetensors").is_file()
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    summary = extract(model(), [path], tmp_path / "short", Extraction())
    assert 1 <= summary.made < 3
    assert len(summary.failures) == 1


def test_lists_and_files(tmp_path, photos):
    (photos / "list.txt").write_text("# two\na.png\n\ninner/c.png\nmissing.png\na.png\nb\0.png\n")
    out = tmp_path / "out"
    summary = extract(model(), [photos / "list.txt"], out, Extraction())
    assert summary.made == 2
    assert [key for key, _ in summary.failures] == ["missing.png", "a.png (2)", "b\0.png"]
    items = json.loads((out / "manifest.json").read_text())["items"]
    assert [one["key"] for one in items if "file" in one] == ["a.png", "inner/c.png"]
    assert extract(model(), [photos / "list.txt"], out, Extraction()).kept == 2


def test_frames_of_a_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(4):
            pixels = np.full((48, 64, 3), 60 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    assert extract(model(), [path], tmp_path / "out", Extraction()).made == 4


class Stages(torch.nn.Module):
    """A network of which a layer inside is taken, by a hook that each pass sets."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.last(self.first(x))


def function(x):
    return torch.nn.functional.avg_pool2d(x, 8)


@pytest.mark.parametrize("kind", ["module", "layer inside", "function"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, photos, kind):
    torch.manual_seed(0)
    if kind == "layer inside":
        network = upfeat.load_backbone(Stages(), layer="first")
    else:
        network = torch.nn.Conv2d(3, 4, 8, 8) if kind == "module" else function
    made_by = upfeat.load(network, upsampler="detail")
    for seed in range(8):
        (photos / f"more{seed}.png").write_bytes(encoded(seed, (64, 48)))
    threads = torch.get_num_threads()
    for count in (1, 4):
        extract(
            made_by, [photos], tmp_path / str(count), Extraction(), engine=Engine(workers=count)
        )
    assert tree(tmp_path / "1") == tree(tmp_path / "4")
    assert torch.get_num_threads() == threads


def test_copies_share_weights_and_nothing_else():
    made_by = model()
    first, second = replicate(made_by, 2)
    assert len({made_by.backbone, first.model.backbone, second.model.backbone}) == 3
    for one, other in zip(made_by.parameters(), second.model.parameters(), strict=True):
        assert one is other
    lite = upfeat.load(upsampler="bilinear")
    x = lite.preprocess(np.zeros((64, 48, 3), np.uint8))
    with torch.inference_mode():
        kept, expected = replicate(lite, 1)[0].model, lite(x)
        close = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
        torch.testing.assert_close(kept(x), expected, **close)
        kept(x[..., :32])  # another size in between
        torch.testing.assert_close(kept(x), expected, **close)
        assert torch.equal(kept(x), kept(x))
    assert all(
        torch.equal(one, other)
        for one, other in zip(lite.state_dict().values(), kept.state_dict().values(), strict=True)
    )
    hooked = model()
    hooked.backbone.module.register_forward_hook(lambda *_: None)
    assert replicate(hooked, 2)[1].model is hooked
    for passes in (1, 2):  # the function is inside others
        wrapping = upfeat.load(function, passes=passes)
        assert replicate(wrapping, 2)[1].model is wrapping


def test_large_maps_go_to_their_file_in_strips(tmp_path, photos, monkeypatch):
    extract(model(), [photos], tmp_path / "whole", Extraction("features", dtype="float32"))
    monkeypatch.setattr(maker, "_STRIPED", 1000)
    extract(model(), [photos], tmp_path / "strips", Extraction("features", dtype="float32"))
    for name in ("a.png", "inner/c.png"):
        whole, strips = (
            load_file(tmp_path / part / f"{name}.safetensors")["features"]
            for part in ("whole", "strips")
        )
        torch.testing.assert_close(strips, whole, rtol=0, atol=1e-5)


def test_images_that_no_bound_of_memory_fits_are_listed(tmp_path, photos, held):
    budget = Budget(5e6)
    with (
        budget.take(4e6),
        pytest.raises(ValueError, match=r"needs about 6\.0 MB"),
        budget.take(6e6),
    ):
        pass
    with pytest.raises(ValueError, match="is less than the"):
        extract(model(), [photos], tmp_path / "a", Extraction(), max_memory="1MB")
    with pytest.raises(ValueError, match='max_memory="much"'):
        extract(model(), [photos], tmp_path / "b", Extraction(), max_memory="much")
    (photos / "large.png").write_bytes(encoded(5, (1200, 1600)))
    bound = held + (50 << 20)
    summary = extract(model(), [photos], tmp_path / "c", Extraction(), max_memory=bound)
    assert summary.made == 4
    assert [key for key, _ in summary.failures] == ["large.png"]
    assert "larger max_memory" in summary.failures[0][1]


def test_what_a_killed_process_was_writing_is_swept(tmp_path, photos):
    out = tmp_path / "out"
    (out / "inner").mkdir(parents=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for folder in (out, out / "inner"):
        (folder / f".upfeat-{gone.pid}-abc.safetensors").write_bytes(b"half")
    extract(model(), [photos], out, Extraction())
    assert not list(out.rglob(".upfeat-*"))


def test_a_file_that_was_cut_short_is_made_again(tmp_path, photos):
    out = tmp_path / "out"
    extract(model(), [photos], out, Extraction())
    before = tree(out)
    (out / "b.png.safetensors").write_bytes(before[Path("b.png.safetensors")][:100])
    assert extract(model(), [photos], out, Extraction()).made == 1
    assert tree(out) == before
    item = json.loads((out / "manifest.json").read_text())["items"][1]
    content = before[Path(item["file"])]
    assert item["size"] == len(content)
    assert item["file_sha256"] == hashlib.sha256(content).hexdigest()


def test_a_full_disk_ends_the_run_in_one_line(tmp_path, photos, capsys):
    resource = pytest.importorskip("resource")
    out = tmp_path / "out"
    arguments = ["extract", str(photos), "-o", str(out), "--kind", "features"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))
    try:
        assert main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capsys.readouterr().err
    assert "File too large" in printed
    assert len(printed.splitlines()) == 1
    assert not list(out.rglob(".upfeat-*"))
    assert main(arguments) == 0
    assert re.match(r"\S+  [1-3] made, [1-3] there before, 0 failed", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "all"}, 'kind="all" must be one of lazy, features, head'),
        ({"kind": "head"}, "do not go together"),
        ({"dtype": "int8"}, "must be float16 or float32"),
        ({"size": 0}, "size=0 must be 1 or more"),
        ({"size": "224"}, "size='224' must be a whole number"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Extraction(**settings)


@pytest.mark.parametrize("kind", ["head", "features", "small"])
def test_values_beyond_float16_are_an_error_of_the_item(tmp_path, photos, kind):
    network = torch.nn.Conv2d(3, 4, 8, 8)
    torch.nn.init.constant_(network.bias, 1e6 if kind == "features" else 1)
    if kind == "small":
        kind, network = "features", torch.nn.Sequential(network, torch.nn.Threshold(1e9, 1e-7))
    made_by, head = upfeat.load(network, upsampler="detail"), None
    if kind == "head":
        backbone = describe_backbone(made_by.backbone)
        weight = torch.full((1, 4), 1e7)
        head = SavedHead(weight, torch.zeros(1), ["metres"], "values", backbone, "detail")
    photo, out = photos / "a.png", tmp_path / "out"
    ((key, reason),) = extract(made_by, [photo], out, Extraction(kind, head=head)).failures
    assert (key, "float16" in reason) == ("a.png", True)
    assert [one.name for one in out.iterdir()] == ["manifest.json"]
    wider = Extraction(kind, head=head, dtype="float32")
    assert extract(made_by, [photo], tmp_path / "wider", wider).made == 1


_CHILD = """
import sys
from upfeat.batch import Extraction, extract
sys.path.insert(0, {tests!r})
from batch.test_extract import model
extract(model(), [sys.argv[1]], sys.argv[2], Extraction())
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(60):
        (photos / f"{seed:03d}.png").write_bytes(encoded(seed, (160, 160)))
    calm, out = tmp_path / "calm", tmp_path / "out"
    extract(model(), [photos], calm, Extraction())
    generator = np.random.default_rng(0)
    code = _CHILD.format(tests=str(Path(__file__).parents[1]))
    ended = False
    for _ in range(20):
        child = subprocess.Popen([sys.executable, "-c", code, str(photos), str(out)])
        try:
            child.wait(timeout=float(generator.uniform(1, 5)))
            ended = True
            break
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
    if not ended:
        extract(model(), [photos], out, Extraction())
    assert tree(out) == tree(calm)


def test_pictures_that_we_made_are_no_photographs(tmp_path):
    photo = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    photo.save(tmp_path / "a.png")
    photo.save(tmp_path / "b.features.png")  # somebody's own
    (tmp_path / "a.features.png").write_bytes(encode_picture(photo, ".png"))
    keys = [item.key for item in list_items([tmp_path])]
    assert keys == ["a.png", "b.features.png"]
    assert [name for name, _ in find_photographs(tmp_path)] == keys
