"""Tasks, one per file, which has the task's name; its docstring begins with a description."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from upfeat.bounds import quoted
from upfeat.registry import unknown_name

if TYPE_CHECKING:
    from upfeat.evaluation.task import Task


def list_tasks() -> dict[str, str]:
    """Return one-line descriptions of all tasks by name, without importing the tasks."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
    docs = {path.stem: ast.get_docstring(ast.parse(path.read_bytes())) or "" for path in files}
    return {name: text.partition("\n")[0] for name, text in docs.items()}


def find_task(name: str) -> type[Task]:
    """Import a task by name.

    Raises:
        ValueError: there is no such task; close names are suggested.
    """
    known = list_tasks()
    if name not in known:
        reason = unknown_name("task", name, list(known))
        raise ValueError(f"task={quoted(name)} is unknown; {reason}")
    return import_module(f"{__name__}.{name}").TASK
