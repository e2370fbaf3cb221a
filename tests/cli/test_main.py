"""What every command has in common: exit codes, errors of one line, notes."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings

import numpy
import pytest
import torch

from upfeat import benchmark
from upfeat.cli import info, main
from upfeat.cli.console import note, progress_bar
from upfeat.cli.streams import say


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


def test_warnings_of_logs_are_notes_unless_the_caller_handles_them(monkeypatch, capsys):
    def execute(options):
        record = logging.makeLogRecord({"msg": "%s\nis odd", "args": ("x\x1b",), "levelno": 30})
        logging.lastResort.handle(record)  # as logging does where nobody handles records
        return 0

    before = logging.lastResort
    monkeypatch.setattr(info, "execute", execute)
    assert main(["info"]) == 0
    assert capsys.readouterr().err == "upfeat: note: x\\x1b is odd\n"
    assert logging.lastResort is before


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


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_printed_beside_a_bar_are_whole_and_go_where_output_goes(
    terminal, monkeypatch, capsys
):
    """Into a file, even if the bar is on a terminal; on a terminal, long paths are not broken."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    line = "folder/" + 30 * "long" + ".safetensors"
    with progress_bar() as progress:
        progress.add_task(30 * "name", total=1)
        print(line)
    out, err = capsys.readouterr()
    assert line in (err if terminal else out)
    assert (line in err) == terminal


def test_info_breaks_no_line_and_counts_one_thread(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith(", 1 thread") for line in lines)
    assert f"numpy {numpy.__version__}" in " ".join(lines)
    assert f"{'':12}efficientnet_lite0.stride8+16+32" in lines
    assert all(line == line.rstrip() for line in lines)


def test_output_that_nobody_reads_to_its_end_is_no_error():
    """As in ``upfeat info | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from upfeat.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*command, "info"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    "line",
    [
        "bench --quick -o {}/b.json",
        "export -o {}/m.pt2",
        "probe {} -o {}/h.safetensors",
        "render none.safetensors -o {}/p.png",
        "video none.mp4 -o {}/v.mp4",
    ],
)
def test_folders_that_cannot_be_written_are_refused_before_the_work(
    line, tmp_path, monkeypatch, capsys
):
    def refuse(**options):
        raise OSError(errno.EROFS, "Read-only file system", "temporary")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)  # root may write everywhere
    assert main(line.format(*[tmp_path] * line.count("{}")).split()) == 2
    assert re.search(r"[bmhpv]\.\w+: Read-only file system\n$", capsys.readouterr().err)


ESCAPED = "a\\x1b[2K\\x9b\\r\\n\\u202ebé×.png"


@pytest.mark.parametrize("ended", [True, False])
def test_terminals_obey_no_names(capsys, fail, ended):
    """Control characters of names, also of those in archives, are shown and not sent."""
    name = "a\x1b[2K\x9b\r\n\u202ebé×.png"
    if ended:
        fail(FileNotFoundError(2, "No such file", name))
        assert main(["info"]) == 2
        assert capsys.readouterr().err == f"upfeat info: error: {ESCAPED}: No such file\n"
    else:
        note("run", name)
        say(name)
        shown = capsys.readouterr()
        assert shown.err == f"upfeat run: note: {ESCAPED}\n"
        assert shown.out == f"{ESCAPED}\n"


def test_bars_obey_no_names(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar(keep=True) as progress:
        progress.add_task("a\x1b]0;title\x07[b].png", total=1)
        progress.refresh()
    written = capsys.readouterr().err
    assert "a\\x1b]0;title\\x07[b].png" in written
    assert "\x1b]0" not in written


SIGNALLED = """
import os, signal, sys
from upfeat.cli import info, main
from upfeat.storage import replacing
def execute(options):
    with replacing(__import__("pathlib").Path(sys.argv[2])):
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])
        signal.pause()
info.execute = execute
sys.exit(main(["info"]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_that_end_a_command_leave_no_remains(name, code, tmp_path):
    """As those of Ctrl-C, ``timeout`` and ``docker stop``, and of a terminal that is closed."""
    command = [sys.executable, "-c", SIGNALLED, name, str(tmp_path / "result.png")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        # A test run in the background ignores these.
        preexec_fn=lambda: [
            signal.signal(one, signal.SIG_DFL)
            for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ],
    )
    assert (done.returncode, done.stderr) == (code, "upfeat info: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP on this system")
def test_signals_that_are_ignored_stay_so_and_others_are_as_before(monkeypatch):
    """``nohup`` ignores SIGHUP."""
    found = []
    monkeypatch.setattr(
        info, "execute", lambda options: found.append(signal.getsignal(signal.SIGHUP)) or 0
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["info"]) == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert main(["info"]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found[0] is signal.SIG_IGN
    assert callable(found[1])


def test_an_interrupt_before_the_command_is_known_is_one_line(monkeypatch, capsys):
    module = sys.modules["upfeat.cli.main"]

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "build_parser", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "upfeat: interrupted\n"
