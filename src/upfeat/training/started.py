"""Settings, backbone and photographs of a run, read back from its folder to go on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfeat.strict_json import read_object
from upfeat.training.config import TrainConfig, expand


@dataclass(frozen=True)
class Started:
    """The beginning of a run.

    Attributes:
        settings: its ``config.json``.
        backbone: names of its backbones; ``None`` where one was an object of the caller's.
        photos: the folder of photographs, where it lay then; ``None`` where that is not known.
    """

    settings: dict[str, Any]
    backbone: list[str] | None
    photos: Path | None

    def merge(self, given: Mapping[str, Any], source: str) -> TrainConfig:
        """The run's settings with those given laid over them; the trainer compares the two.

        Args:
            given: settings by name, and ``preset`` for those of a recipe.
            source: what to call them in errors.

        Raises:
            ValueError: a name is unknown, or a value is wrong.
        """
        given = expand(given, source)
        return TrainConfig(**{**self.settings, **given})


def read_started(folder: str | Path) -> Started | None:
    """Read how a run began.

    Args:
        folder: of the run.

    Returns:
        Its beginning; ``None`` if the folder holds no run.

    Raises:
        FileNotFoundError: the settings are gone.
        ValueError: a file of the run is damaged.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        return None
    run = read_run(folder / "run.json")
    beginning = run.get("started_with")
    if not isinstance(beginning, dict):  # a run of an earlier version
        beginning = {"backbone": [one.get("name") for one in run["backbones"]]}
    names, photos = beginning.get("backbone"), beginning.get("photos")
    settings = expand(read_object(folder / "config.json"), str(folder / "config.json"))
    return Started(
        settings,
        list(map(str, names)) if isinstance(names, list) and names else None,
        Path(photos) if isinstance(photos, str) else None,
    )


def read_run(path: Path) -> dict[str, Any]:
    """Read a ``run.json``.

    Raises:
        ValueError: it is damaged.
    """
    # Many skipped photographs make it large.
    run = read_object(path, largest=1 << 30)
    backbones = run.get("backbones")
    whole = isinstance(backbones, list) and all(isinstance(one, dict) for one in backbones)
    if not whole or not isinstance(run.get("config"), dict):
        raise ValueError(f"{path}: lacks the settings or backbones of a run; give another folder")
    return run
