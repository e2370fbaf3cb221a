"""Folder of a run: its files, and the checks before it is started or resumed.

run.json            settings, backbones, photographs, versions; at the end the outcome
config.json         the settings alone (also config.yaml, if PyYAML is installed)
photographs.json    names and sizes of all files, skipped files, and the split
losses.jsonl        a line for each logged step
checkpoints/        the newest checkpoints
upsampler/          the trained weights, with a description of their training data
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from upfeat.backbones import Backbone
from upfeat.provenance import digest, identify_backbone, versions
from upfeat.storage import sweep, write_bytes
from upfeat.strict_json import read_object
from upfeat.training.checkpoint import Checkpoints
from upfeat.training.config import TrainConfig
from upfeat.training.photographs import Listing, Skipped, find_photographs, list_photographs
from upfeat.training.started import read_run

_NAMES_SHOWN = 3


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


_LISTED: dict[str, Callable[[Any], bool]] = {
    "files": lambda one: isinstance(one, list) and [type(part) for part in one] == [str, int],
    "skipped": lambda one: isinstance(one, dict) and sorted(one) == ["name", "reason"],
    "train": _is_name,
    "validation": _is_name,
}
"""Lists in ``photographs.json``, each with the check of its entries."""


class RunFolder:
    """The files of one run.

    Attributes:
        path: path of the folder.
        checkpoints: checkpoints in the folder.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Take the folder's path from the configuration; nothing is written yet.

        Raises:
            ValueError: the configuration has no ``out``.
        """
        if config.out is None:
            raise ValueError("out=None: give the folder that the run is written to")
        self.path = Path(config.out)
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.keep)

    @property
    def upsampler(self) -> Path:
        """Folder of the trained weights."""
        return self.path / "upsampler"

    @property
    def log(self) -> Path:
        """Path of the log."""
        return self.path / "losses.jsonl"

    def start(
        self,
        config: TrainConfig,
        backbones: list[Backbone],
        photos: str | Path,
        *,
        resume: bool,
        names: list[str] | None = None,
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> tuple[Listing, dict[str, Any] | None]:
        """Begin a run, or load the state from which it is resumed.

        Args:
            config: settings of the run.
            backbones: backbones whose features are upsampled.
            photos: folder of photographs.
            resume: resume the run in the folder, if there is one.
            names: names by which the backbones can be loaded again; ``None`` if one of them was
                given as an object.
            check: see :meth:`Checkpoints.newest`.

        Returns:
            The photographs, and the newest checkpoint (``None`` if there is none).

        Raises:
            FileNotFoundError: there is no folder of photographs.
            ValueError: the folder contains a run and ``resume`` is False, or the run has other
                settings, backbones or photographs; or no photograph can be used.
            OSError: the folder cannot be written.
        """
        for folder in (self.path, self.checkpoints.folder, self.upsampler):
            sweep(folder)
        run = self._read_run()
        if run is not None and not resume:
            raise ValueError(
                f"{self.path}: holds a run already; go on with it by --resume (resume=True), or "
                "give another folder"
            )
        state = None
        if run is not None:
            # Other settings come first: a checkpoint of theirs does not fit, but is not damaged.
            self._check_same(run, config, backbones, photos)
            state = self.checkpoints.newest(check)
            names = run.get("started_with", {}).get("backbone")
            for path, content in self._settings_files(config, names).items():
                _write(path, content)
            going_on = {"state": "running", "config": config.to_json()}
            write_json(self.path / "run.json", {**run, **going_on})
        listing = self._listing(config, photos, run is not None)
        if run is None:
            self._begin(config, backbones, listing, names)
        self._truncate_log(0 if state is None else state["step"])
        return listing, state

    def finish(self, outcome: dict[str, Any]) -> None:
        """Add the outcome to ``run.json``, and write the run's history next to the weights."""
        run = {**(self._read_run() or {}), **outcome, "versions": versions("upfeat.training.loop")}
        write_json(self.path / "run.json", run)
        # The history leaves out paths of this machine, since weights are published.
        settings = {key: value for key, value in run["config"].items() if key != "out"}
        history = {key: value for key, value in run.items() if key != "started_with"}
        write_json(self.upsampler / "training.json", {**history, "config": settings})

    def open_log(self) -> TextIO:
        """Open the log for appending, with line buffering."""
        return self.log.open("a", buffering=1, encoding="utf-8")

    def _begin(
        self,
        config: TrainConfig,
        backbones: list[Backbone],
        listing: Listing,
        names: list[str] | None,
    ) -> None:
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror})") from None
        for stray in self.checkpoints.paths():
            # A run writes run.json before its first checkpoint, so this file is from elsewhere.
            raise ValueError(f"{stray}: a checkpoint without run.json; give another folder")
        photographs = {
            "files": listing.files,
            "skipped": [asdict(one) for one in listing.skipped],
            "train": listing.train,
            "validation": listing.validation,
        }
        files = self._settings_files(config, names)
        files[self.path / "photographs.json"] = encode_json(photographs)
        self._check_free(files)
        for path, content in files.items():
            _write(path, content)
        # Written last, because a folder with a run.json counts as a run.
        run = {
            "format": "upfeat-run-1",
            "state": "running",
            "config": config.to_json(),
            "started_with": {"backbone": names, "photos": str(listing.folder.resolve())},
            "backbones": [describe(backbone) for backbone in backbones],
            "photographs": listing.to_json(),
            "versions": versions("upfeat.training.loop"),
        }
        write_json(self.path / "run.json", run)

    def _check_free(self, files: dict[Path, bytes]) -> None:
        """Refuse a folder in which the run would replace files that are not its own.

        Files with the content that the run would write are allowed: a killed start left them.
        """
        for path in (self.log, self.upsampler, *files):
            alike = path in files and path.is_file() and path.read_bytes() == files[path]
            if os.path.lexists(path) and not alike:
                raise ValueError(
                    f"{path}: exists already and is not of this run; remove it, or give another "
                    "folder"
                )

    def _settings_files(self, config: TrainConfig, names: list[str] | None) -> dict[Path, bytes]:
        """Return the files that ``--config`` reads to start such a run in another folder."""
        settings = {name: value for name, value in config.to_json().items() if name != "out"}
        if names is not None:
            settings = {"backbone": names[0] if len(names) == 1 else names, **settings}
        files = {self.path / "config.json": encode_json(settings)}
        text = _yaml(settings)
        return files if text is None else {**files, self.path / "config.yaml": text}

    def _check_same(
        self,
        run: dict[str, Any],
        config: TrainConfig,
        backbones: list[Backbone],
        photos: str | Path,
    ) -> None:
        """Refuse to resume a run with other settings, backbones or photographs."""
        found = config.differences(run.get("config", {}))
        there, here = run.get("backbones", []), [describe(backbone) for backbone in backbones]
        if there != here:
            names = [", ".join(one.get("name", "?") for one in side) for side in (there, here)]
            alike = " of the same name with other weights" if names[0] == names[1] else ""
            found.append(f"backbone: {names[0]} there, {names[1]} here{alike}")
        stored = self._stored_listing()
        if stored is not None:
            found += _compare_files(stored["files"], find_photographs(photos))
        if found:
            raise ValueError(
                f"{self.path}: the run to resume differs: {'; '.join(found)}; give what it was "
                "started with, or another folder"
            )

    def _listing(self, config: TrainConfig, photos: str | Path, resumed: bool) -> Listing:
        stored = self._stored_listing() if resumed else None
        if stored is not None:
            return Listing(
                Path(photos),
                [(name, size) for name, size in stored["files"]],
                [Skipped(**one) for one in stored["skipped"]],
                stored["train"],
                stored["validation"],
            )
        return list_photographs(
            photos, config.photo_size, held_out=config.validation_images, seed=config.seed
        )

    def _truncate_log(self, step: int) -> None:
        """Drop the lines of steps after the checkpoint, since these steps will be repeated."""
        if not self.log.is_file():
            return
        kept = []
        for line in self.log.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept.append(line)
        _write(self.log, b"".join(kept))

    def _read_run(self) -> dict[str, Any] | None:
        path = self.path / "run.json"
        return read_run(path) if path.is_file() else None

    def _stored_listing(self) -> dict[str, Any] | None:
        path = self.path / "photographs.json"
        if not path.is_file():
            return None
        content = read_object(path, largest=1 << 30)
        for name, is_one in _LISTED.items():
            found = content.get(name)
            if not isinstance(found, list) or not all(is_one(entry) for entry in found):
                raise ValueError(f"{path}: damaged: lacks {name}; give another folder")
        return content


