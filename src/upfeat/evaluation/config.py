"""What an evaluation can be told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PROTOCOLS = ("own", "transfer", "probabilities")

DOWNSAMPLERS = ("box", "simple", "attention")


@dataclass(frozen=True)
class EvalConfig:
    """Settings; every one of them may change scores, and all are written beside them.

    Attributes:
        size: shorter side of the images as evaluated, pixels; labels are brought to the same size.
        seeds: how many repetitions: 0, 1, …
        protocols: of probes, among :data:`PROTOCOLS`.
        pixels: drawn from each training image for each seed.
        max_train: at most so many training images, drawn at random; ``None`` for all.
        max_test: at most so many test images; ``None`` for all.
        split_seed: of automatic splits and of ``max_train`` and ``max_test``.
        views: jittered views of each test image, for consistency.
        downsamplers: ways back to the backbone's grid, among :data:`DOWNSAMPLERS`, likewise.
        pictures: test images shown in the report, evenly spaced over the list.
    """

    size: int = 224
    seeds: int = 3
    protocols: tuple[str, ...] = PROTOCOLS
    pixels: int = 256
    max_train: int | None = None
    max_test: int | None = None
    split_seed: int = 0
    views: int = 5
    downsamplers: tuple[str, ...] = ("box", "attention")
    pictures: int = 5

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a setting is out of its range.
        """
        for name in ("size", "seeds", "pixels", "max_train", "max_test", "views"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        if self.pixels < 2:
            raise ValueError(f"pixels={self.pixels} must be 2 or more")
        if self.pictures < 0:
            raise ValueError(f"pictures={self.pictures} must be 0 or more")
        for name, known in (("protocols", PROTOCOLS), ("downsamplers", DOWNSAMPLERS)):
            value = getattr(self, name)
            if not value or not set(value) <= set(known) or len(set(value)) < len(value):
                raise ValueError(f"{name}={value} must be one or more of {known}, each once")

    def choose_pictures(self, count: int) -> list[int]:
        """Indices of the samples to show, of ``count``: evenly spaced, never chosen by eye."""
        shown = min(self.pictures, count)
        return [(2 * index + 1) * count // (2 * shown) for index in range(shown)]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
