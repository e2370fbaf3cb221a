"""Finding, loading and calling the compiled CPU library (``csrc/upfeat.h``).

The library has a plain C interface. It is built when the package is installed, and loaded with
ctypes at the first call that needs it; the interpreter's lock is released while it runs.
``UPFEAT_LIBRARY`` names another build of the library. The best instruction set of the machine runs,
unless ``UPFEAT_CPU_ISA`` names another (``baseline``, ``avx2``, ``avx512``, ``amx``, ``amx_high``).
``amx_high`` is ``amx`` with 17 bits of each float32 in attention to many cells; without the
variable it is chosen only if :func:`torch.set_float32_matmul_precision` is not at "highest".
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from upfeat._version import __version__

# From worst to best; the index is the bit in the library's mask.
ISAS = ("baseline", "avx2", "avx512", "amx", "amx_high")
# Instead of an index: the best set of the machine, without and with amx_high.
_BEST, _BEST_HIGH = -1, -2
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STAGE_ARRAYS = (
    *("proj_w0", "proj_b0", "proj_w1", "proj_b1"),
    *("fix_w0", "fix_b0", "fix_w1", "fix_b1"),
)
PYRAMID_ARRAYS = tuple(
    f"{layer}_{part}" for layer in ("entry", "hidden", "last", "join") for part in "wb"
)
LAYER_ARRAYS = (
    *("weight", "packed", "bias", "scale", "shift", "rotate_rows", "rotate_columns"),
    *("sums", "gain", "offset"),
)
_LAYER_NUMBERS = (
    *("inputs", "outputs", "pitch", "in_pitch", "kernel", "winograd"),
    *("activation", "unit", "reflect", "pair", "groups", "sum_groups", "sum_count"),
    "packed_bytes",
)
_ABI = 12
_NO_MEMORY = 2
_NO_ISA = 3


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 4),
        ("stride", ctypes.c_int64 * 4),
        ("dtype", ctypes.c_int64),
    ]


class Stage(ctypes.Structure):
    """Parameters of one JBU stage's filters: addresses of dense float32 arrays, and scalars."""

    keep: dict[str, Tensor]  # tensors that own the memory

    _fields_ = [
        *((name, ctypes.c_void_p) for name in STAGE_ARRAYS),
        ("key_width", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("sigma_spatial", ctypes.c_double),
        ("fixup_scale", ctypes.c_double),
    ]


class Pyramid(ctypes.Structure):
    """Encoder of the neighbourhood upsampler: addresses of dense float32 arrays, and sizes."""

    keep: dict[str, Tensor]  # tensors that own the memory

    _fields_ = [
        *((name, ctypes.c_void_p) for name in PYRAMID_ARRAYS),
        ("width", ctypes.c_int64),
        ("levels", ctypes.c_int64),
    ]


class Window(ctypes.Structure):
    """Positions of tensors within a whole output and a whole grid.

    The fields are the sizes of the whole output and the whole grid, and the first pixel and cell
    that the tensors cover; the tensors' own shapes give the sizes of the windows.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("height", "width", "top", "left"),
            *("grid_height", "grid_width", "grid_top", "grid_left"),
        )
    ]


class Ranges(ctypes.Structure):
    """Cells that pixels attend to, and channels of each head; arrays are given by address."""

    keep: list[ctypes.Array]  # arrays that own the memory

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "columns", "blocks")),
        *((name, ctypes.c_int64) for name in ("n_blocks", "heads")),
        ("scale", ctypes.c_double),
    ]


class Layer(ctypes.Structure):
    """A convolution and the steps before it: addresses of dense float32 arrays, and numbers."""

    keep: list[Tensor]  # tensors that own the memory

    _fields_ = [
        *((name, ctypes.c_void_p) for name in LAYER_ARRAYS),
        *((name, ctypes.c_int64) for name in _LAYER_NUMBERS),
        ("epsilon", ctypes.c_double),
        ("sum_epsilon", ctypes.c_double),
    ]


class _Library:
    """The loaded library, or the reason why there is none. It is loaded once per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tried = False
        self._handle: ctypes.CDLL | None = None
        self.path: Path | None = None
        self.reason: str | None = None

    def load(self) -> "_Library":
        with self._lock:
            if not self._tried:
                self._open()
                self._tried = True
        return self

    @property
    def handle(self) -> ctypes.CDLL:
        if self._handle is None:
            raise RuntimeError(f"the cpu backend cannot run: {self.reason}")
        return self._handle

    def _open(self) -> None:
        self.path = next((path for path in _candidates() if path.is_file()), None)
        if self.path is None:
            self.reason = (
                f"UPFEAT_LIBRARY={os.environ['UPFEAT_LIBRARY']} is not a file"
                if os.environ.get("UPFEAT_LIBRARY")
                else "the compiled library is missing: upfeat was installed without a C++ compiler"
            )
            return
        try:
            handle = ctypes.CDLL(str(self.path))
        except OSError as error:
            self.reason = f"{self.path} cannot be loaded: {str(error).splitlines()[0]}"
            return
        self.reason = _mismatch(self.path, handle)
        if self.reason is None:
            self._handle = handle


def _mismatch(path: Path, handle: Any) -> str | None:
    """Return why a library does not match this package, in one line, or ``None`` if it does.

    A library of another build would expect other arguments, and crash.
    """
    try:
        abi = int(handle.upfeat_abi())
        if abi != _ABI:
            return f"{path} is of another version ({abi}, not {_ABI}); reinstall upfeat"
        handle.upfeat_identity.restype = ctypes.c_char_p
        version, _, interface = handle.upfeat_identity().decode("ascii").partition(" ")
    except AttributeError:
        return f"{path} is no library of upfeat {__version__}; reinstall upfeat"
    if version != __version__:
        return f"{path} is of upfeat {version}, not {__version__}; reinstall upfeat"
    source = Path(__file__).parent.joinpath(*[".."] * 4)  # root of the repository, if this is one
    header = source.resolve() / "csrc" / "upfeat.h"
    if header.is_file() and sha256(header.read_bytes()).hexdigest()[:16] != interface:
        return f"{path} is older than {header}; build it again (pip install -e .)"
    return None


def _candidates() -> Iterator[Path]:
    chosen = os.environ.get("UPFEAT_LIBRARY")
    if chosen:
        yield Path(chosen)
        return
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    # An editable install keeps the library in site-packages and this file in the source tree.
    package = sys.modules.get(__package__ or "")
    folders = [str(Path(__file__).parent), *getattr(package, "__path__", [])]
    for folder in dict.fromkeys(folders):
        yield Path(folder) / f"libupfeat{suffix}"


_library = _Library()


def unavailable_reason() -> str | None:
    """Return why this backend cannot run on this machine, in one line, or ``None`` if it can."""
    return _library.load().reason


# torch.compile cannot trace the lock and the loader, so it takes the result for a constant. This is
# the attribute that torch.compiler.assume_constant_result sets; calling that function here would
# import the whole compiler.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def library_info() -> dict[str, Any]:
    """Return the library's ``path``, the instruction set in use (``isa``), and all ``available``.

    Raises:
        RuntimeError: there is no usable library (see :func:`unavailable_reason`).
        ValueError: ``UPFEAT_CPU_ISA`` is not an instruction set that can run on this machine.
    """
    handle = _library.load().handle
    mask = int(handle.upfeat_isa_mask())
    available = [name for bit, name in enumerate(ISAS) if mask >> bit & 1]
    isa = chosen_isa()
    if isa >= 0 and ISAS[isa] not in available:
        raise _isa_error(ISAS[isa])
    if isa >= 0:
        chosen = ISAS[isa]
    else:
        chosen = [name for name in available if isa == _BEST_HIGH or name != "amx_high"][-1]
    return {"path": str(_library.path), "isa": chosen, "available": available}


Argument: TypeAlias = Tensor | ctypes.Structure | ctypes.Array | ctypes.c_void_p | float | None


def call(name: str, *arguments: Argument) -> None:
    """Call a function of the library with arguments, the instruction set and the thread count.

    Tensors are passed as descriptors, integers as int64, floats as double, ``None`` as null.

    Raises:
        MemoryError: the library could not allocate its scratch memory.
        RuntimeError: there is no usable library.
        ValueError: ``UPFEAT_CPU_ISA`` is not an instruction set that can run on this machine.
    """
    handle = _library.load().handle
    isa = ctypes.c_int(chosen_isa())
    threads = ctypes.c_int(torch.get_num_threads())
    status = getattr(handle, name)(*(_argument(value) for value in arguments), isa, threads)
    if status == _NO_ISA:  # only for a set that UPFEAT_CPU_ISA names: a best one always exists
        raise _isa_error(ISAS[isa.value])
    if status == _NO_MEMORY:
        raise MemoryError(f"{name} could not get its scratch memory")
    # Callers have checked the shapes; the library does not rely on that, and checks them again.
    if status != 0:  # no assertion: without it, `python -O` would return memory as it was found
        raise RuntimeError(f"{name} refused its arguments")


def _argument(value: Argument) -> Any:
    if isinstance(value, Tensor):
        sizes, strides = (
            (ctypes.c_int64 * 4)(*value.shape),
            (ctypes.c_int64 * 4)(*value.stride()),
        )
        return ctypes.byref(_Tensor(value.data_ptr(), sizes, strides, DTYPES[value.dtype]))
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_double(value) if isinstance(value, float) else value


def chosen_isa() -> int:
    """Return the instruction set that :func:`call` asks for; negative for the best one."""
    name = os.environ.get("UPFEAT_CPU_ISA")
    if not name:
        return _BEST if torch.get_float32_matmul_precision() == "highest" else _BEST_HIGH
    if name not in ISAS:
        raise _isa_error(name)
    return ISAS.index(name)


def _isa_error(name: str) -> ValueError:
    mask = int(_library.load().handle.upfeat_isa_mask())
    available = ", ".join(isa for bit, isa in enumerate(ISAS) if mask >> bit & 1)
    return ValueError(
        f"UPFEAT_CPU_ISA={name} cannot run here; choose from {available}, or unset it"
    )
