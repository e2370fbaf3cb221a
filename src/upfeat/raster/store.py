"""Storage of an output while its tiles are written, so that an interrupted run can be resumed.

An unfinished output is a folder ``NAME.partial``: a sharded Zarr array, the settings that the
output was begun with, and a ledger of the finished tiles. One tile is one shard, so a tile whose
writing was interrupted is written again as a whole, and interruptions never change a byte of the
finished output. A complete output is moved to its final name.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upfeat.bounds import path_of, whole
from upfeat.failures import one_line
from upfeat.optional import import_optional
from upfeat.raster.axes import write_axes
from upfeat.raster.cog import write_cog
from upfeat.raster.outputs import NO_CLASS
from upfeat.raster.plan import CHUNK
from upfeat.raster.scene import Scene, open_raster
from upfeat.storage import move, naming, replacing, write_bytes
from upfeat.strict_json import read_object
from upfeat.upsamplers import Window

FORMAT = "upfeat-raster-1"
_SETTINGS, _LEDGER = "settings.json", "tiles.txt"
_ARRAY = "features"
_COG = "cog.tif"
_PARTS = "parts"
_RUN = "run"
_OLD = "replaced"


def _import_zarr() -> Any:
    missing = "writing rasters needs zarr 3 (Python 3.11 or newer): pip install 'upfeat[raster]'"
    zarr = import_optional("zarr", missing)
    if int(zarr.__version__.split(".")[0]) < 3:
        raise ValueError(missing)
    return zarr


class Store:
    """The output of one raster, from its first tile to its final file.

    Attributes:
        output: the final path, ``.zarr`` or ``.tif``.
        partial: the folder of the unfinished output.
        done: indices of the tiles that were finished before this run.
    """

    def __init__(
        self,
        output: Path,
        shape: tuple[int, int, int],
        dtype: np.dtype[Any],
        tile: int,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Begin an output, or open an unfinished one.

        Args:
            output: path of the result; must end in ``.zarr``, ``.tif`` or ``.tiff``.
            shape: (K, height, width) of the result.
            dtype: type of the values.
            tile: side of a tile, pixels.
            settings: everything that determines the result, as JSON values.
            resume: continue an unfinished output.
            overwrite: replace an existing output, finished or not.

        Raises:
            ValueError: the output exists already, was begun with other settings, or cannot be
                written.
        """
        self.output, self.partial = output, _partial(output)
        if output.suffix.lower() not in (".zarr", ".tif", ".tiff"):
            raise ValueError(f"{output}: must end in .zarr or .tif")
        self._zarr = _import_zarr()
        self._shape, self._dtype, self._tile = shape, dtype, tile
        self._settings = json.loads(json.dumps({"format": FORMAT, "tile": tile, **settings}))
        self.done: set[int] = set()
        if (output.exists() or output.is_symlink()) and not overwrite:
            raise ValueError(f"{output}: exists already; give another name, or --overwrite")
        try:
            if self.partial.exists() and not overwrite:
                self._go_on(resume)
            else:
                self._begin()
        except OSError as error:
            raise ValueError(f"{self.partial}: cannot be written ({error.strerror})") from None
        self._run = uuid.uuid4().hex
        write_bytes(self.partial / _RUN, self._run.encode())
        self._writer = self.writer()
        self._ledger = (self.partial / _LEDGER).open("a", encoding="ascii")

    def _begin(self) -> None:
        if self.partial.exists():
            if not _is_unfinished(self.partial):
                raise ValueError(f"{self.partial}: is not an unfinished raster; remove it")
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        empty, attribute = _fill_value(self._dtype)
        chunk = next(side for side in range(CHUNK, 0, -1) if self._tile % side == 0)
        self._zarr.create_array(
            str(self.partial / _ARRAY),
            shape=self._shape,
            dtype=self._dtype,
            chunks=(self._shape[0], chunk, chunk),
            shards=(self._shape[0], self._tile, self._tile),
            fill_value=empty,
            dimension_names=("feature", "y", "x"),
            attributes={
                "grid_mapping": "spatial_ref",
                "coordinates": "spatial_ref",
                "_FillValue": attribute,
            },
        )
        # Last, since the settings mark an output that can be resumed.
        _write_json(self.partial / _SETTINGS, self._settings)

    def _go_on(self, resume: bool) -> None:
        path = self.partial / _SETTINGS
        if not path.is_file():
            self._begin()  # the run before was killed before it wrote its settings
            return
        if not resume:
            raise ValueError(
                f"{self.partial}: holds an unfinished raster; go on by --resume, or begin anew by "
                "--overwrite"
            )
        before = read_object(path)
        others = _differing(before, self._settings)
        if others:
            raise ValueError(
                f"{self.partial}: was begun with another {', '.join(others)}; give what it was "
                "begun with, or begin anew by --overwrite"
            )
        self._check_array()
        ledger = self.partial / _LEDGER
        if ledger.is_file():
            lines = ledger.read_bytes().splitlines(keepends=True)
            done = [line for line in lines if line.endswith(b"\n")]
            write_bytes(ledger, b"".join(done))
            if not all(line.strip().isdigit() for line in done):
                raise ValueError(f"{ledger}: damaged; begin anew by --overwrite")
            self.done = {int(line) for line in done}

    def _check_array(self) -> None:
        """Refuse to go on with an array whose metadata are damaged, or are those of another."""
        try:
            array = self._zarr.open_array(str(self.partial / _ARRAY), mode="r")
            found = (tuple(array.shape), array.dtype, array.shards)
            reason = "has another shape, type or tile"
        except Exception as error:  # zarr trusts the file, so any error can follow
            found, reason = None, one_line(error)[:200]
        if found != (self._shape, self._dtype, (self._shape[0], self._tile, self._tile)):
            raise ValueError(
                f"{self.partial / _ARRAY}: damaged ({reason}); begin anew by --overwrite"
            )

    def write(self, index: int, window: Window, values: np.ndarray[Any, Any]) -> None:
        """Write a tile and record it in the ledger.

        Args:
            index: index of the tile.
            window: pixels of the tile.
            values: (K, window.height, window.width).
        """
        self._writer.write(window, values)
        self.record(index)

    def writer(self) -> TileWriter:
        """Return a picklable writer of tiles, for this process or for others."""
        return TileWriter(self.partial.resolve(), self._run)

    @property
    def parts(self) -> Path:
        """The folder of the parts that workers of Ray write; removed with the partial output."""
        return self.partial / _PARTS

    def record(self, index: int) -> None:
        """Record in the ledger, durably, that a tile is written."""
        with naming(self.partial):
            self._ledger.write(f"{index}\n")
            self._ledger.flush()
            os.fsync(self._ledger.fileno())

    def finish(self, scene: Scene, names: list[str], provenance: Mapping[str, Any]) -> None:
        """Complete the output and give it its final name.

        Args:
            scene: the raster, which supplies the georeference.
            names: names of the K values at a pixel.
            provenance: description of the result's origin, as JSON values.
        """
        self._ledger.close()
        if self.output.suffix.lower() == ".zarr":
            self._finish_zarr(scene, names, provenance)
        else:
            made = self.partial.absolute() / _COG
            values = self._zarr.open_array(str(self.partial / _ARRAY), mode="r")
            try:
                write_cog(made, values, scene, names, provenance)
            except OSError as error:
                raise OSError(f"{self.output}: {error}") from None
            self._move(made, self.output)
            shutil.rmtree(self.partial)

    def close(self) -> None:
        """Close the ledger; the partial output stays and can be resumed."""
        with naming(self.partial):  # what a full disk refused is tried again
            self._ledger.close()

    def _finish_zarr(self, scene: Scene, names: list[str], provenance: Mapping[str, Any]) -> None:
        for unneeded in (self.parts, self.partial / _OLD):
            shutil.rmtree(unneeded, ignore_errors=True)
        for stray in self.partial.rglob("*.partial"):  # temporary files of writers that were killed
            stray.unlink()
        attributes = {"Conventions": "CF-1.11", "format": FORMAT, "upfeat": dict(provenance)}
        group = self._zarr.open_group(str(self.partial), mode="a", zarr_format=3)
        group.update_attributes(attributes)
        write_axes(group, scene)
        group[_ARRAY].update_attributes({"outputs": names})
        with warnings.catch_warnings():
            # The specification lacks what xarray asks for: all metadata in one file.
            warnings.simplefilter("ignore", UserWarning)
            self._zarr.consolidate_metadata(str(self.partial))
        if self.output.is_dir() and not self.output.is_symlink():
            # Whole, or not at all where it is open: its files cannot be removed one after another.
            self._move(self.output, self.partial / _OLD)
        elif os.path.lexists(self.output):
            self.output.unlink()
        self._move(self.partial, self.output)
        _sweep(self.output)  # last, so that a run killed before this line can be resumed

    def _move(self, source: Path, target: Path) -> None:
        """Rename; say what is left to do where a program keeps the output open."""
        try:
            move(source, target)
        except PermissionError as error:
            raise ValueError(
                f"{self.output}: cannot be replaced ({error.strerror}); close and remove it, and "
                "go on by --resume, without --overwrite"
            ) from None


