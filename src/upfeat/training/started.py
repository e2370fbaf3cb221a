"""Settings, backbones and photographs of a run, read from its folder to resume it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upfeat.strict_json import read_object
from upfeat.training.config import TrainConfig, expand, settings_of_run


@dataclass(frozen=True)
class Started:
    """Settings and inputs with which a run was started.

    Attributes:
        settings: settings in the run's ``config.json``.
        backbone: names of the backbones; ``None`` if a backbone was given as an object.
        photos: path of the folder of photographs at the start; ``None`` if it is not recorded.
    """

    settings: dict[str, Any]
    backbone: list[str] | None
    photos: Path | None

    def merge(self, given: Mapping[str, Any], source: str) -> TrainConfig:
        """Replace settings of the run by given settings.

        Differences that would change results are refused later, when the run is resumed.

        Args:
            given: values by name of setting, and ``preset`` for a recipe.
            source: name of the origin of ``given``, for error messages.

        Raises:
            ValueError: a name is unknown, or a value is wrong.
        """
        given = expand(given, source)
        return TrainConfig(**{**self.settings, **given})


def read_started(folder: str | Path) -> Started | None:
    """Read the settings and inputs with which a run was started.

    Args:
        folder: folder of the run.

    Returns:
        Settings and inputs; ``None`` if the folder contains no run.

    Raises:
        FileNotFoundError: the folder contains a run, but no ``config.json``.
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
    return Started(
        settings_of_run(folder),
        list(map(str, names)) if isinstance(names, list) and names else None,
        Path(photos) if isinstance(photos, str) else None,
    )


def read_run(path: Path) -> dict[str, Any]:
    """Read a ``run.json``.

    Raises:
        ValueError: the file is damaged.
    """
    # The limit is high because the file lists skipped photographs, which may be many.
    run = read_object(path, largest=1 << 30)
    backbones = run.get("backbones")
    whole = isinstance(backbones, list) and all(
        isinstance(one, dict) and isinstance(one.get("name", ""), str) for one in backbones
    )
    started = isinstance(run.get("started_with", {}), dict)
    if not whole or not started or not isinstance(run.get("config"), dict):
        raise ValueError(f"{path}: lacks the settings or backbones of a run; give another folder")
    return run
