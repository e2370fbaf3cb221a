"""``upfeat convert``: one line of what was found, one line on what is wrong."""

import torch
from published_reference import published_state

import upfeat
from upfeat.cli.main import main


def test_converts_and_says_what_it_found(tmp_path, capsys):
    source, target = tmp_path / "x.pth", tmp_path / "x.safetensors"
    torch.save(published_state(upfeat.NAF()), source)
    assert main(["convert", str(source), str(target)]) == 0
    assert "NAF (layout of valeoai/NAF" in capsys.readouterr().out
    assert upfeat.load_upsampler(target).name == "naf"
    assert main(["convert", str(source), str(target)]) == 2
    assert "exists; name another file" in capsys.readouterr().err
    assert main(["convert", str(source), str(target), "--overwrite"]) == 0


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    target = tmp_path / "out.safetensors"
    for name in ("x.pth", "none.pth"):
        assert main(["convert", str(tmp_path / name), str(target)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert name in error
    assert not target.exists()


def test_remains_of_a_killed_conversion_are_removed(tmp_path):
    source = tmp_path / "x.pth"
    torch.save(published_state(upfeat.NAF()), source)
    (tmp_path / ".upfeat-4000000000-abcdefgh.safetensors").write_bytes(b"half")
    assert main(["convert", str(source), str(tmp_path / "x.safetensors")]) == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x.pth", "x.safetensors"]