def describe(backbone: Backbone) -> dict[str, Any]:
    """Describe a backbone as JSON values; a backbone without weights is identified by its output.

    Entries are its name, number of channels, stride, normalisation and digest.
    """
    known = digest(backbone)
    if not backbone.state_dict():
        known = hashlib.sha256(identify_backbone(backbone).encode()).hexdigest()
    return {
        "name": backbone.name,
        "embed_dim": backbone.embed_dim,
        "stride": backbone.stride,
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "digest": known,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    _write(path, encode_json(content))


def encode_json(content: dict[str, Any]) -> bytes:
    """Encode a JSON file."""
    # In ASCII, because file names may contain bytes that are not valid UTF-8.
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise OSError(error.errno, f"not written ({error.strerror})", str(path)) from None


def _yaml(settings: dict[str, Any]) -> bytes | None:
    """Encode a YAML file; ``None`` if PyYAML is not installed."""
    try:
        import yaml
    except ImportError:
        return None
    return yaml.safe_dump(settings, sort_keys=False).encode()


def _compare_files(there: list[list[Any]], here: list[tuple[str, int]]) -> list[str]:
    before, now = {one[0]: one[1] for one in there}, dict(here)
    kinds: dict[str, Callable[[str], bool]] = {
        "added": lambda name: name not in before,
        "gone": lambda name: name not in now,
        "of another size": lambda name: (
            name in before and name in now and before[name] != now[name]
        ),
    }
    names = sorted({*before, *now})
    found = []
    for kind, belongs in kinds.items():
        chosen = [name for name in names if belongs(name)]
        if chosen:
            more = ", …" if len(chosen) > _NAMES_SHOWN else ""
            found.append(f"{len(chosen)} {kind} ({', '.join(chosen[:_NAMES_SHOWN])}{more})")
    return [f"photographs: {', '.join(found)}"] if found else []
