"""Files of dense feature grids in the format of pathology tools such as slide2vec.

A grid is a pair of files. ``ID.pt`` contains the tensor (d, gh, gw). ``ID.meta.json`` contains the
geometry: the image's size, the size padded at the bottom and on the right to whole patches, and the
grid. The geometry is written last, so its presence shows that the tensor is complete.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upfeat.bounds import instance, path_of, quoted, whole
from upfeat.feature_map import check_tensor
from upfeat.geometry import reflect_pad
from upfeat.model import FeatUp
from upfeat.storage import replacing
from upfeat.tensor_checks import check_not_too_small, fault_in_memory, largest_magnitude
from upfeat.types import Size, shapes_repr
from upfeat.upsamplers.checks import check_output_size
from upfeat.upsamplers.tensor_files import check_archive

if TYPE_CHECKING:
    from upfeat.images import ImageLike


@dataclass(frozen=True, eq=False)
class DenseGrid:
    """Features of one image on a coarse grid, with the geometry of the grid.

    Attributes:
        features: (d, gh, gw), d channels on gh × gw cells.
        target_size: (height, width) of the image, pixels.
        patch_size: (height, width) of a cell, pixels.
        facts: further entries of the geometry, such as the name of the encoder.
    """

    features: Tensor
    target_size: Size
    patch_size: Size
    facts: Mapping[str, Any] = field(default_factory=dict)

    __repr__ = shapes_repr

    def __post_init__(self) -> None:
        """Check that the cells of the grid cover the image once.

        Raises:
            TypeError: ``features`` is not a tensor.
            ValueError: there are too many or too few cells, ``features`` is not (d, gh, gw), or a
                size is not two whole numbers.
        """
        check_tensor("features", self.features)
        if self.features.dim() != 3:
            raise ValueError(f"features must be (d, gh, gw), not {tuple(self.features.shape)}")
        for name in ("target_size", "patch_size"):
            check_output_size(getattr(self, name), name)
        sides = zip(self.features.shape[1:], self.target_size, self.patch_size, strict=True)
        for cells, pixels, patch in sides:
            if cells < 1 or patch < 1 or cells != -(-pixels // patch):
                raise ValueError(
                    f"a grid of {tuple(self.features.shape[1:])} cells of {self.patch_size} pixels "
                    f"does not cover an image of {self.target_size} pixels once"
                )

    @property
    def encoded_size(self) -> Size:
        """(height, width) of the padded image that the grid covers, pixels."""
        _, rows, columns = self.features.shape
        return rows * self.patch_size[0], columns * self.patch_size[1]

    @property
    def pad(self) -> Size:
        """Padded rows below the image and padded columns right of it, pixels."""
        height, width = self.encoded_size
        return height - self.target_size[0], width - self.target_size[1]

    def upsample(self, model: FeatUp, image: ImageLike, output_size: Size | None = None) -> Tensor:
        """Upsample the grid, made by any encoder, with its image as guidance.

        Args:
            model: its upsampler is used, its backbone's normalisation of images, and, if the model
                uses early layers, its backbone for these.
            image: the image that the grid was made from, of ``target_size`` pixels.
            output_size: (height, width) of the result, pixels; ``None`` for the image's size.

        Returns:
            (d, *output_size).

        Raises:
            TypeError: ``model`` is no :class:`upfeat.FeatUp`.
            ValueError: the image has another size, or ``output_size`` is no size.
        """
        instance("model", model, FeatUp, "give what upfeat.load() returns")
        wanted = self.target_size if output_size is None else check_output_size(output_size)
        x = model.preprocess(image)
        size = (x.shape[2], x.shape[3])
        if size != tuple(self.target_size):
            raise ValueError(
                f"the image has {size} pixels, and the grid is of one of {self.target_size}"
            )
        x = _padded(x, self.encoded_size)
        scaled = tuple(
            round(out * encoded / target)
            for out, encoded, target in zip(wanted, self.encoded_size, size, strict=True)
        )
        with torch.inference_mode():
            features = self.features[None].to(x)
            hidden = model.backbone.hidden(x) if model.early else None
            given = features, model.guidance(x), (scaled[0], scaled[1])
            out = model.upsampler(*given, hidden=hidden)
        return out[0, :, : wanted[0], : wanted[1]]


def encode_grid(model: FeatUp, image: ImageLike) -> DenseGrid:
    """Compute the grid of one image; sides are padded by reflection, not resized, to whole cells.

    Args:
        model: its backbone computes the features.
        image: any image that :meth:`upfeat.FeatUp.preprocess` reads.

    Raises:
        TypeError: ``model`` is no :class:`upfeat.FeatUp`.
        ValueError: the image cannot be read.
    """
    instance("model", model, FeatUp, "give what upfeat.load() returns")
    x = model.preprocess(image)
    size, stride = (x.shape[2], x.shape[3]), model.backbone.stride
    grid = (-(-size[0] // stride), -(-size[1] // stride))
    encoded = (grid[0] * stride, grid[1] * stride)
    if model.backbone.grid_aligned(encoded) != encoded:  # a finer grid than that of its network
        step = stride * model.backbone.step
        encoded = (-(-size[0] // step) * step, -(-size[1] // step) * step)
    with torch.inference_mode():
        features = model.backbone(_padded(x, encoded))[0, :, : grid[0], : grid[1]]
    facts = {"encoder_name": model.backbone.name, "pad_mode": "reflect"}
    return DenseGrid(features.cpu(), size, (stride, stride), facts)


def _padded(x: Tensor, encoded: Size) -> Tensor:
    """Pad a normalised image at the bottom and on the right, by reflection, to a size."""
    radius = max(encoded[0] - x.shape[2], encoded[1] - x.shape[3])
    if not radius:
        return x
    return reflect_pad(x, radius)[:, :, radius:, radius:][:, :, : encoded[0], : encoded[1]]


def write_grid(folder: str | Path, name: str, grid: DenseGrid, dtype: str = "float32") -> Path:
    """Write a grid and then its geometry.

    Args:
        folder: an existing folder.
        name: name of the sample, ID in the names of both files.
        grid: grid to write.
        dtype: type of the stored features, "float32" or "float16".

    Returns:
        The path of the tensor, ``ID.pt``.

    Raises:
        TypeError: ``name`` is no text, ``grid`` no :class:`DenseGrid`, or an entry of its ``facts``
            cannot be written as JSON.
        ValueError: ``name`` is a path, ``dtype`` is neither of these, the features contain NaN,
            infinity or values that overflow it, or all are too small for float16.
        OSError: writing failed.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype={quoted(dtype)} must be float32 or float16")
    instance("grid", grid, DenseGrid, "give a DenseGrid, as encode_grid() returns it")
    if not instance("name", name, str, "give a text") or Path(name).name != name:
        raise ValueError(f"name={quoted(name)} must be the name of a file, without a folder")
    path = path_of("folder", folder) / f"{name}.pt"
    largest = largest_magnitude(grid.features)
    check_not_too_small(f"{path}: features", largest, getattr(torch, dtype), "take float32")
    stored = grid.features.to(getattr(torch, dtype)).contiguous().clone()
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"{path}: not written: features hold NaN or infinity in {dtype}")
    content = io.BytesIO()
    torch.save(stored, content)
    geometry = {
        "encoder_level": "tile",
        "pad_mode": "reflect",
        "feature_kind": "patch_features",
        "window_size": None,
        "overlap": 0.0,
        **grid.facts,
        "sample_id": name,
        "artifact_type": "dense_image_embeddings",
        "format": "pt",
        "dtype": dtype,
        "feature_dim": len(grid.features),
        "grid_shape": list(grid.features.shape[1:]),
        "target_size": list(grid.target_size),
        "patch_size": list(grid.patch_size),
        "encoded_size": list(grid.encoded_size),
        "pad": list(grid.pad),
    }
    text = json.dumps(geometry, indent=1) + "\n"
    # Both are written before either replaces an earlier file, lest a full disk leave a mixture.
    with replacing(_geometry_path(path)) as described, replacing(path) as temporary:
        described.write_bytes(text.encode())
        temporary.write_bytes(content.getvalue())
        _geometry_path(path).unlink(missing_ok=True)  # it must not vouch for a new tensor
    return path


