"""The benchmark runs, its rivals compute the same numbers, and its output is complete."""

import json

import pytest
import torch
from small_upsamplers import stack_of

from upfeat import benchmark
from upfeat.cli import bench as command
from upfeat.cli import main


def test_rivals_compute_the_same():
    torch.manual_seed(0)
    features, guidance = torch.randn(1, 5, 3, 3), torch.randn(1, 3, 48, 48)
    stack = stack_of(5).eval().requires_grad_(False)
    expected = benchmark._stack(stack, features, guidance, "ours")
    for rival in ("tap_major", "pixel_major", "unfold"):
        out = benchmark._stack(stack, features, guidance, rival)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_command_writes_every_measurement(tmp_path, capsys):
    path = tmp_path / "bench.json"
    arguments = ["--sizes", "4:32", "--channels", "3", "--repeats", "1", "-o", str(path)]
    assert main(["bench", *arguments]) == 0
    found = json.loads(path.read_text())
    assert {"cpu", "torch", "threads", "kernels"} <= set(found["machine"])
    assert len(found["measurements"]) == 3 * len(benchmark.RIVALS)
    assert all(one["seconds"] > 0 for one in found["measurements"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("of ours", "operator+backward", *benchmark.RIVALS))


def test_a_terminal_of_eighty_columns_breaks_no_names(monkeypatch, capsys):
    monkeypatch.setattr(command, "_width", lambda: 80)
    arguments = ["--sizes", "4:32", "--channels", "3", "--repeats", "1"]
    assert main(["bench", *arguments, "--jobs", "operator+backward"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "16→32" in line]
    assert [row.split()[0] for row in rows] == ["operator+backward"] * len(benchmark.RIVALS)


def test_memory_counts_pages_of_the_systems_size(monkeypatch):
    """Which is 16 or 64 KiB on many ARM64 systems."""
    statm = iter(["0 100 0", "0 107 0"])
    monkeypatch.setattr(benchmark.Path, "is_file", lambda path: True)
    monkeypatch.setattr(benchmark.Path, "read_text", lambda path: next(statm, "0 107 0"))
    monkeypatch.setattr(benchmark.os, "sysconf", lambda name: 65536, raising=False)
    assert benchmark.peak_memory(lambda: None) == 7 * 65536


def test_what_does_not_fit_is_left_out():
    (found,) = benchmark.run_benchmark(
        sizes=((64, 1024),), channels=(1024,), jobs=("stack",), rivals=("unfold",)
    )
    assert found.seconds is None
    assert "GiB" in found.skipped


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sizes", "14x224"],
        ["--sizes", "²:224"],
        ["--sizes", "14:99999999"],
        ["--repeats", "0"],
        ["--repeats", "9999999"],
        ["--repeats", "9999999", "--rivals"],
        ["--channels", "64", "99999999"],
    ],
)
def test_bad_options_are_one_line(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
