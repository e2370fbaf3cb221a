"""``upfeat bench --rivals``: the plain forms equal ours, and the table is written."""

import json

import pytest
import torch

import upfeat
from upfeat import rivals
from upfeat.cli.main import main


@pytest.mark.parametrize(
    "make",
    [
        lambda: upfeat.AnyUp(width=16, heads=2),
        lambda: upfeat.JAFAR(8, width=16, heads=2),
        lambda: upfeat.NAF(width=32, heads=2, window_side=3),
        lambda: upfeat.UPLiFT(8, encoder_widths=(4, 6, 8), width=18),
    ],
)
@torch.no_grad()
def test_plain_forms_equal_ours(make):
    torch.manual_seed(0)
    upsampler = make().eval()
    features, image = torch.randn(1, 8, 5, 4), torch.randn(1, 3, 30, 26)
    expected = upsampler(features, image)
    found = rivals.plain(upsampler, features, image, (30, 26))
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    rivals.floor(upsampler, 10, 2)


def test_table_and_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rivals, "SETTINGS", (("anyup", 4, 32), ("naf", 3, 24), ("uplift", 2, 20)))
    target = tmp_path / "rivals.json"
    assert main(["bench", "--rivals", "--repeats", "1", "-o", str(target)]) == 0
    assert "anyup" in capsys.readouterr().out
    rows = json.loads(target.read_text())["rows"]
    assert [row["way"] for row in rows[:4]] == ["ours", "high", "plain", "floor"]
    assert all(row["seconds"] > 0 for row in rows)
    assert main(["bench", "--rivals", str(tmp_path / "none.pth")]) == 2
    assert "no such file" in capsys.readouterr().err