def read_grid(path: str | Path) -> DenseGrid:
    """Read a grid with its geometry, written by any tool; no code in the files is run.

    Args:
        path: path of the tensor, ``ID.pt``.

    Raises:
        FileNotFoundError: the tensor or its geometry does not exist.
        ValueError: a file is damaged, or the geometry does not fit the tensor.
    """
    path = path_of("path", path)
    for one in (path, _geometry_path(path)):
        if not one.is_file():
            raise FileNotFoundError(f"{one}: no such file")
    try:
        geometry = json.loads(_geometry_path(path).read_text(encoding="utf-8"))
        target, patch = (_size(geometry[name]) for name in ("target_size", "patch_size"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{_geometry_path(path)}: no geometry of a grid ({error})") from None
    check_archive(path)
    try:
        features = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # damaged files raise errors of zipfile, pickle, struct and torch
        raise ValueError(f"{path}: not a tensor, or a damaged file") from None
    if not isinstance(features, Tensor):
        raise ValueError(f"{path}: holds a {type(features).__name__}, not a tensor")
    fault = fault_in_memory(features)
    if fault is not None:
        raise ValueError(f"{path}: its tensor {fault}")
    try:
        return DenseGrid(features.detach(), target, patch, geometry)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _size(value: Any) -> Size:
    """Return (height, width) of a JSON value: a pair, or one number for a square."""
    height, width = (value, value) if isinstance(value, int) else value
    return whole("height", height), whole("width", width)


def _geometry_path(path: Path) -> Path:
    return path.with_suffix(".meta.json")
