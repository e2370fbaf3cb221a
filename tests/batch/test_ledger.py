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
            writing = bool(taken) and len(taken) % 3 != 2  # lines of earlier runs are whole
            self._kill(ledger, cut if writing else 0)
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


SETTINGS = {"kind": "lazy", "size": None}


def _filled(folder, count=3):
    ledger = Ledger(folder, SETTINGS)
    for index in range(count):
        ledger.record({"key": f"{index}.png", "bytes": 10 + index})
    return ledger


def test_a_ledger_cut_off_anywhere_holds_its_whole_lines(tmp_path):
    _filled(tmp_path).close()
    content = (tmp_path / LEDGER).read_bytes()
    for cut in range(len(content) + 1):
        (tmp_path / LEDGER).write_bytes(content[:cut])
        lines = content[:cut].count(b"\n")
        keys = [f"{index}.png" for index in range(max(lines - 1, 0))]
        assert list(Ledger(tmp_path, SETTINGS).entries) == keys


def test_a_record_goes_on_from_manifest_and_ledger(tmp_path):
    _filled(tmp_path, 2).finish()
    assert not (tmp_path / LEDGER).exists()
    again = Ledger(tmp_path, SETTINGS)
    again.record({"key": "a.png", "bytes": 1})
    again.record({"key": "0.png", "bytes": 99})
    again.close()
    found = Ledger(tmp_path, SETTINGS).entries
    assert {key: one["bytes"] for key, one in found.items()} == {
        "0.png": 99,
        "1.png": 11,
        "a.png": 1,
    }


@pytest.mark.parametrize("file", [MANIFEST, LEDGER])
@pytest.mark.parametrize(
    "content",
    [
        b"[1]\n",
        b"nonsense\n",
        b"\xff\xfe\n",
        b"{}\n",
        b'{"settings": 3}\n',
        b"[" * 100_000 + b"\n",
    ],
    ids=lambda content: repr(content[:9]),
)
def test_records_of_others_are_refused_by_their_name(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}: not (JSON|a record of upfeat extract)"):
        Ledger(tmp_path, SETTINGS)
    assert (tmp_path / file).read_bytes() == content
    Ledger(tmp_path, SETTINGS, overwrite=True)  # which does not look at it


@pytest.mark.parametrize("items", [{"a": 1}, ["a"], [{"bytes": 1}], [{"key": 3}], None, 3])
def test_items_without_a_key_are_damage(tmp_path, items):
    content = {"settings": SETTINGS, "items": items}
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json: damaged: an item has no key"):
        Ledger(tmp_path, SETTINGS)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / LEDGER).write_text(f'{json.dumps({"settings": SETTINGS})}\n{{"a": 1}}\n')
    with pytest.raises(ValueError, match=r"ledger\.jsonl: damaged: an item has no key"):
        Ledger(tmp_path, SETTINGS)


def test_other_settings_are_named(tmp_path):
    _filled(tmp_path).finish()
    with pytest.raises(ValueError, match="holds features made with another kind, size; give"):
        Ledger(tmp_path, {"kind": "features", "size": 224})


@pytest.mark.parametrize("size", ["9", None, 9.5, [9]])
def test_sizes_that_are_none_are_damage(tmp_path, size):
    content = {"settings": SETTINGS, "items": [{"key": "a.png", "size": size}]}
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json: damaged: .* no size in bytes"):
        Ledger(tmp_path, SETTINGS)


@pytest.mark.parametrize("content", [b"", b'{"settings": {"si'])
def test_a_ledger_without_a_whole_line_is_begun_anew(tmp_path, content):
    (tmp_path / LEDGER).write_bytes(content)
    ledger = Ledger(tmp_path, {})
    ledger.record({"key": "ü"})
    ledger.finish()
    assert list(Ledger(tmp_path, {}).entries) == ["ü"]