class TileWriter:
    """Writer of an output's tiles that stops as soon as a later run has taken the output over."""

    def __init__(self, partial: Path, run: str) -> None:
        """Keep the unfinished output's folder and the identifier of the run."""
        self._partial, self._run = partial, run
        self._values: Any = None

    def write(self, window: Window, values: np.ndarray[Any, Any]) -> None:
        """Write a tile.

        Args:
            window: pixels of the tile.
            values: (K, window.height, window.width).

        Raises:
            ValueError: another run has taken the output over, for example after this writer's
                driver was killed.
            OSError: writing failed.
        """
        try:
            run = (self._partial / _RUN).read_text(encoding="ascii")
        except FileNotFoundError:
            run = None
        if run != self._run:
            raise ValueError(f"{self._partial}: another run goes on with it")
        if self._values is None:
            self._values = _import_zarr().open_array(str(self._partial / _ARRAY), mode="r+")
        rows, columns = slice(window.top, window.bottom), slice(window.left, window.right)
        with naming(self._partial):
            self._values[:, rows, columns] = values


def is_finished(output: Path, provenance: Mapping[str, Any]) -> bool:
    """Return whether a complete output with a given provenance exists.

    Args:
        output: the final path.
        provenance: provenance that :meth:`Store.finish` would record.
    """
    try:
        if output.suffix.lower() == ".zarr":
            text = (output / "zarr.json").read_text(encoding="utf-8")
            recorded = json.loads(text)["attributes"]["upfeat"]
        else:
            with open_raster(output, "reading GeoTIFF") as file:
                recorded = json.loads(file.tags()["upfeat"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return recorded == json.loads(json.dumps(dict(provenance)))


def sweep_finished(output: Path) -> None:
    """Remove leftovers of a run that was killed after it gave the output its final name."""
    if _partial(output).is_dir() and _is_unfinished(_partial(output)):
        shutil.rmtree(_partial(output))
    if output.is_dir():
        _sweep(output)


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of settings that differ; of groups of settings, the names inside."""
    names: list[str] = []
    for name in sorted({*before, *now}):
        own, other = before.get(name), now.get(name)
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            names += _differing(own, other)
        elif own != other:
            names.append(name)
    return names


def _is_unfinished(partial: Path) -> bool:
    """Return whether a folder is an unfinished output, or part of one without its settings.

    Without settings, every name must be one that this module writes: the folder may be removed.
    """
    found = {child.name for child in partial.iterdir()}
    known = {_ARRAY, _LEDGER, _PARTS, _RUN}
    return _SETTINGS in found or all(name in known or name.startswith(".upfeat-") for name in found)


def _sweep(output: Path) -> None:
    """Remove the files of a finished store that only an unfinished one needs."""
    shutil.rmtree(output / _OLD, ignore_errors=True)
    for leftover in (_RUN, _LEDGER, _SETTINGS):
        (output / leftover).unlink(missing_ok=True)


def unfinished_tiles(output: str | Path) -> dict[str, int]:
    """Read the sides of an unfinished output's tiles, to continue it with the same division.

    Args:
        output: the final path.

    Returns:
        Arguments ``tile`` and ``backbone_tile`` of :func:`upfeat.raster.plan.make_plan`; empty if
        there is no unfinished output.

    Raises:
        ValueError: the settings of the unfinished output are damaged.
    """
    path = _partial(path_of("output", output)) / _SETTINGS
    if not path.is_file():
        return {}
    settings = read_object(path)
    names = [name for name in ("tile", "backbone_tile") if name in settings]
    return {name: whole(f"{path}: {name}", settings[name]) for name in names}


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _fill_value(dtype: np.dtype[Any]) -> tuple[float, Any]:
    """Return the value of pixels without data, and its form in attributes as xarray reads it."""
    if dtype.kind == "u":
        return NO_CLASS, NO_CLASS
    return float("nan"), base64.standard_b64encode(struct.pack("<d", float("nan"))).decode()


def _write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
