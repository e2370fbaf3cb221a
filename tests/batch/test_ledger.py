"""The ledger tells the truth about the files, wherever a run was cut off."""

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from upfeat.batch.ledger import LEDGER, MANIFEST, Ledger


class Runs(RuleBasedStateMachine):
    """Runs that end, or are killed at any step, over sources and settings that change.

    A file holds what it was made of: the version of its source, and the settings.
    """

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())

    def teardown(self):
        shutil.rmtree(self.folder)

    @rule(
        versions=st.tuples(*[st.integers(0, 1)] * 3),
        size=st.integers(1, 2),
        overwrite=st.booleans(),
        last=st.none() | st.integers(0, 8),
        cut=st.integers(0, 30),
    )
    def run(self, versions, size, overwrite, last, cut):
        """Do all steps, or those before the last one; an item has three: begun, made, recorded."""
        try:
            ledger = Ledger(self.folder, {"size": size}, overwrite=overwrite)
        except ValueError:  # of other settings
            assert not overwrite
            return
        steps = []
        for key, version in zip("abc", versions, strict=True):
            entry, made_of = {"key": key, "version": version, "file": key}, f"{version} {size}"
            if ledger.entries.get(key) != entry:
                steps += [partial(ledger.begin, key)]
                steps += [partial((self.folder / key).write_text, made_of)]
                steps += [partial(ledger.record, entry)]
        taken = steps[:last]
        for step in taken:
            step()
        if last is not None:  # killed, perhaps while it wrote a line
            self._kill(ledger, 0 if len(taken) % 3 == 2 else cut)
            return
        ledger.finish()
        found = json.loads((self.folder / MANIFEST).read_text())
        assert [(one["key"], one["version"]) for one in found["items"]] == list(
            zip("abc", versions, strict=True)
        )
        assert not (self.folder / LEDGER).exists()

    def _kill(self, ledger, cut):
        """End without finishing, so many bytes of the last line lost."""
        ledger.close()
        path = self.folder / LEDGER
        if path.is_file():
            content = path.read_bytes()
            last = content.rstrip(b"\n").rfind(b"\n") + 1
            if last:  # the first line was written whole or not at all
                path.write_bytes(content[: max(last, len(content) - cut)])

    @invariant()
    def what_is_recorded_is_there(self):
        for size in (1, 2):
            try:
                ledger = Ledger(self.folder, {"size": size})
            except ValueError:
                continue
            for key, entry in ledger.entries.items():
                if "file" in entry:
                    assert (self.folder / key).read_text() == f"{entry['version']} {size}"


Runs.TestCase.settings = settings(max_examples=30, stateful_step_count=8, deadline=None)
test_runs = Runs.TestCase


def test_a_run_that_overwrites_goes_on_without_the_word_again(tmp_path):
    Ledger(tmp_path, {"size": 1}).finish()
    first = Ledger(tmp_path, {"size": 2}, overwrite=True)
    first.begin("a")
    first.record({"key": "a"})
    first.close()  # killed here
    assert list(Ledger(tmp_path, {"size": 2}).entries) == ["a"]
    with pytest.raises(ValueError, match="made with another size; give another folder, or --over"):
        Ledger(tmp_path, {"size": 1})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (MANIFEST, b"\xff", "manifest.json: not JSON"),
        (MANIFEST, b"[" * 100_000, "manifest.json: not JSON"),
        (MANIFEST, b"[]", "not a record of upfeat extract"),
        (MANIFEST, b"{}", "not a record of upfeat extract"),
        (MANIFEST, b'{"settings": {}, "items": 3}', "an item has no key"),
        (MANIFEST, b'{"settings": {}, "items": [{"key": 3}]}', "an item has no key"),
        (MANIFEST, b'{"settings": {}, "items": [{"key": "a", "size": "9"}]}', "no size in bytes"),
        (MANIFEST, b'{"settings": {}, "items": [{"key": "a", "size": null}]}', "no size in bytes"),
        (LEDGER, b"{}\n", "ledger.jsonl: not a record of upfeat extract"),
        (LEDGER, b'{"settings": {}}\nx\n', "ledger.jsonl: not JSON"),
        (LEDGER, b'{"settings": {}}\n{"file": "a"}\n', "ledger.jsonl: damaged: an item has no key"),
        (LEDGER, b'{"settings": {"size": 1}}\n', "made with another size"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as refused:
        Ledger(tmp_path, {})
    assert words in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"settings": {"si'])
def test_a_ledger_without_a_whole_line_is_begun_anew(tmp_path, content):
    (tmp_path / LEDGER).write_bytes(content)
    ledger = Ledger(tmp_path, {})
    ledger.record({"key": "ü"})
    ledger.finish()
    assert list(Ledger(tmp_path, {}).entries) == ["ü"]
