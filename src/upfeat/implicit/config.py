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
@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Settings of a fit."""

    preset: str = setting(
        "fast",
        "`fast`, a closed-form solution; or `reference`, the published recipe (FeatUp, section "
        "3.3), about sixty times slower",
        _one_of(*PRESETS),
    )
    size: int | None = setting(
        None,
        "shorter side of the fitted image, pixels; `None` for the image's own, at most 224; "
        "the result can be rendered at any size",
        Whole(1, 1 << 14, optional=True),
    )
    seed: int = setting(0, "seed of all random draws", Whole(0, (1 << 63) - 1))
    views: int | None = setting(
        None,
        "number of jittered views; `None` for 3000 (reference) or at most 64 (fast, which adds the "
        "image itself, and stops earlier, see `tolerance`)",
        Whole(1, 1 << 20, optional=True),
    )
    zoomed_views: int = setting(
        48, "fast: number of additional magnified views, used for details only", Whole(0, 1 << 16)
    )
    held_out: int = setting(
        32,
        "number of held-out views, which evaluate the fit and are never fitted",
        Whole(1, 1 << 16),
    )
    components: int = setting(
        128,
        "number of principal components that represent the features during the fit",
        Whole(1, 1 << 15),
    )
    max_pad: float = setting(30, "largest reflected border of views, pixels", Number(0, 1 << 14))
    max_zoom: float = setting(1.8, "largest magnification of views", Number(1, 1e3))
    tolerance: float = setting(
        0.01,
        "fast: stop if doubling the views lowers the held-out loss by less than this fraction",
        Number(0, 1, below=True),
    )
    slack: float = setting(
        0.05,
        "fast: fraction by which the held-out loss may exceed its minimum in favour of a map "
        "closer to the one-pass result, which is smoother and suits linear probes better; 0 for "
        "the minimum",
        Number(0, 1, below=True),
    )
    share: float = setting(
        0.2,
        "fast: weight of the fit to the views in the result, from 0 to 1; the remaining weight is "
        "given to the map of eight passes; 1 explains views better, and is not smoothed",
        Number(0, 1),
    )
    translation: float = setting(
        1.0,
        "fast: strength, from 0 to 1, of the linear map of channels that translates the fitted map "
        "into features of the unjittered image, which heads trained on coarse features need; "
        "`share=1` and `translation=0` explain views best",
        Number(0, 1),
    )
    anchors: int = setting(1024, "fast: largest number of basis functions", Whole(1, MOST_ANCHORS))
    steps: int = setting(1200, "reference: number of steps of NAdam", Whole())
    views_per_step: int = setting(10, "reference: number of views per step", Whole(1, 1 << 16))
    learning_rate: float = setting(2e-3, "reference: step size of NAdam", Number(0, 10, above=True))
    downsampler: str = setting(
        "attention",
        "reference: downsampler, `attention` or `simple`",
        _one_of("attention", "simple"),
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
