"""Store of tiles: a sharded Zarr that remembers its tiles, moved into place when complete.

While a raster is under way its output is called ``NAME.partial``: a Zarr array, the settings that
it was begun with, and a ledger of the tiles that are done. One tile is one shard, so a tile that
was cut off in the middle is simply written again, and a finished output is the same byte for byte
however often the work was interrupted.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upfeat.bounds import whole
from upfeat.raster.plan import CHUNK
from upfeat.raster.scene import Scene, import_rasterio
from upfeat.storage import replacing
from upfeat.strict_json import read_object
from upfeat.upsamplers import Window

FORMAT = "upfeat-raster-1"
_SETTINGS, _LEDGER = "settings.json", "tiles.txt"
_ARRAY = "features"
_PLAIN = "plain.tif"
_PARTS = "parts"
_RUN = "run"


def _import_zarr() -> Any:
    try:
        zarr = importlib.import_module("zarr")
    except ImportError:
        zarr = None
    if zarr is None or int(zarr.__version__.split(".")[0]) < 3:
        raise ValueError(
            "writing rasters needs zarr 3 (Python 3.11 or newer): pip install 'upfeat[raster]'"
        )
    return zarr


class Store:
    """The output of one raster.

    Attributes:
        output: the final path, ``.zarr`` or ``.tif``.
        partial: the folder in which it is made.
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
        """Begin an output, or find one that was begun.

        Args:
            output: path of the result; must end in ``.zarr``, ``.tif`` or ``.tiff``.
            shape: (K, height, width).
            dtype: of the values.
            tile: side of a tile, pixels.
            settings: all that decides the result, as JSON values.
            resume: go on with what is there.
            overwrite: remove what is there.

        Raises:
            ValueError: the output exists already, has other settings, or cannot be
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
        (self.partial / _RUN).write_text(self._run, encoding="ascii")
        self._writer = self.writer()
        self._ledger = (self.partial / _LEDGER).open("a", encoding="ascii")

    def _begin(self) -> None:
        if self.partial.exists():
            if not _is_unfinished(self.partial):
                raise ValueError(f"{self.partial}: is not an unfinished raster; remove it")
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        chunk = next(side for side in range(CHUNK, 0, -1) if self._tile % side == 0)
        self._zarr.create_array(
            str(self.partial / _ARRAY),
            shape=self._shape,
            dtype=self._dtype,
            chunks=(self._shape[0], chunk, chunk),
            shards=(self._shape[0], self._tile, self._tile),
            fill_value=float("nan") if self._dtype.kind == "f" else 255,
            dimension_names=("feature", "y", "x"),
            attributes={"grid_mapping": "spatial_ref", "coordinates": "spatial_ref"},
        )
        # Last: what has settings can be gone on with.
        _write_json(self.partial / _SETTINGS, self._settings)

    def _go_on(self, resume: bool) -> None:
        path = self.partial / _SETTINGS
        if not path.is_file():
            self._begin()  # killed before it got as far as its settings
            return
        if not resume:
            raise ValueError(
                f"{self.partial}: holds an unfinished raster; go on by --resume, or begin anew by "
                "--overwrite"
            )
        before = read_object(path)
        names = sorted({*before, *self._settings})
        others = [name for name in names if before.get(name) != self._settings.get(name)]
        if others:
            raise ValueError(
                f"{self.partial}: was begun with another {', '.join(others)}; give what it was "
                "begun with, or begin anew by --overwrite"
            )
        ledger = self.partial / _LEDGER
        if ledger.is_file():
            lines = ledger.read_bytes().splitlines(keepends=True)
            done = [line for line in lines if line.endswith(b"\n")]
            ledger.write_bytes(b"".join(done))
            if not all(line.strip().isdigit() for line in done):
                raise ValueError(f"{ledger}: damaged; begin anew by --overwrite")
            self.done = {int(line) for line in done}

    def write(self, index: int, window: Window, values: np.ndarray[Any, Any]) -> None:
        """Write a tile and say so in the ledger.

        Args:
            index: of the tile.
            window: its pixels.
            values: (K, height, width).
        """
        self._writer.write(window, values)
        self.record(index)

    def writer(self) -> TileWriter:
        """Give what writes tiles, in this process or in others; picklable."""
        return TileWriter(self.partial.resolve(), self._run)

    @property
    def parts(self) -> Path:
        """The folder for what tiles are made of, where that is in files; it goes with the rest."""
        return self.partial / _PARTS

    def record(self, index: int) -> None:
        """Say in the ledger that a tile is written."""
        self._ledger.write(f"{index}\n")
        self._ledger.flush()
        os.fsync(self._ledger.fileno())

    def finish(self, scene: Scene, names: list[str], provenance: Mapping[str, Any]) -> None:
        """Move the result to its final name.

        Args:
            scene: where the georeference comes from.
            names: of the K outputs.
            provenance: of the result, as JSON values.
        """
        self._ledger.close()
        if self.output.suffix.lower() == ".zarr":
            self._finish_zarr(scene, names, provenance)
        else:
            with replacing(self.output) as temporary, warnings.catch_warnings():
                # A raster without a place on the ground has none in the output either.
                errors = import_rasterio("writing GeoTIFF").errors
                warnings.simplefilter("ignore", errors.NotGeoreferencedWarning)
                self._write_cog(temporary, scene, names, provenance)
            shutil.rmtree(self.partial)

    def close(self) -> None:
        """Leave the partial output for another time."""
        self._ledger.close()

    def _finish_zarr(self, scene: Scene, names: list[str], provenance: Mapping[str, Any]) -> None:
        shutil.rmtree(self.parts, ignore_errors=True)
        for stray in self.partial.rglob("*.partial"):  # of a chunk whose writer was killed
            stray.unlink()
        attributes = {"Conventions": "CF-1.11", "format": FORMAT, "upfeat": dict(provenance)}
        group = self._zarr.open_group(str(self.partial), mode="a", zarr_format=3)
        group.update_attributes(attributes)
        _write_axes(group, scene, names)
        if self.output.exists():
            shutil.rmtree(self.output) if self.output.is_dir() else self.output.unlink()
        self.partial.replace(self.output)
        _sweep(self.output)  # last: killed before, all of this is done again

    def _write_cog(
        self, path: Path, scene: Scene, names: list[str], provenance: Mapping[str, Any]
    ) -> None:
        """Copy the array into a tiled GeoTIFF with overviews."""
        rasterio = import_rasterio("writing GeoTIFF")
        count, height, width = self._shape
        categorical = self._dtype.kind == "u"
        plain = self.partial / _PLAIN
        values = self._zarr.open_array(str(self.partial / _ARRAY), mode="r")
        profile = {
            "driver": "GTiff",
            "count": count,
            "height": height,
            "width": width,
            "dtype": "float32" if self._dtype == np.float16 else self._dtype.name,
            "crs": scene.crs,
            "transform": scene.transform,
            "nodata": 255 if categorical else float("nan"),
            "tiled": True,
            "bigtiff": "if_safer",
        }
        try:
            with rasterio.open(plain, "w", **profile) as target:
                for top in range(0, height, self._tile):
                    rows = values[:, top : top + self._tile]
                    target.write(
                        rows.astype(profile["dtype"]),
                        window=((top, top + rows.shape[1]), (0, width)),
                    )
                for index, name in enumerate(names[:count], start=1):
                    target.set_band_description(index, name)
                target.update_tags(upfeat=json.dumps(dict(provenance), sort_keys=True))
            importlib.import_module("rasterio.shutil").copy(
                plain,
                path,
                driver="COG",
                compress="deflate",
                predictor="YES",
                resampling="mode" if categorical else "average",
            )
        finally:
            plain.unlink(missing_ok=True)


class TileWriter:
    """Writes the tiles of an output, as long as the run that it belongs to goes on."""

    def __init__(self, partial: Path, run: str) -> None:
        """Remember the unfinished output's folder, and which run this is."""
        self._partial, self._run = partial, run
        self._values: Any = None

    def write(self, window: Window, values: np.ndarray[Any, Any]) -> None:
        """Write a tile.

        Args:
            window: its pixels.
            values: (K, height, width).

        Raises:
            ValueError: another run goes on with the output, as after a driver was killed.
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
        self._values[:, rows, columns] = values


def is_finished(output: Path, provenance: Mapping[str, Any]) -> bool:
    """Return whether an output is there, complete, and made of the same.

    Args:
        output: the final path.
        provenance: as it would be recorded.
    """
    try:
        if output.suffix.lower() == ".zarr":
            text = (output / "zarr.json").read_text(encoding="utf-8")
            recorded = json.loads(text)["attributes"]["upfeat"]
        else:
            rasterio = import_rasterio("reading GeoTIFF")
            with warnings.catch_warnings(), rasterio.open(output) as file:
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                recorded = json.loads(file.tags()["upfeat"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return recorded == json.loads(json.dumps(dict(provenance)))


def sweep_finished(output: Path) -> None:
    """Remove what a run left that was killed between naming its output and its end."""
    if _partial(output).is_dir() and _is_unfinished(_partial(output)):
        shutil.rmtree(_partial(output))
    if output.is_dir():
        _sweep(output)


def _is_unfinished(partial: Path) -> bool:
    """Return whether a folder has settings, or what is there before or after them and no more."""
    found = {child.name for child in partial.iterdir()}
    known = {_ARRAY, _LEDGER, _PLAIN, _PARTS, _RUN}
    return _SETTINGS in found or all(name in known or name.startswith(".upfeat-") for name in found)


def _sweep(output: Path) -> None:
    """Remove from a finished store what it was gone on with by."""
    for leftover in (_RUN, _LEDGER, _SETTINGS):
        (output / leftover).unlink(missing_ok=True)


def unfinished_tiles(output: Path) -> dict[str, int]:
    """Sides of the tiles of an unfinished output, as ``make_plan`` takes them; empty without one.

    Args:
        output: the final path.

    Raises:
        ValueError: its settings are damaged.
    """
    path = _partial(output) / _SETTINGS
    if not path.is_file():
        return {}
    settings = read_object(path)
    names = [name for name in ("tile", "backbone_tile") if name in settings]
    return {name: whole(f"{path}: {name}", settings[name]) for name in names}


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _write_axes(group: Any, scene: Scene, names: list[str]) -> None:
    """Coordinates of pixel centres and the reference system, as CF and GeoZarr want them."""
    transform = scene.transform
    spatial: dict[str, Any] = {
        "GeoTransform": " ".join(repr(value) for value in transform.to_gdal()),
    }
    if scene.crs:
        spatial["crs_wkt"] = spatial["spatial_ref"] = scene.crs.to_wkt()
    group.create_array(
        "spatial_ref",
        shape=(),
        dtype="int64",
        attributes=spatial,
        dimension_names=(),
        overwrite=True,
    )
    if transform.b == 0 and transform.d == 0:  # else rows and columns are no coordinates
        height, width = scene.size
        down = transform.f + transform.e * (np.arange(height) + 0.5)
        across = transform.c + transform.a * (np.arange(width) + 0.5)
        for name, values, standard in (
            ("y", down, "projection_y_coordinate"),
            ("x", across, "projection_x_coordinate"),
        ):
            attributes = {"standard_name": standard}
            axis = group.create_array(
                name,
                shape=values.shape,
                dtype="float64",
                dimension_names=(name,),
                attributes=attributes,
                overwrite=True,
            )
            axis[:] = values
    group[_ARRAY].update_attributes({"outputs": names})


def _write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
