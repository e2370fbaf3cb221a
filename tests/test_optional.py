"""Optional packages that are missing, and those that are installed but broken."""

import sys
from pathlib import Path

import pytest

from upfeat import readers
from upfeat.engines import Engine, map_with_ray
from upfeat.frames import import_av
from upfeat.optional import import_optional
from upfeat.raster.scene import import_rasterio
from upfeat.raster.store import _import_zarr

USES = {
    "av": lambda: import_av(Path("clip.mp4")),
    "rasterio": lambda: import_rasterio("reading rasters"),
    "zarr": _import_zarr,
    "ray": lambda: list(map_with_ray(Engine("ray"), list, [])),
    "pillow_heif": lambda: readers.heif_image(b"", "photo.heic", 100, b"heic"),
    "tifffile": lambda: readers.by_tifffile(b"", "scene.tif", 100),
}
FAULTS = {
    "ImportError('libx.so.3: cannot open')": "cannot be imported: libx.so.3: cannot open",
    "ValueError('numpy.dtype size changed')": "cannot be imported: numpy.dtype size changed",
    "AttributeError('np.float_ was removed')": "cannot be imported: np.float_ was removed",
}


@pytest.fixture
def forget(monkeypatch):
    """Remove a package from the imported ones, and restore it after the test."""

    def remove(package):
        for name in [one for one in sys.modules if one.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)

    return remove


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("package", USES)
def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch, forget, package, fault):
    forget(package)
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {fault}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=FAULTS[fault]) as caught:
        USES[package]()
    assert "pip install" not in str(caught.value)


@pytest.mark.parametrize("package", USES)
def test_a_missing_package_is_named_with_its_install(monkeypatch, forget, package):
    forget(package)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="pip install"):
        USES[package]()


def test_a_package_that_lacks_another(tmp_path, monkeypatch):
    (tmp_path / "needy_package.py").write_text("import surely_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="needy_package cannot be imported: No module named"):
        import_optional("needy_package", "pip install needy_package")
