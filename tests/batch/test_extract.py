"""Every item once, whatever happens in between; bad ones are listed with their reasons."""

import io
import json
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
from upfeat.batch import Extraction, extract
from upfeat.batch.extract import read_extracted
from upfeat.cli import main
from upfeat.heads import SavedHead, describe_backbone


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
    (photos / "list.txt").write_text("# two\na.png\n\ninner/c.png\nmissing.png\na.png\n")
    summary = extract(model(), [photos / "list.txt"], tmp_path / "out", Extraction())
    assert summary.made == 2
    assert [key for key, _ in summary.failures] == ["missing.png", "a.png"]


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


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match='kind="all"'):
        Extraction("all")
    with pytest.raises(ValueError, match="do not go together"):
        Extraction("head")


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
