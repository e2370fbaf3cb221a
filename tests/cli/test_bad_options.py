"""Options that cannot be meant: exit code 2, one line with value and fix, nothing written."""

import json
import sys

import pytest
from cli.place import write_place

from upfeat.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Every case must leave it as it is."""
    return write_place(tmp_path_factory.mktemp("place"))


def contents(folder):
    """Every file with its bytes, every folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


TINY = "--backbone mine.py:make --upsamplers nearest"
EVAL = f"eval seg data -o out {TINY} "
FIT = "fit photo.png -o o.safetensors --backbone mine.py:make "
RENDER = "render f.safetensors -o r.npy "
EXPORT = "export -o m.pt2 --backbone mine.py:make --upsampler nearest "
PROBE = "probe labelled -o h.safetensors --backbone mine.py:make --upsampler nearest "
RUN = "run photo.png -o out --backbone mine.py:make --upsampler nearest "

BAD = {
    EVAL + "--size 0": "size=0 must be 1 or more",
    EVAL + "--size 7": "size=7 must be at least the stride of mine (8)",
    EVAL + "--size 99999": "size=99999 must be 16384 or less",
    EVAL + "--size big": "--size: invalid int value: 'big'",
    EVAL + "--seeds 0": "seeds=0 must be 1 or more",
    EVAL + "--pixels 1": "pixels=1 must be 2 or more",
    EVAL + "--max-train 0": "max_train=0 must be 1 or more",
    EVAL + "--max-test -2": "max_test=-2 must be 1 or more",
    EVAL + "--split-seed -1": "split_seed=-1 must be 0 or more",
    EVAL + "--views 0": "views=0 must be 1 or more",
    EVAL + "--downsampler box box": "must name each once",
    EVAL + "--downsampler blur": "--downsampler: invalid choice: 'blur'",
    EVAL + "--protocol mine": "--protocol: invalid choice: 'mine'",
    EVAL + "--layout cityscape": "--layout: invalid choice: 'cityscape'",
    EVAL + "--layout nyuv2": "layout=nyuv2 is for the task depth, not seg",
    EVAL
    + "--layout voc": "ImageSets/Segmentation/train.txt: no such file or folder; is the layout",
    EVAL + "--device gpu9": 'device="gpu9" cannot be used',
    EVAL + "--backbone ''": '--backbone: "" is empty; leave it out',
    EVAL + "--backbone mine.py:made": 'function "made" is unknown; did you mean make',
    "eval seg data -o out --upsamplers": "--upsamplers: expected at least one argument",
    "eval seg data -o out --upsamplers bilinaer --backbone mine.py:make": "did you mean bilinear",
    "eval seg data -o out --upsamplers bilinaer@5 --backbone mine.py:make": "did you mean bilinear",
    "eval seg data -o out --upsamplers none.pth --backbone mine.py:make": "none.pth",
    "eval cam data -o out --layout voc": "layout=voc is for labelled sets; cam takes any folder",
    f"eval consistency data -o out --layout voc {TINY}": "consistency takes any folder",
    f"eval correspondence data -o out {TINY}": "data/pairs.json: no such file",
    f"eval correspondence data -o out --layout spair {TINY}": "test.txt: no such file; is the layo",
    f"eval correspondence data -o out --layout voc {TINY}": "correspondence takes folder or spair",
    f"eval propagation data -o out {TINY}": "data/images: no such file or folder; is the layout",
    f"eval propagation data -o out --layout davis {TINY}": "val.txt: no such file or folder; is",
    f"eval propagation data -o out --layout voc {TINY}": "propagation takes folder or davis",
    f"eval seg data -o out --layout davis {TINY}": "layout=davis is for the task propagation",
    f"eval seg data -o out --layout spair {TINY}": "layout=spair is for the task correspondence",
    "eval cam data -o out --backbone efficientnet_lite0": "use efficientnet_lite0.stride32",
    "eval cam empty -o out": "empty: no usable sample to test on",
    f"eval depth data -o out {TINY}": "data/train/depth: no such folder",
    f"eval seg empty -o out {TINY}": "empty/classes.json: no such file",
    f"eval seg none -o out {TINY}": "none: no such folder",
    f"eval seg photo.png -o out {TINY}": "photo.png: no such folder",
    f"eval seg data -o photo.png {TINY}": "photo.png: cannot be written",
    "eval segm data -o out": "task: invalid choice: 'segm'",
    "eval seg data": "required: -o/--output",
    "compare none": "none: no such file",
    "compare empty": "empty/results.json: no such file",
    "compare text.txt": "text.txt: not JSON",
    "compare text.txt -o table.txt": "table.txt: must end in .md, .csv or .json",
    FIT + "--size 0": "size=0 must be 1 or more",
    FIT + "--size 7": "size=7 must be 8 or more; the stride of mine is 8 pixels",
    FIT + "--views 0": "views=0 must be 1 or more",
    FIT + "--seed -1": "seed=-1 must be 0 or more",
    FIT + "--preset slow": "--preset: invalid choice: 'slow'",
    FIT + "--max-pixels 0": "max_pixels=0 must be 1 or more",
    FIT + "--max-pixels 100": "3,072 pixels, more than max_pixels=100",
    FIT + "--max-value 10 --no-guidance": "--no-guidance leaves the photograph to upfeat render",
    FIT + "--bands red": '--bands: "red" must be bands such as 4,3,2',
    FIT + "--device gpu9": 'device="gpu9" cannot be used',
    FIT + "--layer 1": "layer: not an option of the Backbone that mine.py:make makes",
    FIT + "-o new.npy": "new.npy would be a folder, named like a file; give a folder, such as new/",
    FIT + "-o photo.png/o.safetensors": "photo.png: cannot be written as a folder",
    FIT + "-o text.txt": "text.txt: cannot be written as a folder",
    "fit none.png -o new/deep/o.safetensors --backbone mine.py:make": "none.png: no such file",
    "fit empty -o out": "empty: no image file in this folder",
    "fit text.txt -o new/deep/o.safetensors --backbone mine.py:make": "text.txt: not an image",
    RENDER + "--size 10": "--size 10 must be WIDTHxHEIGHT",
    RENDER + "--size 0x4": "--size 0x4 must be WIDTHxHEIGHT",
    RENDER + "--size 4x-4": "--size 4x-4 must be WIDTHxHEIGHT",
    RENDER + "--size 99999999x99999999": "No space left on device",
    RENDER + "-o r.png --size 9999999x3": "(3, 9999999) has a side of more than",
    RENDER + "--dtype bf16": "--dtype: invalid choice: 'bf16'",
    RENDER + "--image none.png": "none.png: no such file",
    RENDER + "--image empty": "empty: is a folder",
    RENDER + "-o r": "cannot write this; use .safetensors, .npy",
    RENDER + "-o none/r.npy": "there is no folder none; make it first",
    "render photo.png -o r.npy": "photo.png: not a whole safetensors file",
    "render empty -o r.npy": "empty: no such file",
    EXPORT + "--size 10": "--size 10 must be WIDTHxHEIGHT",
    EXPORT + "--size 0x9": "--size 0x9 must be WIDTHxHEIGHT",
    EXPORT + "--size 9x7": "size=(7, 9) (height, width) must be at least 8 pixels on each side",
    EXPORT + "--size 64x64 --stride 65": "must be at least 65 pixels on each side",
    EXPORT + "--stride 0": "stride=0 must be 1 or more",
    EXPORT + "--format svg": "format='svg': unknown format; choose .onnx or .pt2",
    EXPORT + "-o m": "m: unknown format; choose .onnx or .pt2",
    EXPORT + "-o none/m.pt2": "none: no such folder; make it first",
    EXPORT + "--head ''": '--head: "" is empty; give a path',
    EXPORT + "--head none.safetensors": "none.safetensors: no such file",
    EXPORT + "--head f.safetensors": "f.safetensors: not a head",
    EXPORT + "--upsampler nearset": "did you mean nearest",
    EXPORT + "-o text.txt --format pt2": "text.txt: exists; name another file, or give --overwrite",
    EXPORT + "-o mine.py --format pt2 --overwrite": "is the input mine.py",
    PROBE + "--pixels 0": "pixels=0 must be 1 or more",
    PROBE + "--folds 1": "folds=1 must be 2 or more",
    PROBE + "--seed -1": "seed=-1 must be 0 or more",
    PROBE + f"--seed {10**30}": "seed=1000000000000000000000000000000 must be",
    PROBE + "--size 0": "size=0 must be 8 or more; the stride of mine is 8 pixels",
    PROBE + "--max-memory much": 'max_memory="much" must be an amount such as "2GB"',
    PROBE + "--bands 0,1,2": "--bands is about a raster; give its --labels, or leave it out",
    PROBE + "--scale 0,1": "--scale is about a raster",
    PROBE + "--classes a,b": "--classes is about a raster",
    PROBE + "--bands red": '--bands: "red" must be bands such as 4,3,2',
    PROBE + "--scale 3": '--scale: "3" must be two numbers such as 0,3000',
    PROBE + "--labels photo.png": "labelled: is a folder, which holds its labels; give no --labels",
    PROBE + "-o h.txt": "h.txt: must end in .safetensors",
    PROBE + "-o none/h.safetensors": "none/h.safetensors: there is no folder none; make it first",
    "probe photo.png -o h.safetensors --backbone mine.py:make": "photo.png: no such folder",
    "probe photo.png -o h.safetensors --labels text.txt --size 9": "--size is about photographs",
    "probe empty -o h.safetensors --backbone mine.py:make": "empty/classes.json: no such file",
    RUN + "-o ''": '-o/--output: "" is empty; give a path, . for this folder',
    RUN + "-o new.safetensors": "new.safetensors would be a folder, named like a file",
    RUN + "--layer 3,5": '--layer: "3,5" must be a number from 0, or a module\'s name',
    "run photo.png -o out --layer 3 blocks.3": "--layer blocks.3: layers of efficientnet_lite0 are",
    "train data -o new.pt": "new.pt would be a folder, named like a file",
    RUN + "--head ''": '--head: "" is empty; give a path',
    "video none.mp4 -o o.mp4 --report o.mp4": "--report o.mp4 is the video to write",
    "bench --quick --sizes 28:448": "--sizes: --quick chooses it; leave out one of both",
    "run '' -o out --backbone mine.py:make": 'photo: "" is empty; give a path',
    "extract '' -o out --backbone mine.py:make": 'source: "" is empty; give a path',
    "extract none -o new/deep --backbone mine.py:make": "none: no such file or folder",
    "extract data -o new --kind features --head h.safetensors": "--kind features: --head stores",
    "raster photo.png -o ''": '-o/--output: "" is empty; give a path',
    RUN + "--max-pixels 0": "max_pixels=0 must be 1 or more",
    RUN + "--max-value nan": "max_value=nan must be a number above 0",
    RUN + "--max-memory much": 'max_memory="much" must be an amount such as "2GB"',
    RUN + "--size 0": "size=0 must be 8 or more",
    RUN + "--bands 0": "bands=[0] are 1; mine takes 3",
    RUN + "-o new/deep/out --size 7": "size=7 must be 8 or more",
    RUN + "-o photo.png": "photo.png: cannot be written as a folder, it is a file",
    "bench --quick -o none/b.json": "none/b.json: there is no folder none; make it first",
    "bench --quick -o empty": "empty: exists already and is a folder",
    "bench --quick -o text.txt": "text.txt: exists already and was not made by upfeat",
    "bench --sizes 14x224": "--sizes 14x224 must be GRID:SIZE in pixels, as 14:224",
    "bench --sizes ²:224": "--sizes ²:224 must be GRID:SIZE",
    "bench --sizes 14:7": "SIZE from 8 to 16384",
    "bench --channels 0": "--channels=0 must be 1 or more",
    "bench --repeats 0": "--repeats=0 must be 1 or more",
    "bench --jobs sort": "--jobs: invalid choice: 'sort'",
    "bench --rivals --repeats 0": "--repeats=0 must be 1 or more",
    "bench --rivals --channels 3": "--channels: --rivals has its own; leave out one of both",
    "bench --rivals --quick": "--quick: --rivals has its own",
    "bench --rivals none.pth": "none.pth: no such file",
    "bench --rivals own": "own: holds joint_bilateral; give checkpoints of AnyUp, JAFAR, NAF or "
    "UPLiFT",
    "convert none.pth x.safetensors": "none.pth: no such file",
    "convert text.txt x.safetensors": "text.txt: ",
    "convert naf.pth naf.pth --overwrite": "naf.pth: is the file that is read; name another one",
    "convert naf.pth text.txt": "text.txt: exists; name another file, or give --overwrite",
    "convert naf.pth empty --overwrite": "empty: Is a directory",
    "convert naf.pth none/x.safetensors": "none/x.safetensors: No such file or directory",
    "convert naf.pth x.safetensors --sha256 abc": "sha256='abc' must be 64",
    "train data -o run --steps 0": "steps=0 must be 1 or more",
    "train data -o run --option radius": "--option radius: give NAME=VALUE, as radius=2",
    "train data -o run --option radios=2": 'option "radios" is unknown; did you mean radius',
    "train data -o run --config none.yaml": "none.yaml: no such file",
    "train data -o run --preset slow": 'preset "slow" is unknown',
    "train data -o run --layer 3": "layer: not an option of efficientnet_lite0",
    "train empty -o run": "empty: holds no photographs",
    "train -o none --resume": "none: holds no run to resume",
    "train -o run": "photos: give the folder of photographs",
    "info more": "unrecognized arguments: more",
    "nonsense": "invalid choice: 'nonsense'",
    "": "the following arguments are required: command",
}


