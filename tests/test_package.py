"""What the package promises as a whole: layers, light imports, a typed marker."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import upfeat

SOURCE = Path(upfeat.__file__).parent

# Lower layers first; a module imports from its own layer or from lower ones.
LAYERS = [
    {"types", "geometry", "linear", "registry"},
    {
        "_version",
        "bounds",
        "strict_json",
        "tensor_checks",
        "optimisers",
        "normalization",
        "randomness",
        "images",
        "decoding",
        "colour",
        "machine",
        "failures",
        "storage",
        "outputs",
        "locks",
        "visualize",
        "views",
        "losses",
        "downsamplers",
        "pooling",
        "tiling",
    },
    {"backends"},
    {"functional"},
    {"upsamplers", "backbones"},
    {"feature_map", "lazy_files", "features"},
    {"testing"},
    {"provenance", "probes", "implicit", "model", "attach", "environment", "mosaic"},
    {"training", "evaluation", "run", "benchmark"},
    {"batch", "raster", "demo"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "upfeat":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("upfeat.")
            }
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"],
    ids=lambda path: str(path.relative_to(SOURCE)),
)
def test_imports_run_one_way(path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert own in RANK, f"give {own} a layer"
    above = {name for name in _imports(path) if name in RANK and RANK[name] > RANK[own]}
    assert not above, f"{own} imports from higher layers: {above}"


def test_import_loads_no_optional_dependency():
    optional = "timm transformers torchvision triton rich huggingface_hub scipy rasterio zarr yaml"
    optional += " tensorboard"
    code = f"import sys, upfeat; print([m for m in {optional.split()!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]", done.stdout


def test_typed_and_versioned():
    assert (SOURCE / "py.typed").is_file()
    assert upfeat.__version__.count(".") == 2
    assert all(hasattr(upfeat, name) for name in upfeat.__all__)
