"""What every command has in common: exit codes, errors of one line, notes."""

import re
import warnings

import pytest
import torch

from upfeat import benchmark
from upfeat.cli import info, main
from upfeat.cli.console import progress_bar


@pytest.fixture
def fail(monkeypatch):
    """Let ``upfeat info`` raise."""

    def set_error(error):
        def execute(options):
            raise error

        monkeypatch.setattr(info, "execute", execute)

    return set_error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\nlines"), "upfeat info: error: two lines"),
        (FileNotFoundError(2, "No such file", "a.png"), "upfeat info: error: a.png: No such file"),
        (PermissionError(13, "Permission denied"), "upfeat info: error: Permission denied"),
        (MemoryError(), "upfeat info: error: not enough memory; give a smaller size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "2.00 GiB"),
        (EOFError(), "upfeat info: error: EOFError"),
    ],
)
def test_errors_of_users_are_one_line(fail, capsys, error, line):
    fail(error)
    assert main(["info"]) == 2
    shown = capsys.readouterr()
    assert line in shown.err
    assert (shown.err.count("\n"), shown.out) == (1, "")


@pytest.mark.parametrize("error", [RuntimeError("a fault"), TypeError("x"), KeyError("name")])
def test_faults_of_the_program_keep_their_trace(fail, error):
    fail(error)
    with pytest.raises(type(error)):
        main(["info"])


def test_interrupts_have_the_code_of_shells(fail, capsys):
    fail(KeyboardInterrupt())
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "upfeat info: interrupted\n"


@pytest.mark.filterwarnings("default")
def test_warnings_are_notes_of_one_line(monkeypatch, capsys):
    def execute(options):
        warnings.warn("something\nis odd", stacklevel=1)
        return 0

    before = warnings.showwarning
    monkeypatch.setattr(info, "execute", execute)
    assert main(["info"]) == 0
    assert capsys.readouterr().err == "upfeat: note: something is odd\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize("line", [["--version"], ["--help"], ["run", "--help"]])
def test_questions_are_answered_with_code_0(line, capsys):
    with pytest.raises(SystemExit) as left:
        main(line)
    assert left.value.code == 0
    assert capsys.readouterr().out.strip()


def test_what_bench_leaves_out_has_a_row_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "_needed_bytes", lambda *job: 1 << 34)
    arguments = ["--sizes", "1:8", "--channels", "1", "--jobs", "operator", "--repeats", "1"]
    assert main(["bench", *arguments]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("operator")]
    assert len(rows) == len(benchmark.RIVALS)
    assert all("—  needs about 16" in row for row in rows)


@pytest.mark.parametrize("name", ["x[/b].png", "[bold]photo.png", "plain.png"])
def test_progress_shows_names_as_they_are(name, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar(keep=True) as progress:
        progress.add_task(name, total=1)
        progress.refresh()
    assert name in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
