"""Writing and running of exported programs in two formats: ONNX and PyTorch's ``.pt2``."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upfeat._version import __version__
from upfeat.backbones.libraries import import_library
from upfeat.bounds import shown

FORMATS = ("onnx", "pt2")
METADATA = "upfeat.json"
"""Name of the extra file with the facts in a ``.pt2``; ONNX stores each fact as metadata."""


def check_format(path: Path, format: str | None) -> str:
    """Return the format of a file: the given format, or the suffix of the file's name.

    Raises:
        FileNotFoundError: the file's folder does not exist.
        ValueError: there is no such format.
    """
    found = path.suffix.removeprefix(".").lower() if format is None else format
    if found not in FORMATS:
        given = f"{path.name}" if format is None else f"format={shown(format)}"
        raise ValueError(f'{given}: unknown format; choose .onnx or .pt2 (format="onnx", "pt2")')
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it first")
    return found


@contextmanager
def without_questions() -> Iterator[None]:
    """Trace without testing whether sizes are 0, 1 or multiples of each other.

    Every test becomes a condition of the program, and takes longer the more sizes there are.
    Settings that the installed PyTorch does not have are skipped.
    """
    from torch._dynamo import config as tracing
    from torch.fx.experimental import _config as symbols

    wanted = {"backed_size_oblivious": True, "aggressive_guard_free_semantics": 2}
    known = {name: value for name, value in wanted.items() if hasattr(symbols, name)}
    with (
        warnings.catch_warnings(),
        symbols.patch(**known),  # pyright: ignore[reportAttributeAccessIssue]
        tracing.patch(fake_tensor_cache_enabled=False),  # pyright: ignore[reportAttributeAccessIssue]
    ):
        warnings.simplefilter("ignore")
        yield


def without_unused(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Remove unused parameters and buffers, for example of layers after the chosen layer."""
    graph, signature = program.graph, program.graph_signature
    unused = {
        node.name: node for node in graph.nodes if node.op == "placeholder" and not node.users
    }
    kept, dropped = [], []
    for one in signature.input_specs:
        (kept if one.target is None or one.arg.name not in unused else dropped).append(one)
    signature.input_specs[:] = kept
    for one in dropped:
        graph.erase_node(unused[one.arg.name])
    names = {one.target for one in kept}
    for values in (program.state_dict, program.constants):
        for name in {one.target for one in dropped} - names:
            values.pop(name, None)
    program.graph_module.recompile()
    return program


def _write_program(
    program: torch.export.ExportedProgram, path: Path, facts: dict[str, str], *_: Any
) -> None:
    sizes_as_traced(program)
    buffer = BytesIO()  # torch.export.save requires a path to end in .pt2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights that are not contiguous
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(facts, indent=2)})
    path.write_bytes(buffer.getvalue())


def sizes_as_traced(program: torch.export.ExportedProgram) -> None:
    """Replace the recorded size of every map inside, a formula of the image's sides, by a number.

    The numbers are the sizes of the traced example. Recorded sizes do not affect the result, and
    transformations of a program derive them again from its inputs, whose sizes stay free. Parsing
    the formulas would take four fifths of the time that loading a file takes.
    """
    symbols = _example(program)
    ended = next(node for node in program.graph.nodes if node.op == "output")
    returned = set(ended.all_input_nodes)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or node in returned or not isinstance(value, Tensor):
            continue
        sides = [_as_traced(side, symbols) for side in (*value.shape, *value.stride())]
        known, count = [side for side in sides if side is not None], value.dim()
        if len(known) == len(sides) and hasattr(value, "fake_mode"):
            with value.fake_mode:  # pyright: ignore[reportAttributeAccessIssue]
                node.meta["val"] = torch.empty_strided(
                    known[:count], known[count:], dtype=value.dtype, device=value.device
                )


def _example(program: torch.export.ExportedProgram) -> dict[Any, int]:
    """Return the sizes of the traced example, by their symbols."""
    found: dict[Any, int] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for side in value.shape if isinstance(value, Tensor) else (value,):
            if not isinstance(side, torch.SymInt):
                continue
            if side.node.expr.is_Symbol and side.node.hint is not None:
                found[side.node.expr] = int(side.node.hint)
            answers = getattr(side.node.shape_env, "real_tensor_prop_unbacked_vals", None)
            found |= {key: int(answer) for key, answer in (answers or {}).items()}
    return found


def _as_traced(side: int | torch.SymInt, symbols: dict[Any, int]) -> int | None:
    """Return a side as a number; ``None`` if it depends on a symbol without a known value."""
    if not isinstance(side, torch.SymInt):
        return side
    try:
        return int(side.node.expr.xreplace(symbols))
    except TypeError:  # a symbol is left in the formula
        return None


def _read_program(path: Path) -> Callable[[Sequence[Tensor]], Tensor]:
    module = torch.export.load(BytesIO(path.read_bytes())).module()

    def run(inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return module(*inputs)

    return run


def _write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    facts: dict[str, str],
    names: Sequence[str],
    stride: int,
) -> None:
    with without_questions(), quiet_exporter():
        found = torch.onnx.export(
            program,
            input_names=list(names),
            output_names=["output"],
            verbose=False,
            optimize=False,  # pattern matching would double the time, and run-times do it anyway
        )
    assert found is not None
    optimizer = import_library("onnxscript.optimizer", extra="onnx")
    optimizer.fold_constants(found.model)
    optimizer.remove_unused_nodes(found.model)
    graph = found.model.graph
    for value in (*graph.inputs, *graph.outputs):
        free = value.name in ("features", "hidden")
        sides = ("batch", None) if free else ("batch", None, "height", "width")
        for axis, side in enumerate(sides):
            if side is not None and not isinstance(value.shape[axis], int):  # type: ignore[index]
                prefix = "output_" if value.name == "output" and axis and stride > 1 else ""
                value.shape[axis] = prefix + side  # type: ignore[index]
    found.model.metadata_props.update(facts)
    found.model.producer_name, found.model.producer_version = "upfeat", __version__
    found.save(path)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporters' log messages below errors while the block runs."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


def _read_onnx(path: Path) -> Callable[[Sequence[Tensor]], Tensor]:
    runtime: Any = import_library("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    names = [one.name for one in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> Tensor:
        given = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return run


WRITERS = {"onnx": _write_onnx, "pt2": _write_program}
READERS = {"onnx": _read_onnx, "pt2": _read_program}
