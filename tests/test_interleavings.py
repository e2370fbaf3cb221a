"""Writers, sweepers and killed processes in any order: one writer at a time, files whole."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from upfeat import locks, storage

fcntl = pytest.importorskip("fcntl")

WRITERS = st.integers(0, 2)
NAMES = st.sampled_from(["a.npy", "b.safetensors", "folder"])


def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


GONE = gone()


class Locks(RuleBasedStateMachine):
    """Writers that hold and let go of outputs; some are killed, and their files stay."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "folder").mkdir()
        self.holds = {}  # by output: what ends it
        self.left = set()  # lock files of killed writers

    def teardown(self):
        for end in self.holds.values():
            end()
        shutil.rmtree(self.folder)

    @rule(name=NAMES)
    def begin(self, name):
        context = locks.hold(self.folder / name)
        if name in self.holds:
            with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on"):
                context.__enter__()
            return
        context.__enter__()
        self.holds[name] = lambda: context.__exit__(None, None, None)
        self.left.discard(name)

    @rule(name=NAMES)
    def end(self, name):
        if name in self.holds:
            self.holds.pop(name)()

    @rule(name=NAMES)
    def begin_and_be_killed(self, name):
        """The system closes what a killed process held; its file still says who it was."""
        output = self.folder / name
        if name not in self.holds:
            os.close(locks._take(locks.lock_file(output), output))
            self.left.add(name)

    @invariant()
    def files_are_those_of_holders_and_of_the_killed(self):
        found = {name for name in ("a.npy", "b.safetensors", "folder")
                 if locks.lock_file(self.folder / name).exists()}  # fmt: skip
        assert found == set(self.holds) | self.left


class Files(RuleBasedStateMachine):
    """Files and folders that are written, given up, left by killed writers, and swept."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.open = {}  # by writer: the path, what it gets, and the context
        self.whole = {}  # by path: what was written last
        self.left, self.count = set(), 0

    def teardown(self):
        for _, _, context in self.open.values():
            context.__exit__(KeyError, KeyError(), None)
        shutil.rmtree(self.folder)

    @rule(writer=WRITERS, name=NAMES)
    def begin(self, writer, name):
        if writer in self.open:
            return
        path = self.folder / name
        replacing = storage.replacing_folder if name == "folder" else storage.replacing
        context = replacing(path)
        temporary = context.__enter__()
        self.count += 1
        inside = temporary / "part" if name == "folder" else temporary
        inside.parent.mkdir(exist_ok=True)
        inside.write_text(str(self.count))
        self.open[writer] = path, str(self.count), context

    @rule(writer=WRITERS, fails=st.booleans())
    def end(self, writer, fails):
        if writer not in self.open:
            return
        path, content, context = self.open.pop(writer)
        if fails:
            error = KeyError()
            assert not context.__exit__(KeyError, error, None)
        else:
            context.__exit__(None, None, None)
            self.whole[path] = content

    @rule(old=st.booleans(), folder=st.booleans())
    def be_killed(self, old, folder):
        """What a killed process leaves; one that has just made it may not have locked it yet."""
        self.count += 1
        pid = GONE if old else os.getpid()
        path = self.folder / f".upfeat-{pid}-x{self.count}"
        if folder:
            path.mkdir()
            (path / "new").write_text("half")
        else:
            path.write_text("half")
        self.left.add(path)

    @precondition(lambda self: self.left)
    @rule()
    def sweep(self):
        storage.sweep(self.folder)
        self.left = {path for path in self.left if f"-{GONE}-" not in path.name}

    @invariant()
    def files_are_whole_and_nothing_else_is_there(self):
        for path, content in self.whole.items():
            assert (path / "part" if path.name == "folder" else path).read_text() == content
        found = set(self.folder.iterdir())
        assert set(self.whole) | self.left <= found
        assert len(found) == len(self.whole) + len(self.left) + len(self.open)


for machine in (Locks, Files):
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
test_locks, test_files = Locks.TestCase, Files.TestCase
