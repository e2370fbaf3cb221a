"""Settings of a fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from upfeat.bounds import shown
from upfeat.implicit.fields import MOST_ANCHORS
from upfeat.settings import Number, Whole, check, documented, setting

PRESETS = ("fast", "reference")


def _one_of(*known: str) -> Callable[[str, Any], str]:
    """Return a check that a setting is one of the known names."""

    def check_name(name: str, value: Any) -> str:
        if value not in known:
            listed = " or ".join(f'"{choice}"' for choice in known)
            raise ValueError(f"{name}={shown(value)} must be {listed}")
        return value

    return check_name


@documented
@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit."""

    preset: str = setting(
        "fast",
        "`fast`, a closed-form solution; or `reference`, the published recipe (FeatUp, section "
        "3.3), some hundred times slower",
        _one_of(*PRESETS),
    )
    size: int | None = setting(
        None,
        "length of the shorter side at which the image is fitted, pixels; `None` for its own, at "
        "most 224; the result can be drawn at any size",
        Whole(1, 1 << 14, optional=True),
    )
    seed: int = setting(0, "seed of all that is drawn at random", Whole(0, (1 << 63) - 1))
    views: int | None = setting(
        None,
        "jittered views to look at; `None` for at most 64 (fast: fewer where held-out views gain "
        "nothing, and the image itself besides) or 3000 (reference)",
        Whole(1, 1 << 20, optional=True),
    )
    zoomed_views: int = setting(
        48, "fast: magnified views, looked at beside those for their details", Whole(0, 1 << 16)
    )
    held_out: int = setting(
        32, "views that are never fitted, by which the fit is judged", Whole(1, 1 << 16)
    )
    components: int = setting(
        128,
        "principal components of the features in which the fit works",
        Whole(1, 1 << 15),
    )
    max_pad: float = setting(30, "reflected border of views, pixels", Number(0, 1 << 14))
    max_zoom: float = setting(1.8, "largest magnification of views", Number(1, 1e3))
    tolerance: float = setting(
        0.01,
        "fast: stop when twice the views lower the held-out loss by less than this fraction",
        Number(0, 1, below=True),
    )
    slack: float = setting(
        0.05,
        "fast: fraction of the held-out loss that may be given for a smoother map; the smoothest "
        "is what a one-pass upsampler draws, smoothness helps linear probes, and 0 gives the least "
        "held-out loss",
        Number(0, 1, below=True),
    )
    share: float = setting(
        0.5,
        "fast: the views' share in the result, from 0 to 1; the rest is what a one-pass upsampler "
        "draws, and both together tell classes apart better than either; 1 explains views better",
        Number(0, 1),
    )
    translation: float = setting(
        1.0,
        "fast: how far what the views agree on is turned into the words of the image's own "
        "features, from 0 to 1, by a linear map of channels; heads of coarse features need that; "
        "`share=1` and `translation=0` explain views best",
        Number(0, 1),
    )
    anchors: int = setting(1024, "fast: basis functions, at most", Whole(1, MOST_ANCHORS))
    steps: int = setting(1200, "reference: steps of NAdam", Whole())
    views_per_step: int = setting(10, "reference: views drawn for each step", Whole(1, 1 << 16))
    learning_rate: float = setting(2e-3, "reference: step size of NAdam", Number(0, 10, above=True))
    downsampler: str = setting(
        "attention", "reference: `attention` or `simple`", _one_of("attention", "simple")
    )

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a setting is out of its range.
        """
        check(self)

    @property
    def n_views(self) -> int:
        """Largest number of views to observe."""
        if self.views is not None:
            return self.views
        return 64 if self.preset == "fast" else 3000
