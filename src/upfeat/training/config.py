"""What a training can be told, where it may come from, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from upfeat.bounds import LARGEST, choice, flag, number, shown, whole
from upfeat.registry import unknown_name
from upfeat.strict_json import LARGEST as LARGEST_FILE
from upfeat.strict_json import read_object

REFERENCE: dict[str, Any] = {
    "upsampler": "jbu_stack",
    "upsampler_options": {},
    "frozen": (),
    "back_projections": None,
    "steps": 2000,
    "batch_size": 4,
    "views": 5,
    "size": 224,
    "source_size": None,
    "crop": "short_side",
    "max_pad": 20.0,
    "max_zoom": 2.0,
    "zoom_probability": 0.5,
    "flip_probability": 0.5,
    "downsampler": "attention",
    "downsampler_size": None,
    "saliency_dropout": 0.2,
    "projection_dim": 30,
    "crf_weight": 1e-3,
    "tv_weight": 0.0,
    "magnitude_weight": 0.0,
    "detail_weight": 0.0,
    "mix_share": 1.0,
    "standardize": False,
    "colour_jitter": 0.0,
    "mixed_normalization": False,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "clip": 1e-4,
    "clip_steps": 10,
}
"""The published recipe of the JBU stack (FeatUp, ICLR 2024, and its code)."""

DETAIL: dict[str, Any] = {
    "upsampler": "detail",
    "frozen": ("neighbourhood",),
    "steps": 900,
    "batch_size": 8,
    "views": 1,
    "source_size": 320,
    "crop": "mixed",
    "max_zoom": 2.0,
    "zoom_probability": 0.5,
    "detail_weight": 1.0,
    "mix_share": 0.25,
}
"""The detail upsampler around the neighbourhood steps of ``upsampler_options["start"]``."""

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "reference": REFERENCE, "detail": DETAIL}
"""Recipes by name, each as changes to the defaults of :class:`TrainConfig`."""

OPERATIONAL = frozenset(
    {"out", "device", "workers", "checkpoint_every", "keep", "tensorboard", "log_every"}
)
"""Settings that change no result, and so may differ when a run is resumed."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training.

    The defaults of the first block are the recipe: the best one known. They stand here and nowhere
    else; ``TrainConfig.reference()`` is the published one. Pixels are those of the image that the
    upsampler sees, unless said otherwise.

    Attributes:
        upsampler: name, or a folder that ``save_pretrained`` wrote, to start from its weights.
        upsampler_options: arguments of its constructor, by name.
        frozen: names of parts of the upsampler that are not trained.
        back_projections: corrections that a neighbourhood upsampler makes once it is trained; while
            it is, none, since they would reward smooth weights. ``None`` leaves the constructor's.
        steps: of the optimiser.
        batch_size: photographs of a step, over all processes and accumulated parts together.
        views: of each photograph.
        size: side of the square image that the upsampler sees.
        source_size: side of the finer image that views are cut from; ``None`` for ``size``.
        crop: the square window that is taken of a photograph: as large as its shorter side
            ("short_side"), in its own pixels ("native"), or between the two ("mixed").
        max_pad: reflected border of the views.
        max_zoom: views are magnified by up to this, at least 1.
        zoom_probability: share of views that are magnified.
        flip_probability: share of views that are mirrored.
        downsampler: "attention", "simple", or "cell": the mean over each cell, blurred over cells.
        downsampler_size: taps per side of the first two; ``None`` for the backbone's stride.
        saliency_dropout: of the attention downsampler, in [0, 1).
        projection_dim: random directions that features are compared along; ``None`` for all
            channels as they are.
        crf_weight: of the CRF term; 0 for none, as for the next two.
        tv_weight: of the total variation of the magnitude map.
        magnitude_weight: of the magnitude's consistency.
        detail_weight: of the detail's error against the features of the enlarged image; for the
            detail upsampler alone.
        mix_share: share of the trained channel mix that the finished detail upsampler keeps, from
            0 to 1: less explains views worse, but suits heads made for the coarse features better.
        standardize: compare channels in units of their deviation, so that all weigh alike.
        colour_jitter: deviation of a random gain and shift of each colour that the upsampler sees;
            0 for none.
        mixed_normalization: show the upsampler half of the images normalised by ImageNet's
            statistics instead of the backbone's, so that the weights serve either.
        learning_rate: of NAdam.
        schedule: of the learning rate: "constant", or "cosine" down to 0.
        clip: largest gradient norm during the first steps.
        clip_steps: how many they are.
        seed: of everything that is drawn.
        accumulate: parts that each process computes its share of a step in, to save memory.
        precision: of the backbone: "fp32", "bf16" (autocast), or "auto" for bf16 on a GPU.
        device: "cpu", "cuda", …; ``None`` for a GPU if there is one.
        workers: processes that load photographs; ``None`` for none, with a GPU up to 8.
        out: folder of the run; ``None`` keeps nothing but the upsampler that is returned.
        checkpoint_every: steps between checkpoints.
        keep: how many of the newest checkpoints stay.
        log_every: steps between lines of the log.
        validation_images: photographs held out; ``None`` for a twentieth, at most 32.
        validate_every: steps between validations.
        patience: stop after so many validations without a better one; ``None`` for never.
        tensorboard: write scalars and pictures for TensorBoard too.

    Raises:
        ValueError: a setting is out of its range.
    """

    upsampler: str = "neighbourhood"
    upsampler_options: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    back_projections: int | None = 2
    steps: int = 250
    batch_size: int = 4
    views: int = 6
    size: int = 224
    source_size: int | None = None
    crop: str = "short_side"
    max_pad: float = 20.0
    max_zoom: float = 4.0
    zoom_probability: float = 0.8
    flip_probability: float = 0.5
    downsampler: str = "cell"
    downsampler_size: int | None = None
    saliency_dropout: float = 0.2
    projection_dim: int | None = 30
    crf_weight: float = 0.0
    tv_weight: float = 0.0
    magnitude_weight: float = 0.0
    detail_weight: float = 0.0
    mix_share: float = 1.0
    standardize: bool = True
    colour_jitter: float = 0.1
    mixed_normalization: bool = False
    learning_rate: float = 2e-3
    schedule: str = "cosine"
    clip: float = 1e-4
    clip_steps: int = 10

    seed: int = 0
    accumulate: int = 1
    precision: str = "auto"
    device: str | None = None
    workers: int | None = None
    out: str | Path | None = None
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 1
    validation_images: int | None = None
    validate_every: int = 250
    patience: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Bring numbers to their types; check every range."""
        if self.out is not None:
            if not isinstance(self.out, str | os.PathLike):
                raise ValueError(f"out={shown(self.out)} must be a folder")
            object.__setattr__(self, "out", Path(self.out))
        checked: dict[str, Any] = {}
        for name, (least, most, optional) in _WHOLE.items():
            checked[name] = whole(name, getattr(self, name), least, most, optional=optional)
        for name, (low, high) in _NUMBERS.items():
            checked[name] = number(name, getattr(self, name), low, high, text=True)
        for name, high in _ABOVE_0.items():
            checked[name] = number(name, getattr(self, name), 0, high, above=True, text=True)
        for name, choices in _CHOICES.items():
            choice(name, getattr(self, name), choices)
        for name in ("tensorboard", "standardize", "mixed_normalization"):
            flag(name, getattr(self, name))
        self._check_names()
        # Copies, so that nothing changes them afterwards.
        checked["frozen"] = tuple(self.frozen)
        checked["upsampler_options"] = dict(self.upsampler_options)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_names(self) -> None:
        if isinstance(self.upsampler, os.PathLike):
            object.__setattr__(self, "upsampler", os.fspath(self.upsampler))
        for name in ("upsampler", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (name == "device" and value is None):
                raise ValueError(f"{name}={shown(value)} must be a name")
        options = self.upsampler_options
        if not isinstance(options, dict) or not all(isinstance(one, str) for one in options):
            raise ValueError(f"upsampler_options={shown(options)} must be names and values")
        names = self.frozen
        if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
            raise ValueError(f"frozen={shown(names)} must be a list of names")

    def _check_together(self) -> None:
        if self.source_size is not None and self.source_size < self.size:
            raise ValueError(
                f"source_size={self.source_size} must be at least size={self.size}; views are cut "
                "from the finer image"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} must divide batch_size={self.batch_size}, which is "
                "computed in so many equal parts"
            )
        if self.saliency_dropout == 1:
            raise ValueError("saliency_dropout=1.0 must be below 1; use 0 for none")

    @property
    def photo_size(self) -> int:
        """Side of the square that is read from a photograph, pixels."""
        return self.source_size or self.size

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TrainConfig:
        """A recipe by name, with changes.

        Raises:
            ValueError: there is no such recipe or setting.
        """
        return cls.from_mapping({"preset": name, **changes})

    @classmethod
    def reference(cls, **changes: Any) -> TrainConfig:
        """The published recipe of the JBU stack, with changes."""
        return cls.preset("reference", **changes)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, source: str = "settings") -> TrainConfig:
        """Build from names and values, such as a file's.

        Args:
            settings: of the fields, and ``preset`` for the recipe that they change.
            source: what to call them in errors.

        Raises:
            ValueError: a name is unknown (close ones are suggested) or a value is wrong.
        """
        return cls(**expand(settings, source))

    @classmethod
    def of_run(cls, folder: str | Path, **changes: Any) -> TrainConfig:
        """The settings of a run, to go on with it by ``train(…, resume=True)``.

        Args:
            folder: that the run was written to.
            **changes: to settings that may differ in a resumed run.

        Raises:
            FileNotFoundError: the folder holds no run.
            ValueError: its ``config.json`` is damaged.
        """
        path = Path(folder) / "config.json"
        stored = expand(read_object(path), str(path))
        return cls(**{**stored, **expand(changes, "changes"), "out": folder})

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        content = asdict(self)
        content["frozen"] = list(self.frozen)
        content["out"] = None if self.out is None else str(self.out)
        return content

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """How a run with settings ``other`` differs in its results: "seed: 0 there, 1 here".

        More steps under a constant learning rate do not count: they only go further.
        """
        own = self.to_json()
        same = set(OPERATIONAL)
        if self.schedule == "constant" and self.steps >= other.get("steps", 0):
            same.add("steps")
        return [
            f"{name}: {other.get(name)!r} there, {own[name]!r} here"
            for name in own
            if name not in same and other.get(name) != own[name]
        ]


