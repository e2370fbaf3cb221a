"""Implicit features and their renderings as files: written whole or not at all, resumable."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from upfeat import locks, machine
from upfeat._version import __version__
from upfeat.array_files import create_array
from upfeat.backbones import Backbone
from upfeat.decoding import MAX_PIXELS, image_size
from upfeat.images import read_image
from upfeat.implicit.features import ImplicitFeatures
from upfeat.implicit.fit import FitConfig, FitProgress, OnFit, check_memory, fit_implicit
from upfeat.marks import FEATURES, encode_picture, kind_of
from upfeat.optional import import_optional
from upfeat.outputs import Outputs, check_space, digest, file_digest, is_done, watched
from upfeat.provenance import identify_backbone
from upfeat.storage import replacing, replacing_folder, write_bytes
from upfeat.tensor_checks import all_finite, check_not_too_small, largest_magnitude
from upfeat.visualize import PCABasis, side_by_side, to_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

RENDERINGS = (".safetensors", ".npy", ".zarr", ".png", ".jpg", ".jpeg")
"""Endings that :func:`write_rendering` can write."""

_PICTURES = (".png", ".jpg", ".jpeg")
# Measured memory in bytes per pixel of a picture while it is drawn.
_DRAWING = 60


def fit_photograph(
    photo: Path,
    backbone: Backbone,
    config: FitConfig,
    output: Path,
    *,
    picture: Path | None = None,
    guidance: bool = True,
    max_pixels: int = MAX_PIXELS,
    reading: Mapping[str, Any] | None = None,
    made_by: str | None = None,
    on_step: OnFit | None = None,
) -> ImplicitFeatures:
    """Fit one photograph and write the result.

    If the picture does not exist yet, it is drawn from the fit's first result and then updated.

    Args:
        photo: an image file.
        backbone: extracts the features.
        config: settings of the fit.
        output: the safetensors file; replaced when the fit has ended.
        picture: file in which to draw the image and its features, or ``None``.
        guidance: store the image in the output.
        max_pixels: limit of the photograph's size, for :func:`upfeat.images.read_image`.
        reading: further options of :func:`upfeat.images.read_image` that change the pixels, such as
            ``bands`` and ``max_value``.
        made_by: result of ``identify_backbone``, if it was called already.
        on_step: called with the progress of the fit.

    Raises:
        FileNotFoundError: there is no such photograph.
        ValueError: :func:`fit_implicit` refuses the image or a setting, memory does not suffice, or
            another process writes the output.
        OSError: writing failed.
    """
    early = picture if picture is not None and not picture.exists() else None

    def tell(progress: FitProgress) -> None:
        if early is not None and progress.features is not None:
            write_picture(progress.features, early)
        if on_step is not None:
            on_step(progress)

    with watched(photo) as source:
        own = image_size(photo)
        if own is not None:  # before it is decoded
            check_memory(photo, own, backbone, config)
        pixels = read_image(photo, max_pixels=max_pixels, **(reading or {}))
    made_by = made_by or identify_backbone(backbone)
    recipe = _recipe(source, made_by, config, guidance=guidance, reading=reading)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locks.hold(output):
            features = fit_implicit(pixels, backbone, config, on_step=tell)
            features.facts |= {**recipe, "recipe": digest(recipe)}
            _write(features, output, picture, digest(recipe), guidance=guidance)
    except BaseException:
        if early is not None:
            early.unlink(missing_ok=True)
        raise
    return features


def _write(
    features: ImplicitFeatures, output: Path, picture: Path | None, recipe: str, *, guidance: bool
) -> None:
    """Write the features, and the picture if there is a path for it; both files or neither."""
    if picture is None:
        features.save(output, guidance=guidance)
        return
    with replacing(picture) as temporary:
        temporary.write_bytes(_drawn(features, picture.suffix, recipe))
        features.save(output, guidance=guidance)


def is_fitted(
    photo: Path,
    backbone: Backbone,
    config: FitConfig,
    output: Path,
    *,
    picture: Path | None = None,
    guidance: bool = True,
    reading: Mapping[str, Any] | None = None,
) -> bool:
    """Return whether an earlier run has written the files that :func:`fit_photograph` would write.

    The arguments are those of :func:`fit_photograph`.
    """
    try:
        made_by = identify_backbone(backbone)
        recipe = recipe_of(photo, made_by, config, guidance=guidance, reading=reading)
    except OSError:
        return False
    return is_done(Outputs(output, picture), recipe)


def recipe_of(
    photo: Path,
    made_by: str,
    config: FitConfig,
    *,
    guidance: bool,
    reading: Mapping[str, Any] | None = None,
) -> str:
    """Return a digest of everything that the fit of a photograph depends on; outputs record it.

    Args:
        photo: the image file.
        made_by: result of ``identify_backbone``.
        config: settings of the fit.
        guidance: whether the image is stored in the output.
        reading: see :func:`fit_photograph`.

    Raises:
        OSError: the photograph cannot be read.
    """
    source = file_digest(photo)
    return digest(_recipe(source, made_by, config, guidance=guidance, reading=reading))


def write_picture(features: ImplicitFeatures, path: Path) -> None:
    """Draw the image and a PCA of its features side by side, at the size of the fit."""
    write_bytes(path, _drawn(features, path.suffix, ""))


def _drawn(features: ImplicitFeatures, suffix: str, recipe: str) -> bytes:
    image = to_image(features.guidance.float() / 255)
    panels = [("image", image), ("implicit features", draw(features))]
    return encode_picture(side_by_side(panels), suffix, recipe=recipe)


def draw(features: ImplicitFeatures, output_size: tuple[int, int] | None = None) -> Image.Image:
    """Draw the three main components of features as colours.

    The components and the range of colours are computed from a small map, so that they do not
    depend on the size of the picture.

    Args:
        features: features to draw.
        output_size: (height, width) of the picture, pixels; ``None`` for the size of the fit.
    """
    height, width = features.shape[2:]
    basis = PCABasis(features.render((max(height // 8, 2), max(width // 8, 2)))[0])
    projected = features.project(basis.basis.T, -basis.mean @ basis.basis, output_size=output_size)
    return to_image(basis.colours(projected[0]))


def write_rendering(
    features: ImplicitFeatures,
    path: Path,
    output_size: tuple[int, int] | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    on_rows: Callable[[int, int], None] | None = None,
) -> None:
    """Render features to a file, a strip at a time: the map may be larger than the memory.

    Args:
        features: features to render.
        path: the file, in the format of its suffix: ``.safetensors`` (a tensor ``features``),
            ``.npy`` or ``.zarr`` for (C, H, W) values; ``.png`` or ``.jpg`` for a picture of three
            components.
        output_size: (height, width), pixels; ``None`` for the size of the fit.
        dtype: type of values: ``torch.float16`` or ``torch.float32``.
        on_rows: called with the number of rows written and the number of all rows.

    Raises:
        ValueError: the suffix or dtype is another, values overflow float16 or are too small for it,
            the folder does not exist, memory does not suffice for a picture, or zarr is not
            installed.
        OSError: writing failed.
    """
    suffix = path.suffix.lower()
    if suffix not in RENDERINGS:
        raise ValueError(f"{path}: cannot write {suffix or 'this'}; use {', '.join(RENDERINGS)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
    size = output_size or (features.shape[2], features.shape[3])
    if suffix in _PICTURES:
        _check_drawing(path, size)
        write_bytes(path, encode_picture(draw(features, output_size), suffix))
        return
    name = str(dtype).removeprefix("torch.")
    if name not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype} must be torch.float16 or torch.float32")
    shape = (features.shape[1], *size)
    largest = 0.0
    with _create(path, shape, name) as write_rows:
        for top, strip in features.strips(size):
            largest = max(largest, largest_magnitude(strip))
            values = strip.to(dtype)
            if not all_finite(values):
                raise ValueError(f"{path}: features overflow {name}; write float32")
            write_rows(top, values.numpy())
            if on_rows is not None:
                on_rows(top + strip.shape[1], size[0])
        check_not_too_small(f"{path}: features", largest, dtype, "write float32")


WriteRows = Callable[[int, "NDArray[Any]"], None]
"""Function that writes rows: given the index of the first row, and the rows (C, rows, W)."""


@contextmanager
def _create(path: Path, shape: tuple[int, int, int], dtype: str) -> Iterator[WriteRows]:
    if path.suffix.lower() == ".zarr":
        with _create_zarr(path, shape, dtype) as write_rows:
            yield write_rows
        return
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    check_space(path, needed)
    facts = {"format": FEATURES, "upfeat_version": __version__}
    with create_array(path, shape, dtype, facts) as array:
        yield array.write_rows


@contextmanager
def _create_zarr(path: Path, shape: tuple[int, int, int], dtype: str) -> Iterator[WriteRows]:
    missing = f"{path}: writing zarr needs the package zarr: pip install 'upfeat[zarr]'"
    zarr = import_optional("zarr", missing)
    if path.exists() and kind_of(path) != FEATURES:
        raise ValueError(f"{path}: exists already; remove it first")
    with replacing_folder(path) as temporary:
        chunks = (shape[0], min(64, shape[1]), min(64, shape[2]))
        array = zarr.open_array(str(temporary), mode="w", shape=shape, chunks=chunks, dtype=dtype)
        array.attrs.update({"format": FEATURES, "upfeat_version": __version__})

        def write_rows(top: int, values: NDArray[Any]) -> None:
            array[:, top : top + values.shape[1]] = values

        yield write_rows


def _check_drawing(path: Path, size: tuple[int, int]) -> None:
    """Refuse a picture that would not fit into memory."""
    needed, available = size[0] * size[1] * _DRAWING, machine.available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"{path}: a picture of {size[1]}x{size[0]} pixels needs about "
            f"{machine.readable(needed)} and {machine.readable(available)} of memory are free; "
            f"give a smaller --size, or write values (.npy, .safetensors), which need little"
        )


def _recipe(
    source: str,
    made_by: str,
    config: FitConfig,
    *,
    guidance: bool,
    reading: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return everything that a fit depends on, as JSON values."""
    recipe = {
        "source": source,
        "backbone_identity": hashlib.sha256(made_by.encode()).hexdigest(),
        "config": asdict(config),
        "guidance": guidance,
    }
    return recipe | ({"reading": dict(reading)} if reading else {})
