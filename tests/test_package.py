"""What the package promises as a whole: layers, light imports, a typed marker."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import upfeat

SOURCE = Path(upfeat.__file__).parent
ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"


def _ranks():
    """The row of each name in the table of docs/architecture.md, lowest first."""
    table = ARCHITECTURE.read_text().partition("## Modules, lowest first")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
    return {
        name.strip("/"): rank
        for rank, row in enumerate(rows)
        for name in re.findall(r"`(.+?)`", row)
    }


RANK = _ranks()


def _name(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(("upfeat", *parts)).removesuffix(".__init__")


FILES = {_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
del FILES["upfeat"]  # imports nothing until a name is asked for


def _imported(path):
    """Modules that a file imports, in functions too; for type checkers alone does not count."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(inner) for part in node.body for inner in ast.walk(part)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in FILES}


IMPORTS = {name: _imported(path) - {name} for name, path in FILES.items()}


def _layer(name):
    return name.split(".")[1]


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    own = _layer(name)
    assert own in RANK, f"give {own} a row in the table of docs/architecture.md"
    above = {other for other in IMPORTS[name] if RANK[_layer(other)] > RANK[own]}
    assert not above, f"{name} imports from higher rows of docs/architecture.md: {above}"


def test_no_file_imports_itself_by_a_detour():
    """Not in folders, not in functions: files can be read in an order that explains each."""
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_the_architecture_lists_what_there_is():
    listed = set(RANK) - {_layer(name) for name in FILES}
    assert not listed, f"docs/architecture.md lists {listed}, which is not there"


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
