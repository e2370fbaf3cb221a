"""The notebooks of examples/ run, in this process, and are kept without outputs."""

import ast
import json
import sys
import types

import documents
import pytest
import torch

FOLDER = documents.ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(cell, names, place):
    """Run a cell; return its last line's value where that is an expression, as Jupyter does."""
    tree = ast.parse("".join(cell["source"]), place)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, place, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), place, "eval"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, torchvision_operators, capsys):
    notebook = json.loads(path.read_text())
    for module in notebook["metadata"]["upfeat"]["needs"]:
        pytest.importorskip(module)
    monkeypatch.chdir(FOLDER)
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    vars(page)["__name__"] = "page"  # so that classes of a cell can be found
    with torch.random.fork_rng(devices=[]):
        for number, cell in enumerate(notebook["cells"]):
            if cell["cell_type"] == "code":
                value = execute(cell, vars(page), f"{path.stem}[{number}]")
                assert value is None or repr(value)


def test_notebooks_are_listed_and_kept_without_outputs():
    listed = (documents.ROOT / "docs" / "start" / "notebooks.md").read_text()
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name})" in listed
        notebook = json.loads(path.read_text())
        assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
        assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
        for cell in notebook["cells"]:
            assert cell.get("outputs", []) == []
            assert cell.get("execution_count") is None
