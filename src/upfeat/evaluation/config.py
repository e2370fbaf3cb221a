"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from upfeat.bounds import shown
from upfeat.settings import Choice, Whole, check, documented, setting

PROTOCOLS = ("own", "transfer", "probabilities")

PROBES = ("regression", "adamw")

DOWNSAMPLERS = ("box", "simple", "attention")


class Several(NamedTuple):
    """Check of a setting whose value is one or more of the known names, without repetition."""

    known: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> tuple[str, ...]:
        """Check the value of a setting and return it as a tuple.

        Raises:
            ValueError: the value is not one or more of the known names, or a name is repeated.
        """
        listed = isinstance(value, tuple | list) and all(isinstance(one, str) for one in value)
        if not listed or not value or not set(value) <= set(self.known):
            raise ValueError(f"{name}={shown(value)} must be one or more of {self.known}")
        if len(set(value)) < len(value):
            raise ValueError(f"{name}={shown(value)} must name each once")
        return tuple(value)


@documented
@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of an evaluation; all of them may change scores, so all are recorded in results."""

    size: int = setting(
        224,
        "shorter side to which images and labels are resized, pixels",
        Whole(1, 1 << 14),
    )
    seeds: int = setting(3, "number of repetitions, seeds 0, 1, …", Whole(1, 1 << 10))
    protocols: tuple[str, ...] = setting(PROTOCOLS, "protocols of probes", Several(PROTOCOLS))
    pixels: int = setting(
        256, "number of pixels drawn from each training image for each seed", Whole(2, 1 << 20)
    )
    probe: str = setting(
        "regression",
        "kind of the probes of `seg`: `regression`, logistic regression on drawn pixels, or "
        "`adamw`, a 1×1 convolution trained on all pixels, as in published comparisons",
        Choice(PROBES),
    )
    max_train: int | None = setting(
        None,
        "largest number of training images, drawn at random; `None` for all",
        Whole(optional=True),
    )
    max_test: int | None = setting(
        None,
        "largest number of test images (correspondence: pairs; propagation: videos), drawn at "
        "random; `None` for all",
        Whole(optional=True),
    )
    split_seed: int = setting(
        0, "seed of automatic splits, and of draws by `max_train` and `max_test`", Whole(0)
    )
    views: int = setting(
        5, "number of jittered views of each test image, for consistency", Whole(1, 1 << 16)
    )
    downsamplers: tuple[str, ...] = setting(
        ("box", "attention"),
        "downsamplers to the backbone's grid, for consistency",
        Several(DOWNSAMPLERS),
    )
    pictures: int = setting(
        5,
        "number of test images in the report, evenly spaced over the list",
        Whole(0, 1 << 10),
    )

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a setting is out of its range.
        """
        check(self)

    def choose_pictures(self, count: int) -> list[int]:
        """Return indices of the samples to show, evenly spaced over ``count``, not hand-picked."""
        shown = min(self.pictures, count)
        return [(2 * index + 1) * count // (2 * shown) for index in range(shown)]

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)
