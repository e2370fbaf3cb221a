"""Kind and settings of the results of an extraction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from upfeat._version import __version__
from upfeat.bounds import whole
from upfeat.heads import SavedHead, describe_backbone
from upfeat.model import FeatUp
from upfeat.provenance import digest

KINDS = ("lazy", "features", "head")


@dataclass(frozen=True)
class Extraction:
    """Kind and settings of the result of every image.

    Attributes:
        kind: "lazy": coarse features and guidance, about a hundredth of the full map's size, from
            which parts of the full map are computed when read; "features": the full map; "head":
            the output of a linear head at every pixel.
        size: shorter side, pixels, to which images are resized; ``None``: not resized.
        dtype: type of stored maps, "float16" or "float32".
        head: the linear head, for the kind "head" only.
    """

    kind: str = "lazy"
    size: int | None = None
    dtype: str = "float16"
    head: SavedHead | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: a setting is out of range, or kind and head do not go together.
        """
        if self.kind not in KINDS:
            raise ValueError(f'kind="{self.kind}" must be one of {", ".join(KINDS)}')
        if (self.kind == "head") != (self.head is not None):
            raise ValueError(f'kind="{self.kind}" and head={self.head!r} do not go together')
        whole("size", self.size, optional=True)
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f'dtype="{self.dtype}" must be float16 or float32')

    def settings(self, model: FeatUp) -> dict[str, Any]:
        """Return everything but the images that determines the results, as JSON values."""
        head = self.head
        return {
            "upfeat_version": __version__,
            "kind": self.kind,
            "size": self.size,
            "dtype": self.dtype,
            "backbone": describe_backbone(model.backbone),
            "early": model.early,
            "displacement": model.backbone.displacement,
            "upsampler": {
                "name": model.upsampler.name,
                "config": model.upsampler.config(),
                "weights": digest(model.upsampler),
            },
            "head": None if head is None else {"names": head.names, "identity": head.identity()},
        }
