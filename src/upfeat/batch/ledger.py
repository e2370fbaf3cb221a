"""Record of a set's finished items: a ledger while a run lasts, a sorted manifest at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from upfeat.storage import write_bytes

FORMAT = "upfeat-extract-1"
MANIFEST, LEDGER = "manifest.json", "ledger.jsonl"


class Ledger:
    """Record of one output folder.

    An item is recorded after its file is written, and an old entry is deleted before its file is
    changed. A file that is recorded was therefore written completely, and an item that was
    interrupted is done again, with the same result. An item that failed is recorded with the reason
    and without a file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        """Open a folder's record, or begin one.

        Args:
            folder: output folder; made if it does not exist.
            settings: everything but the items that determines results, as JSON values.
            overwrite: ignore an existing record, whatever its settings.

        Raises:
            ValueError: the folder's record was begun with other settings, is damaged, or is
                not a record of this library.
            OSError: the folder cannot be written.
        """
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        folder.mkdir(parents=True, exist_ok=True)
        self.entries: dict[str, dict[str, Any]] = {}
        # A file that was changed later is not the one that was recorded.
        self.recorded_ns = max(_changed_ns(folder / name) for name in (MANIFEST, LEDGER))
        self._file: TextIO | None = None
        self._overwrite = overwrite
        if overwrite:
            return
        for line in self._lines():
            self.entries[line["key"]] = line

    def _lines(self) -> list[dict[str, Any]]:
        """Read the entries of manifest and ledger, and check their settings."""
        lines: list[dict[str, Any]] = []
        manifest = self.folder / MANIFEST
        if manifest.is_file():
            content = _parse(manifest.read_bytes(), manifest)
            self._check(content.get("settings"), manifest)
            lines += _entries(content.get("items", []), manifest)
        ledger = self.folder / LEDGER
        if ledger.is_file():
            whole = [x for x in ledger.read_bytes().splitlines(keepends=True) if x.endswith(b"\n")]
            if whole:
                self._check(_parse(whole[0], ledger).get("settings"), ledger)
                lines += _entries([_parse(line, ledger) for line in whole[1:]], ledger)
        return lines

    def _check(self, before: Any, path: Path) -> None:
        if not isinstance(before, dict):
            raise ValueError(f"{path}: not a record of upfeat extract; give another folder")
        names = sorted({*before, *self.settings})
        others = [name for name in names if before.get(name) != self.settings.get(name)]
        if others:
            raise ValueError(
                f"{self.folder}: holds features made with another {', '.join(others)}; give "
                "another folder, or --overwrite"
            )

    def begin(self, key: str) -> None:
        """Delete the old entry of an item that is about to be made."""
        file = self._open()
        if self.entries.pop(key, None) is not None:
            # An entry of nothing but its key, which counts as not done when it is read again.
            file.write(json.dumps({"key": key}) + "\n")
            file.flush()

    def record(self, entry: dict[str, Any]) -> None:
        """Record an item that is done, or has failed with a reason."""
        file = self._open()
        self.entries[entry["key"]] = entry
        file.write(json.dumps(entry, sort_keys=True) + "\n")
        # A flush hands the line to the system, so it survives the end of this process. Against a
        # power cut, syncing every line to the disk would not help: the item's file may be
        # truncated all the same, which its recorded size reveals.
        file.flush()

    def _open(self) -> TextIO:
        """Rewrite the ledger with all known entries, without a truncated last line; open it."""
        if self._file is None:
            known = [json.dumps({"settings": self.settings}, sort_keys=True)]
            known += [json.dumps(one, sort_keys=True) for one in self.entries.values()]
            write_bytes(self.folder / LEDGER, ("\n".join(known) + "\n").encode())
            self._file = (self.folder / LEDGER).open("a", encoding="utf-8")
            if self._overwrite:  # its entries describe files that are about to be replaced
                (self.folder / MANIFEST).unlink(missing_ok=True)
        return self._file

    def finish(self) -> None:
        """Replace the ledger by the manifest."""
        self.close()
        items = [self.entries[key] for key in sorted(self.entries)]
        content = {"format": FORMAT, "settings": self.settings, "items": items}
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        write_bytes(self.folder / MANIFEST, text.encode())
        (self.folder / LEDGER).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the ledger; it stays, and a later run continues it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _changed_ns(path: Path) -> int:
    """Time of a file's last change, nanoseconds; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _entries(found: Any, path: Path) -> list[dict[str, Any]]:
    """Check that entries have a key and a valid size, and return them."""
    if not isinstance(found, list) or not all(
        isinstance(one, dict)
        and isinstance(one.get("key"), str)
        and isinstance(one.get("size", 0), int)
        for one in found
    ):
        raise ValueError(
            f"{path}: damaged: an item has no key, or no size in bytes; give another folder"
        )
    return found


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); give another folder") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a record of upfeat extract; give another folder")
    return content
