"""The same input gives the same files, byte for byte, in every process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PHOTO = Path(__file__).parents[1] / "examples" / "photos" / "cat.jpg"
# All that writes files, in one process each time; the seed of hashes orders sets and dictionaries
# of libraries.
WRITE_ALL = """
import warnings
warnings.simplefilter("ignore")
import upfeat
from upfeat.cli import main

def command(line):
    assert main(line.split()) == 0, line

command("run photo.png -o out")
command("run photo.png -o small --size 40 --upsampler jbu_stack --dtype fp32")
command("fit photo.png -o out/fitted.safetensors --views 2 --size 32")
for suffix in ("npy", "safetensors", "png", "jpg"):
    command(f"render out/fitted.safetensors --size 70x50 -o out/rendered.{suffix}")
command(
    "train photos -o run --steps 4 --batch-size 1 --views 1 --size 32 --checkpoint-every 2 "
    "--validation-images 1 --validate-every 2 --projection-dim 2"
)
model = upfeat.load()
x = model.preprocess("photo.png")
model.lazy(x).save("out/lazy.safetensors")
model.lazy(x).save("out/exact.safetensors", exact=True)
model.upsampler.save_pretrained("out/upsampler")
implicit = upfeat.fit_implicit("photo.png", model.backbone, size=32, views=2)
implicit.save("out/implicit.safetensors")
"""


def write_all(folder, seed):
    (folder / "photos").mkdir(parents=True)
    photo = Image.open(PHOTO)
    photo.resize((61, 47)).save(folder / "photo.png")
    for index in range(3):
        photo.crop((40 * index, 0, 40 * index + 160, 120)).resize((64, 48)).save(
            folder / "photos" / f"{index}.png"
        )
    subprocess.run(
        [sys.executable, "-c", WRITE_ALL],
        cwd=folder,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": seed},
    )
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_the_same_files_in_two_processes(tmp_path):
    folder = tmp_path / "one"
    first = write_all(folder, "1")
    # In the same place, which a run of training notes down.
    folder.rename(tmp_path / "other")
    second = write_all(folder, "2")
    assert first.keys() == second.keys()
    assert len(first) > 20
    assert [name for name in first if first[name] != second[name]] == []
