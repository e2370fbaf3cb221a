"""Digests of everything that a stored result depends on: code, weights and configurations."""

from __future__ import annotations

import hashlib
import inspect
import math
import platform
import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from upfeat._version import __version__
from upfeat.backbones import Backbone
from upfeat.backends.cpu import library as cpu_library
from upfeat.upsamplers.base import Upsampler

_PACKAGE = Path(__file__).parent
_FROM = re.compile(r"^[ \t]*from[ \t]+(upfeat[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|.*)", re.MULTILINE)


@lru_cache
def source_digest(*modules: str) -> str:
    """SHA-256 of the source of modules and of all modules of this package that they import.

    Results stored under this digest are not reused after any of that code has changed. The digest
    includes the compiled library if the module that loads it is among the modules.

    Args:
        *modules: full names, such as ``upfeat.evaluation.harness``.
    """
    digest = hashlib.sha256()
    for path in source_files(*modules):
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()}\n".encode())
        digest.update(path.read_bytes())
        if path.parent.name == "cpu" and path.name == "library.py":
            digest.update(_compiled())
    return digest.hexdigest()


def source_files(*modules: str) -> list[Path]:
    """Source files of modules and of the modules of this package that they import, at any depth.

    The ``__init__`` of a package that contains a module is left out, because results do not depend
    on it. The files are sorted.
    """
    seen: set[Path] = set()
    names = list(modules)
    while names:
        path = _file(names.pop())
        if path is not None and path not in seen:
            seen.add(path)
            names += _mentioned(path)
    return sorted(seen)


def _file(module: str) -> Path | None:
    """Source file of a module of this package; ``None`` for any other module."""
    package, *parts = module.split(".")
    if package != "upfeat" or not parts:
        return None
    path = _PACKAGE.joinpath(*parts)
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@lru_cache(maxsize=512)
def _mentioned(path: Path) -> list[str]:
    """Modules of this package that a file imports, at any level, or names in a string.

    They are found by regular expressions, because every training run starts with this search and
    parsing takes ten times as long. A test compares the result with that of parsing, for all files.
    """
    source = path.read_text(encoding="utf-8")
    names = re.findall(r"^[ \t]*import[ \t]+(upfeat\.[\w.]+)", source, re.MULTILINE)
    for module, names_in_one in _FROM.findall(source):
        for one in re.sub(r"#.*", "", names_in_one).strip("()").split(","):
            if words := one.split():
                part = f"{module}.{words[0]}"
                names.append(part if _file(part) else module)
    for text in re.findall(r"""["'](upfeat\.[^"'{\n]*)""", source):
        names += _matching(text)
    return names


def _matching(text: str) -> list[str]:
    """Modules that a string names: one, or all modules of a package if it ends in a dot."""
    if not text.endswith("."):
        return [text]
    folder = _PACKAGE.joinpath(*text.split(".")[1:])
    if folder == _PACKAGE:
        return []
    return [text + file.stem for file in folder.glob("*.py")]


def _compiled() -> bytes:
    """Content of the compiled library that this machine uses; empty if there is none."""
    if cpu_library.unavailable_reason() is not None:
        return b""
    facts = cpu_library.library_info()
    return f"{facts['isa']}\n".encode() + Path(facts["path"]).read_bytes()


def versions(*modules: str) -> dict[str, str]:
    """Versions of the package, its source and the libraries that a result depends on, by name.

    Args:
        *modules: modules whose source the result depends on; see :func:`source_digest`.
    """
    import numpy
    import PIL

    return {
        "upfeat": __version__,
        "source": source_digest(*modules)[:16],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's weights: its parameters and buffers, with names, shapes and dtypes."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def identify_upsampler(upsampler: Upsampler) -> str:
    """Identity of an upsampler, as text: class, configuration and digest of the weights.

    A class of this package is identified by its name, because :func:`source_digest` contains its
    source; any other class by its name and the content of its file.
    """
    cls = type(upsampler)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if not cls.__module__.startswith("upfeat."):
        name += f"|{hashlib.sha256(_source(cls)).hexdigest()}"
    return f"{name}|{upsampler.config()}|{digest(upsampler)}"


def _source(cls: type) -> bytes:
    """Content of the file that defines a class; empty for a class defined interactively."""
    try:
        return Path(inspect.getfile(cls)).read_bytes()
    except (TypeError, OSError):
        return b""


@torch.no_grad()
def identify_backbone(backbone: Backbone) -> str:
    """Identity of a backbone, as text: class, name, digest of the weights, and normalisation.

    A backbone made from a function has no weights, so the identity also contains a digest of the
    backbone's features of a fixed image.
    """
    # A backbone made of others takes no smaller images than they do.
    side = 2 * max(one.stride for one in backbone.modules() if isinstance(one, Backbone))
    size = (1, backbone.in_channels, side, side)
    ramp = torch.arange(math.prod(size), dtype=torch.float32).mul(0.7).sin().view(size)
    response = backbone(ramp.to(backbone.mean.device))
    cls = type(backbone)
    known = f"{cls.__module__}.{cls.__qualname__}|{backbone.name}|{digest(backbone)}"
    normalisation = f"{backbone.mean.flatten().tolist()}|{backbone.std.flatten().tolist()}"
    return f"{known}|{normalisation}|{hashlib.sha256(_bytes(response)).hexdigest()}"


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()
