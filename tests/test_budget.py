"""A bound of memory changes what is held at once, and no byte of the result."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import upfeat
from upfeat import run
from upfeat.cli import main
from upfeat.machine import parse_memory


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def test_a_bound_changes_no_byte(tmp_path, photo, monkeypatch, held, threads):
    """The backbone works in tiles, and the files are the same."""
    threads(1)  # several split small convolutions otherwise than large ones
    assert main(["run", str(photo), "-o", str(tmp_path / "free")]) == 0
    seen = []
    from upfeat import activations, mosaic

    tiles = mosaic._tile_within

    def note(*args, **named):
        seen.append(1)
        return tiles(*args, **named)

    monkeypatch.setattr(mosaic, "_tile_within", note)
    # Enough for tiles with their halo, not for the whole.
    working = 0.6e6 * activations.activation_bytes(upfeat.load().backbone, early=True)
    monkeypatch.setattr(run, "check_memory", lambda *args, **named: None)
    bound = held + int(working)
    arguments = ["run", str(photo), "-o", str(tmp_path / "tight"), "--max-memory", str(bound)]
    assert main(arguments) == 0
    assert seen
    for name in ("photo.safetensors", "photo.features.png"):
        assert (tmp_path / "free" / name).read_bytes() == (tmp_path / "tight" / name).read_bytes()


def test_a_bound_that_cannot_be_kept_is_refused_before_work(tmp_path, photo, capsys):
    arguments = ["run", str(photo), "-o", str(tmp_path / "out"), "--max-memory", "1MB"]
    assert main(arguments) == 2
    assert "memory are free" in capsys.readouterr().err
    assert main([*arguments[:-1], "lots"]) == 2
    assert 'max_memory="lots" must be an amount' in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_files_hold_what_the_model_gives(tmp_path, photo, dtype):
    model = upfeat.load()
    assert main(["run", str(photo), "-o", str(tmp_path), "--dtype", dtype, "--size", "150"]) == 0
    stored = load_file(tmp_path / "photo.safetensors")["features"]
    with torch.inference_mode():
        expected = model(model.preprocess(photo, 150))[0].to(stored.dtype)
    torch.testing.assert_close(stored, expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("2GB", 2 * 10**9), ("500 MiB", 500 * 2**20), ("1.5g", 15 * 10**8), (77, 77), ("3kb", 3000)],
)
def test_amounts_of_memory(text, amount):
    assert parse_memory(text) == amount


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 GBB", "0", "1e9", "nan"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match="max_memory="):
        parse_memory(text)
