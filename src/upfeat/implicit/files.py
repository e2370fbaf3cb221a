"""Implicit features and their renderings as files: written whole or not at all, resumable."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from upfeat._version import __version__
from upfeat.backbones import Backbone
from upfeat.implicit.features import FORMAT, ImplicitFeatures
from upfeat.implicit.fit import FitConfig, FitProgress, OnFit, fit_implicit
from upfeat.storage import replacing
from upfeat.visualize import PCABasis, side_by_side, to_image

RENDERINGS = (".safetensors", ".npy", ".zarr", ".png", ".jpg", ".jpeg")
"""What :func:`write_rendering` can write."""

_PICTURES = (".png", ".jpg", ".jpeg")
_DTYPES = {"float16": "F16", "float32": "F32"}


def find_photographs(paths: list[Path]) -> list[Path]:
    """Replace every folder by the image files in it, sorted by name; others stay as they are.

    Raises:
        ValueError: a folder holds no image file.
    """
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in known and p.is_file())
        if not inside:
            raise ValueError(f"{path}: no image file in this folder")
        found += inside
    return found


def fit_photograph(
    photo: Path,
    backbone: Backbone,
    config: FitConfig,
    output: Path,
    *,
    picture: Path | None = None,
    guidance: bool = True,
    on_step: OnFit | None = None,
) -> ImplicitFeatures:
    """Fit one photograph and write the result; the picture appears as soon as there is a first one.

    Args:
        photo: an image file.
        backbone: makes the features.
        config: settings.
        output: the safetensors file; replaced when the fit has ended.
        picture: where to draw image and features, or ``None``.
        guidance: keep the image in the file.
        on_step: is told of progress.

    Raises:
        FileNotFoundError: there is no such photograph.
        ValueError: as :func:`fit_implicit`.
        OSError: writing failed.
    """

    def tell(progress: FitProgress) -> None:
        if picture is not None and progress.features is not None:
            write_picture(progress.features, picture)
        if on_step is not None:
            on_step(progress)

    features = fit_implicit(photo, backbone, config, on_step=tell)
    features.facts |= _recipe(photo, backbone, config)
    features.save(output, guidance=guidance)
    if picture is not None:
        write_picture(features, picture)
    return features


def is_fitted(photo: Path, backbone: Backbone, config: FitConfig, output: Path) -> bool:
    """Whether ``output`` is what :func:`fit_photograph` would write, from an earlier run."""
    if not output.is_file() or not photo.is_file():
        return False
    try:
        with safe_open(output, framework="pt") as file:
            known = file.metadata() or {}
        facts = json.loads(known.get("facts", "{}"))
    except (SafetensorError, ValueError, OSError):
        return False
    if known.get("format") != FORMAT or known.get("upfeat_version") != __version__:
        return False
    return all(facts.get(key) == value for key, value in _recipe(photo, backbone, config).items())


def write_picture(features: ImplicitFeatures, path: Path) -> None:
    """Draw the image beside a PCA of its features, at the size of the fit."""
    image = to_image(features.guidance.float() / 255)
    panels = [("image", image), ("implicit features", draw(features))]
    with replacing(path) as temporary:
        side_by_side(panels).save(temporary)


def draw(features: ImplicitFeatures, output_size: tuple[int, int] | None = None) -> Image.Image:
    """The three main components of features as colours.

    The basis and the range of colours are those of a small map, so that they are the same at every
    size.

    Args:
        features: what to draw.
        output_size: (height, width) of the picture; ``None`` for that of the fit.
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
    """Render to a file, a strip at a time: the map may be larger than the memory.

    Args:
        features: to render.
        path: its suffix says how: ``.safetensors`` (a tensor ``features``), ``.npy`` or ``.zarr``
            for (C, H, W) values; ``.png`` or ``.jpg`` for a picture of three components.
        output_size: (height, width); ``None`` for that of the fit.
        dtype: of values: ``torch.float16`` or ``torch.float32``.
        on_rows: is told rows done and of how many.

    Raises:
        ValueError: another suffix or dtype, values that overflow float16, or zarr is not installed.
        OSError: writing failed.
    """
    suffix = path.suffix.lower()
    if suffix not in RENDERINGS:
        raise ValueError(f"{path}: cannot write {suffix or 'this'}; use {', '.join(RENDERINGS)}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
    if suffix in _PICTURES:
        with replacing(path) as temporary:
            draw(features, output_size).save(temporary)
        return
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype={dtype} must be torch.float16 or torch.float32")
    size = output_size or (features.shape[2], features.shape[3])
    shape = (features.shape[1], *size)
    create = {".npy": _create_npy, ".zarr": _create_zarr}.get(suffix, _create_safetensors)
    with create(path, shape, name) as array:
        for top, strip in features.strips(size):
            values = strip.to(dtype)
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{path}: features overflow {name}; write float32")
            bottom = top + strip.shape[1]
            array[:, top:bottom] = values.numpy()
            if on_rows is not None:
                on_rows(bottom, size[0])


@contextmanager
def _create_npy(path: Path, shape: tuple[int, ...], dtype: str) -> Iterator[Any]:
    with replacing(path) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        yield array
        array.flush()


@contextmanager
def _create_safetensors(path: Path, shape: tuple[int, ...], dtype: str) -> Iterator[Any]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    entry = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    facts = {"format": "upfeat-features", "upfeat_version": __version__}
    header = json.dumps({"__metadata__": facts, "features": entry}).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
        array = np.memmap(temporary, dtype=dtype, mode="r+", offset=8 + len(header), shape=shape)
        yield array
        array.flush()


@contextmanager
def _create_zarr(path: Path, shape: tuple[int, ...], dtype: str) -> Iterator[Any]:
    try:
        zarr = importlib.import_module("zarr")
    except ImportError:
        raise ValueError(
            f"{path}: writing zarr needs the package zarr: pip install 'upfeat[zarr]'"
        ) from None
    if path.exists():
        raise ValueError(f"{path}: exists already; remove it first")
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        inside = folder / path.name
        chunks = (shape[0], min(64, shape[1]), min(64, shape[2]))
        yield zarr.open_array(str(inside), mode="w", shape=shape, chunks=chunks, dtype=dtype)
        inside.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _recipe(photo: Path, backbone: Backbone, config: FitConfig) -> dict[str, Any]:
    """All that a fit depends on, as JSON values."""
    return {
        "source": hashlib.sha256(photo.read_bytes()).hexdigest(),
        "backbone": backbone.name,
        "config": asdict(config),
    }
