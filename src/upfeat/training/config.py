"""Settings of a training, declared once for presets, files and command-line flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from upfeat.bounds import flag
from upfeat.registry import unknown_name
from upfeat.settings import (
    Choice,
    Name,
    Number,
    Whole,
    check,
    check_each,
    documented,
    folder,
    names,
    options,
    setting,
    settings_of,
)
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
"""Published recipe of the JBU stack (FeatUp, ICLR 2024, and its code)."""

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
"""Recipe of the detail upsampler, whose neighbourhood steps ``upsampler_options["start"]`` names
and which stay frozen."""

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "reference": REFERENCE, "detail": DETAIL}
"""Recipes by name, each as changes to the defaults of :class:`TrainConfig`."""


Real = partial(Number, text=True)
"""Check of a number, which may be text, because YAML parses 1e-3, without a point, as text."""


@documented
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training.

    The defaults of the settings down to ``clip_steps`` are the default recipe, the best known;
    ``TrainConfig.reference()`` is the published recipe. Pixels are pixels of the guidance unless
    said otherwise.

    Raises:
        ValueError: a setting is out of its range.
    """

    upsampler: str = setting(
        "neighbourhood",
        "name of the upsampler, or folder or published checkpoint of weights to start from",
        Name(optional=False),
    )
    upsampler_options: dict[str, Any] = setting(
        {}, "arguments of the upsampler's constructor (`--option radius=2`)", options, flag=False
    )
    frozen: tuple[str, ...] = setting(
        (),
        "names of parts of the upsampler that are not trained (no flag: set it in a file)",
        names,
        flag=False,
    )
    back_projections: int | None = setting(
        2,
        "number of back-projections of the finished neighbourhood upsampler; training uses none, "
        "since they would reward smooth weights; `None` for the constructor's number throughout",
        Whole(0, 100, optional=True),
    )
    steps: int = setting(250, "number of optimiser steps", Whole())
    batch_size: int = setting(
        4,
        "photographs per step, in all processes and accumulated parts together",
        Whole(1, 1 << 16),
    )
    views: int = setting(6, "number of views of each photograph", Whole(1, 1 << 16))
    size: int = setting(
        224,
        "side of the square guidance, pixels; at least two cells of the backbone",
        Whole(1, 1 << 14),
    )
    source_size: int | None = setting(
        None,
        "side of the image from which views are made, pixels, at least `size`; if it is larger, "
        "magnified views show new detail; `None` for `size`",
        Whole(1, 1 << 15, optional=True),
    )
    crop: str = setting(
        "short_side",
        "side of the square window cut from a photograph: the photograph's shorter side "
        "(`short_side`), `source_size`, so that pixels are copied (`native`), or a random length "
        "between these (`mixed`)",
        Choice(["short_side", "native", "mixed"]),
    )
    max_pad: float = setting(20.0, "largest reflected border of views, pixels", Real(0, 1 << 14))
    max_zoom: float = setting(4.0, "largest magnification of views, at least 1", Real(1, 1e3))
    zoom_probability: float = setting(0.8, "fraction of views that are magnified", Real(0, 1))
    flip_probability: float = setting(0.5, "fraction of views that are mirrored", Real(0, 1))
    downsampler: str = setting(
        "cell",
        "downsampler to the backbone's grid: `attention`, `simple`, or `cell`, the mean over each "
        "cell, blurred over neighbouring cells",
        Choice(["attention", "simple", "cell"]),
    )
    downsampler_size: int | None = setting(
        None,
        "taps per side of `attention` and `simple`; `None` for the backbone's stride",
        Whole(1, 1 << 10, optional=True),
    )
    saliency_dropout: float = setting(
        0.2, "dropout of the attention downsampler's saliency, below 1", Real(0, 1)
    )
    projection_dim: int | None = setting(
        30,
        "number of random directions along which features are compared; `None` to compare channels",
        Whole(1, 1 << 16, optional=True),
    )
    crf_weight: float = setting(0.0, "weight of the CRF loss", Real(0, 1e6))
    tv_weight: float = setting(
        0.0, "weight of the total variation of the map of feature magnitudes", Real(0, 1e6)
    )
    magnitude_weight: float = setting(
        0.0, "weight of the error of predicted feature magnitudes in views", Real(0, 1e6)
    )
    detail_weight: float = setting(
        0.0,
        "weight of the detail upsampler's error, compared with features of the enlarged image",
        Real(0, 1e6),
    )
    mix_share: float = setting(
        1.0,
        "fraction of the trained channel mix that the finished detail upsampler keeps; a smaller "
        "fraction explains views worse, but suits heads trained on coarse features better",
        Real(0, 1),
    )
    standardize: bool = setting(
        True,
        "compare channels in units of their standard deviation, so that all have equal weight",
        flag,
    )
    colour_jitter: float = setting(
        0.1,
        "standard deviation of a random gain and shift of each colour of the guidance; 0 for none",
        Real(0, 10),
    )
    mixed_normalization: bool = setting(
        False,
        "normalise half of the guidance images by ImageNet's statistics instead of the backbone's, "
        "so that the weights suit both",
        flag,
    )
    learning_rate: float = setting(2e-3, "step size of NAdam", Real(0, 10, above=True))
    schedule: str = setting(
        "cosine",
        "schedule of the learning rate: `constant`, or `cosine` down to 0",
        Choice(["constant", "cosine"]),
    )
    clip: float = setting(
        1e-4, "largest gradient norm during the first `clip_steps` steps", Real(0, 1e9, above=True)
    )
    clip_steps: int = setting(10, "number of initial steps whose gradients are clipped", Whole(0))

    seed: int = setting(0, "seed of all random draws", Whole(0, (1 << 63) - 1))
    accumulate: int = setting(
        1,
        "number of parts into which each process divides its images of a step, to save memory",
        Whole(1, 1 << 16),
    )
    precision: str = setting(
        "auto",
        "precision of the backbone: `fp32`, `bf16` (autocast), or `auto`, which is bf16 on a GPU",
        Choice(["auto", "fp32", "bf16"]),
    )
    device: str | None = setting(
        None, "device: `cpu`, `cuda`, …; `None` for a GPU if there is one", Name(), operational=True
    )
    workers: int | None = setting(
        None,
        "number of processes that load photographs; `None` for up to 8 with a GPU, else none",
        Whole(0, 1 << 10, optional=True),
        operational=True,
    )
    out: str | Path | None = setting(
        None, "folder of the run (`-o`)", folder, flag=False, operational=True
    )
    checkpoint_every: int = setting(100, "steps between checkpoints", Whole(), operational=True)
    keep: int = setting(2, "number of newest checkpoints to keep", Whole(), operational=True)
    log_every: int = setting(1, "steps between lines of the log", Whole(), operational=True)
    validation_images: int | None = setting(
        None,
        "number of photographs held out for validation; `None` for a twentieth, at most 32",
        Whole(0, optional=True),
    )
    validate_every: int = setting(250, "steps between validations", Whole())
    patience: int | None = setting(
        None,
        "stop after this number of validations without improvement; `None` for never",
        Whole(optional=True),
    )
    tensorboard: bool = setting(
        False,
        "also write scalars and pictures for TensorBoard",
        flag,
        flag=False,
        operational=True,
    )

    def __post_init__(self) -> None:
        """Convert numbers to their types and check every range."""
        check(self)
        self._check_together()

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
        if self.downsampler_size is not None and self.downsampler == "cell":
            raise ValueError(
                f"downsampler_size={self.downsampler_size} is of the downsamplers attention and "
                "simple; choose one of them, or leave it out"
            )
        if self.saliency_dropout == 1:
            raise ValueError("saliency_dropout=1.0 must be below 1; use 0 for none")

    @property
    def photo_size(self) -> int:
        """Side of the square image that is read from a photograph, pixels."""
        return self.source_size or self.size

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TrainConfig:
        """Return a recipe by name, with changes.

        Args:
            name: name of a recipe in :data:`PRESETS`.
            **changes: settings that replace those of the recipe.

        Raises:
            ValueError: there is no such recipe or setting.
        """
        return cls.from_mapping({"preset": name, **changes})

    @classmethod
    def reference(cls, **changes: Any) -> TrainConfig:
        """Return the published recipe of the JBU stack, with changes."""
        return cls.preset("reference", **changes)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, source: str = "settings") -> TrainConfig:
        """Build a configuration from names and values, such as the content of a file.

        Args:
            settings: values of fields by name, and ``preset`` for the recipe that they change.
            source: name of the settings' origin, for error messages.

        Raises:
            ValueError: a name is unknown (close names are suggested) or a value is wrong.
        """
        return cls(**expand(settings, source))

    @classmethod
    def of_run(cls, folder: str | Path, **changes: Any) -> TrainConfig:
        """Read the settings of a run, to resume it by ``train(…, resume=True)``.

        Args:
            folder: folder of the run.
            **changes: settings that replace those of the run; only some may differ when it is
                resumed.

        Raises:
            FileNotFoundError: the folder contains no run.
            ValueError: its ``config.json`` is damaged, or a change is wrong.
        """
        return cls(**{**settings_of_run(folder), **expand(changes, "changes"), "out": folder})

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        content = asdict(self)
        content["frozen"] = list(self.frozen)
        content["out"] = None if self.out is None else str(self.out)
        return content

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """List the differences to settings ``other`` that change results: "seed: 0 there, 1 here".

        More steps with a constant learning rate are no difference: they only continue the run.
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


def settings_of_run(folder: str | Path) -> dict[str, Any]:
    """Read the settings in the ``config.json`` of a run, without the names of its backbones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    path = Path(folder) / "config.json"
    content = read_object(path)
    content.pop("backbone", None)
    check_each(path, TrainConfig, content)
    return expand(content, str(path))


OPERATIONAL = frozenset(name for name, one in settings_of(TrainConfig).items() if one.operational)
"""Names of settings that do not change results, and so may differ when a run is resumed."""


def expand(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Replace ``preset`` in settings by the settings of that recipe; explicit settings win.

    Args:
        settings: values by name of setting, and ``preset`` for a recipe.
        source: name of the settings' origin, for error messages.

    Raises:
        ValueError: a name is unknown.
    """
    known = [field.name for field in fields(TrainConfig)]
    for name in settings:
        if name not in [*known, "preset"]:
            raise ValueError(f"{source}: {unknown_name('setting', str(name), known)}")
    preset = settings.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"{source}: {unknown_name('preset', str(preset), list(PRESETS))}")
    return {**PRESETS[preset], **{key: settings[key] for key in settings if key != "preset"}}
