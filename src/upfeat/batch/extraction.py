"""Kind and settings of the results of an extraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from upfeat._version import __version__
from upfeat.bounds import indices, instance, number, quoted, shown, whole
from upfeat.heads import SavedHead, describe_backbone
from upfeat.model import FeatUp
from upfeat.provenance import digest

KINDS = ("lazy", "features", "head")


@dataclass(frozen=True)
class Extraction:
    """Kind and settings of the result of every image.

    Attributes:
        kind: "lazy": coarse features and guidance, about a fiftieth of the full map's size, from
            which parts of the full map are computed when read; "features": the full map; "head":
            the output of a linear head at every pixel.
        size: shorter side, pixels, to which images are resized; ``None``: not resized.
        dtype: type of stored maps, "float16" or "float32".
        head: the linear head, for the kind "head" only.
        bands: bands to use of images with several, counted from 0; ``None`` for the first ones.
        max_value: value that becomes white; ``None`` for the largest of the image's type.
    """

    kind: str = "lazy"
    _: KW_ONLY
    size: int | None = None
    dtype: str = "float16"
    head: SavedHead | None = None
    bands: Sequence[int] | None = None
    max_value: float | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            TypeError: ``head`` is not a :class:`upfeat.heads.SavedHead`.
            ValueError: a setting is out of range, or kind and head do not go together.
        """
        if self.kind not in KINDS:
            raise ValueError(f"kind={quoted(self.kind)} must be one of {', '.join(KINDS)}")
        if self.head is not None:
            instance(
                "head", self.head, SavedHead, "give a head, as upfeat.heads.load_head reads it"
            )
        if (self.kind == "head") != (self.head is not None):
            raise ValueError(f'kind="{self.kind}" and head={shown(self.head)} do not go together')
        whole("size", self.size, optional=True)
        if self.bands is not None and not indices(self.bands, 0, 1 << 16):
            raise ValueError(f"bands={shown(self.bands)} must be numbers of bands, from 0")
        if self.max_value is not None:
            number("max_value", self.max_value, 0, above=True)
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"dtype={quoted(self.dtype)} must be float16 or float32")

    @property
    def reading(self) -> dict[str, Any]:
        """Options of :func:`upfeat.images.read_image` that were given."""
        bands = None if self.bands is None else [int(band) for band in self.bands]
        given = {"bands": bands, "max_value": self.max_value}
        return {name: value for name, value in given.items() if value is not None}

    def settings(self, model: FeatUp) -> dict[str, Any]:
        """Return everything but the images that determines the results, as JSON values."""
        head = self.head
        return {
            "upfeat_version": __version__,
            "kind": self.kind,
            "size": self.size,
            "dtype": self.dtype,
            **self.reading,
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
