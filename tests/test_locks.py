"""One writer at a time, however the one before ended."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from PIL import Image

from upfeat import locks
from upfeat.cli.main import main

HOLDER = """
import sys, time
from upfeat import locks
with locks.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_holds_it(holder, tmp_path):
    with pytest.raises(ValueError) as refused, locks.hold(tmp_path):
        pass
    message = str(refused.value)
    assert f"process {holder.pid} on {socket.gethostname()} since 20" in message
    assert str(tmp_path) in message
    assert "\n" not in message


def test_a_killed_holder_locks_nothing(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").is_file()
    with locks.hold(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("by_system", [True, False])
def test_threads_exclude_each_other(tmp_path, monkeypatch, by_system):
    if not by_system:
        monkeypatch.setattr(locks, "_lock", lambda handle: None)
    told = []

    def other():
        try:
            with locks.hold(tmp_path / "x.safetensors"):
                told.append("held")
        except ValueError as error:
            told.append(str(error))

    with locks.hold(tmp_path / "x.safetensors"), locks.hold(tmp_path / "y.safetensors"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other()
    assert f"process {os.getpid()}" in told[0]
    assert told[1] == "held"
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_lets_go(tmp_path):
    with pytest.raises(KeyError), locks.hold(tmp_path):
        raise KeyError
    with locks.hold(tmp_path):
        pass


@pytest.mark.parametrize("written", [0, -1])
def test_a_full_disk_leaves_no_lock_file(tmp_path, monkeypatch, written):
    def full(handle, content):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device") as failed, locks.hold(tmp_path):
        pass
    assert failed.value.filename == str(tmp_path / ".lock")
    assert list(tmp_path.iterdir()) == []
    refused = pytest.raises(ValueError, match=r"new: cannot be written \(No space left")
    with refused, locks.hold_folder(tmp_path / "new"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_holds_nothing(tmp_path):
    read, write = os.pipe()
    with locks.hold(tmp_path):
        child = os.fork()
        if not child:
            os.read(read, 1)  # outlives the holder
            os._exit(0)
        handles = set(locks._held)
    try:
        for handle in handles:
            with pytest.raises(OSError):
                os.fstat(handle)
        with locks.hold(tmp_path):
            pass
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        # Windows cannot be asked whether a process lives.
        (
            {"pid": 4_000_000_000, "host": socket.gethostname(), "since": "then"},
            os.name == "nt",
        ),
        ({"pid": os.getpid(), "host": socket.gethostname(), "since": "then"}, True),
        ({"pid": 1, "host": "elsewhere", "since": "then"}, True),
        ({"pid": True}, False),
        (None, False),
    ],
)
def test_without_locks_of_the_system_the_writer_must_live(tmp_path, monkeypatch, content, refused):
    monkeypatch.setattr(locks, "_lock", lambda handle: None)
    path = tmp_path / ".lock"
    path.write_text("" if content is None else json.dumps(content))
    if refused:
        with pytest.raises(ValueError, match="being written by"), locks.hold(tmp_path):
            pass
        assert path.is_file()
    else:
        with locks.hold(tmp_path):
            pass
        assert not path.exists()


@pytest.mark.parametrize("content", ["precious\n", "[]", "4711"])
@pytest.mark.parametrize("linked", [True, False])
def test_only_own_lock_files_are_written_and_removed(tmp_path, content, linked):
    """A folder of a stranger may contain a link to a file of the user under the lock's name."""
    folder = tmp_path / "results"
    folder.mkdir()
    lock = folder / ".lock"
    precious = tmp_path / "precious" if linked else lock
    precious.write_text(content)
    if linked:
        lock.symlink_to(precious)
    told = r"\.lock: is no lock file of upfeat; remove it"
    with pytest.raises(ValueError, match=told), locks.hold(folder):
        pass
    assert precious.read_text() == content
    assert lock.is_symlink() == linked
    precious.unlink()
    if linked:  # nor is a file made behind a link
        with pytest.raises(ValueError, match="is no lock file"), locks.hold(folder):
            pass
        assert not precious.exists()


def test_a_fit_and_an_evaluation_hold_what_they_write(holder, tmp_path, capsys):
    """The command says who writes there, in one line, and touches nothing."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (48, 48)).save(photo)
    assert main(["eval", "consistency", str(tmp_path), "-o", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert f"is being written by process {holder.pid} on " in shown
    assert shown.count("\n") == 1
    output = tmp_path / "fit.safetensors"
    with locks.hold(output):
        assert main(["fit", str(photo), "-o", str(output), "--views", "2", "--no-picture"]) == 2
    shown = capsys.readouterr().err
    assert f"is being written by process {os.getpid()} on " in shown
    assert shown.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "photo.png"]