@pytest.mark.parametrize("line", BAD)
def test_one_line_and_nothing_written(place, line, capsys, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python's copies of mine.py
    before = contents(place)
    try:
        code = main([part.strip("'") for part in line.split()])
    except SystemExit as left:
        code = left.code
    errors = capsys.readouterr().err.strip()
    assert code == 2
    assert "\n" not in errors
    assert errors.startswith("upfeat")
    assert BAD[line] in errors
    assert len(errors) < 600
    assert contents(place) == before


def test_every_command_has_bad_options_here():
    """But for those whose options are tested in rooms of their own."""
    from upfeat.cli.main import COMMANDS

    elsewhere = {"extract", "raster", "video", "demo"}
    assert {line.split()[0] for line in BAD if line} >= set(COMMANDS) - elsewhere


def test_names_on_the_command_line_are_read_in_no_locale(tmp_path):
    """``--help`` reads the source, in UTF-8, whatever the system writes in."""
    import subprocess
    import sys

    code = "from upfeat.cli import main; main(['eval', '--help'])"
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-c", code],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_was_there_stays(place, tmp_path, capsys):
    """It is taken away again where the command made it, and nothing came of it."""
    photo, mine = place / "photo.png", f"{place}/mine.py:make"
    for out, made in ((tmp_path / "new" / "out", True), (tmp_path, False)):
        arguments = ["run", str(photo), "-o", str(out), "--backbone", mine, "--size", "1"]
        assert main(arguments) == 2
        assert out.exists() != made
        assert list(tmp_path.iterdir()) == []
    arguments[-1] = "16"
    assert main(["run", str(photo), "text", *arguments[2:]]) == 2  # one of two
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "photo.features.png",
        "photo.safetensors",
    ]
    assert "1 of 2 photographs failed" in capsys.readouterr().err


def test_settings_of_train_files_may_have_a_byte_order_mark(tmp_path, capsys):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"steps": 0}), encoding="utf-8-sig")
    assert main(["train", "photos", "-o", str(tmp_path / "run"), "--config", str(path)]) == 2
    assert "steps=0 must be 1 or more" in capsys.readouterr().err
