"""Models from code that is no installed package: torch.hub repositories, programs, Python files."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upfeat.backbones.outputs import Layer, ascending, in_given_order, numbers
from upfeat.bounds import shown
from upfeat.failures import first_line
from upfeat.registry import unknown_name

PROGRAMS = (".pt", ".pt2", ".ts", ".pth")
"""Suffixes of model files: TorchScript, and programs that ``torch.export`` saved."""


class IntermediateLayers(nn.Module):
    """Reader of layers by ``get_intermediate_layers``, a method of DINO, DINOv2 and DINOv3."""

    def __init__(self, network: nn.Module, layers: Sequence[Layer] | None = None) -> None:
        """Choose layers.

        Args:
            network: a model with the method ``get_intermediate_layers``.
            layers: numbers of layers, from 0, read without the model's last norm (the first DINO
                applies it to every layer); ``None`` for the last layer, which alone is read after
                that norm.

        Raises:
            ValueError: there is no such layer.
        """
        super().__init__()
        self.network = network
        blocks: Any = getattr(network, "blocks", None)
        count = None if blocks is None else len(blocks)
        # DINOv2 may store its blocks in chunks.
        self.count: int | None = getattr(network, "n_blocks", count)
        self.layers = numbers(layers, self.count, type(network).__name__)
        parameters = inspect.signature(network.get_intermediate_layers).parameters  # pyright: ignore[reportArgumentType]
        self.options: dict[str, Any] = {}
        if "reshape" in parameters:
            self.options["reshape"] = True
        if "norm" in parameters:
            self.options["norm"] = self.layers is None

    def forward(self, x: Tensor) -> Any:
        """(B, 3, H, W) -> a map or tokens; a list of them for several layers."""
        run: Any = self.network
        if self.layers is None:
            return list(run.get_intermediate_layers(x, 1, **self.options))[-1]
        layers = self.layers
        if "reshape" in self.options:
            maps = list(run.get_intermediate_layers(x, ascending(layers), **self.options))
            found = in_given_order(maps, layers)
        else:  # the first DINO takes only n, and returns the last n layers
            depth = self.count or max(layers) + 1
            last = list(run.get_intermediate_layers(x, depth - min(layers)))
            found = [last[layer - min(layers)] for layer in layers]
        return found[0] if len(found) == 1 else found


def load_hub(source: str, *, pretrained: bool) -> nn.Module:
    """Load a model of a torch.hub repository.

    Args:
        source: ``REPO:NAME``, where REPO is a folder with ``hubconf.py``, or ``owner/name`` of a
            repository on GitHub.
        pretrained: passed to the repository's function if that takes it; the function may then
            download weights.

    Raises:
        FileNotFoundError: the repository or its weights cannot be downloaded.
        ValueError: the repository has no such model, or the model cannot be made.
    """
    repo, _, name = source.rpartition(":")
    if not repo or not name:
        raise ValueError(
            f'"hub:{source}" must be hub:REPO:NAME, as hub:facebookresearch/dinov2:NAME'
        )
    local = Path(repo).expanduser().is_dir()
    if local and not (Path(repo).expanduser() / "hubconf.py").is_file():
        raise FileNotFoundError(f"hub:{source}: {repo} holds no hubconf.py")
    if not local and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w./-]+)?", repo) is None:
        raise FileNotFoundError(
            f"hub:{source}: {repo} is no folder here, nor OWNER/NAME of a repository on GitHub"
        )
    folder = str(Path(repo).expanduser())
    options: dict[str, Any] = {"repo_or_dir": folder, "source": "local"}
    if not local:
        options = {"repo_or_dir": repo, "trust_repo": True, "skip_validation": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return _make_from_hub(options, name, pretrained)
    except OSError as error:
        raise _unreachable(source, repo, local, error) from None
    except Exception as error:
        if "internet connection" in str(error):
            raise _unreachable(source, repo, local, error) from None
        known = _entry_points(Path(folder) / "hubconf.py") if local else []
        if known and name not in known:
            raise ValueError(f"hub:{source}: {unknown_name('model', name, known)}") from None
        raise ValueError(f"hub:{source}: {type(error).__name__}: {first_line(error)}") from None


def _entry_points(path: Path) -> list[str]:
    """List the public names that a hubconf.py defines, or imports from its repository's code."""
    names: list[str] = []
    others = {*sys.stdlib_module_names, "numpy", "torch", "torchvision"}
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] not in others:
            names += [alias.asname or alias.name for alias in node.names]
    return [name for name in names if not name.startswith("_")]


def _make_from_hub(options: dict[str, Any], name: str, pretrained: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if pretrained:
            made: Any = torch.hub.load(model=name, **options)
        else:
            try:
                made = torch.hub.load(model=name, pretrained=False, **options)
            except TypeError:  # the function has no parameter pretrained
                made = torch.hub.load(model=name, **options)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} makes a {type(made).__name__}, not a module")
    return made


def _unreachable(source: str, repo: str, local: bool, error: Exception) -> Exception:
    reason = f"{type(error).__name__}: {first_line(error)}"
    if local:
        return ValueError(f"hub:{source}: its hubconf.py or weights cannot be loaded ({reason})")
    name = source.rpartition(":")[2]
    return FileNotFoundError(
        f"hub:{source}: the repository or its weights cannot be downloaded ({reason}); clone "
        f"{repo} on a machine with a network, copy it here with torch.hub's checkpoints folder, "
        f"and give hub:FOLDER:{name}"
    )


def load_program(path: Path) -> nn.Module:
    """Load a model file: TorchScript, or a program that ``torch.export`` saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is neither TorchScript nor an exported program; weights alone make no
            model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if path.suffix == ".pt2":
                return ExportedModel(torch.export.load(path))
            return torch.jit.load(str(path), map_location="cpu")
        except Exception as error:
            reason = first_line(error)
    raise ValueError(
        f"{path}: neither TorchScript nor an exported program ({reason}); for a file of weights, "
        "build the model, load them, and give the module"
    )


class ExportedModel(nn.Module):
    """A program that ``torch.export`` saved, as a module that can be copied and has modes."""

    def __init__(self, program: Any) -> None:
        """Unpack the program."""
        super().__init__()
        self.graph = program.module()
        for part in self.graph.modules():
            part.training = False
        self.training = False

    def forward(self, x: Tensor) -> Any:
        """Run the program: its output for an image (B, 3, H, W)."""
        return self.graph(x)

    def train(self, mode: bool = True) -> ExportedModel:
        """Change nothing: a program keeps the mode that it was exported in."""
        return self


def load_function(source: str) -> object:
    """Call a function of a Python file, ``my_file.py:make``, and return the model it makes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no such function, or running the file or the function fails.
    """
    file, _, name = source.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make: Callable[[], object] | None = getattr(module, name, None)
        if callable(make):
            made = make() if not isinstance(make, nn.Module) else make
            if callable(made):
                return made
            raise TypeError(f"it returns {shown(made)}; return a module or a function")
    except Exception as error:
        raise ValueError(f"{source}: {type(error).__name__}: {first_line(error)}") from error
    functions = [key for key, value in vars(module).items() if callable(value)]
    raise ValueError(f"{path}: {unknown_name('function', name, functions)}")