def expand(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings by name, with those of the recipe that ``preset`` names.

    Raises:
        ValueError: a name is unknown; ``source`` is what is blamed.
    """
    known = [field.name for field in fields(TrainConfig)]
    for name in settings:
        if name not in [*known, "preset"]:
            raise ValueError(f"{source}: {unknown_name('setting', str(name), known)}")
    preset = settings.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"{source}: {unknown_name('preset', str(preset), list(PRESETS))}")
    return {**PRESETS[preset], **{key: settings[key] for key in settings if key != "preset"}}


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of settings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one, or PyYAML is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = _parse(path)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not settings (name: value)")
    return content


def _parse(path: Path) -> Any:
    if path.suffix.lower() == ".json":
        return read_object(path)
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: larger than {LARGEST_FILE >> 10} KiB, so it holds no settings")
    text = path.read_text(encoding="utf-8")
    try:
        import yaml
    except ImportError:
        raise ValueError(
            f'{path}: reading YAML needs PyYAML; pip install "upfeat[train]", or give a .json file'
        ) from None
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{path}: not YAML of ours (nested too deeply)") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


_WHOLE: dict[str, tuple[int, int, bool]] = {
    **dict.fromkeys(("steps", "checkpoint_every", "keep", "log_every"), (1, LARGEST, False)),
    "validate_every": (1, LARGEST, False),
    **dict.fromkeys(("batch_size", "views", "accumulate"), (1, 1 << 16, False)),
    "size": (1, 1 << 14, False),
    "source_size": (1, 1 << 15, True),
    "downsampler_size": (1, 1 << 10, True),
    "projection_dim": (1, 1 << 16, True),
    "patience": (1, LARGEST, True),
    "clip_steps": (0, LARGEST, False),
    "seed": (0, (1 << 63) - 1, False),
    "workers": (0, 1 << 10, True),
    "validation_images": (0, LARGEST, True),
    "back_projections": (0, 100, True),
}
"""Whole numbers: least, most, and whether none is allowed."""

_NUMBERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("zoom_probability", "flip_probability", "saliency_dropout"), (0, 1)),
    "mix_share": (0, 1),
    **dict.fromkeys(("detail_weight", "crf_weight", "tv_weight", "magnitude_weight"), (0, 1e6)),
    "max_pad": (0, 1 << 14),
    "max_zoom": (1, 1e3),
    "colour_jitter": (0, 10),
}
"""Numbers: least and greatest."""

_ABOVE_0 = {"learning_rate": 10.0, "clip": 1e9}
"""Numbers above 0: the greatest."""

_CHOICES: dict[str, list[str]] = {
    "crop": ["short_side", "native", "mixed"],
    "downsampler": ["attention", "simple", "cell"],
    "schedule": ["constant", "cosine"],
    "precision": ["auto", "fp32", "bf16"],
}
