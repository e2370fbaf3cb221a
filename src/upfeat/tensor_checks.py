"""Checks of tensors from files: names, shapes and types before they are read, values before use.

Names, shapes and types are read from the file's header, so that neither a model nor a tensor is
allocated for a file that does not fit. NaN among weights would spread to every output, or go
unnoticed in rarely used ones; the error names the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upfeat.bounds import path_of

LARGEST = 1e9
"""Largest allowed magnitude of a weight; trained networks are far below it."""

_FLOATS = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""Floating-point types, with their names in safetensors files."""
_LEAST_LARGEST = 2.0**-15
"""Least largest magnitude of values to be stored in float16, which rounds them to multiples of
2⁻²⁴ below 2⁻¹⁴."""
_NAMES_SHOWN = 4


class Layout(NamedTuple):
    """Shape and data type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str
    """Name of the type in safetensors files: "F32", "I64", …"""

    @property
    def is_floating(self) -> bool:
        """Return whether the type is one of 16-bit to 64-bit floating point."""
        return self.dtype in _FLOATS.values()


@contextmanager
def opened_tensors(path: str | Path) -> Iterator[Any]:
    """Context with a safetensors file, opened by ``safe_open``, whose errors name the file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a safetensors file, or is truncated.
    """
    path = path_of("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a whole safetensors file ({reason})") from None


def read_layouts(path: str | Path) -> tuple[dict[str, Layout], dict[str, str]]:
    """Read only the header of a safetensors file.

    Args:
        path: the safetensors file.

    Returns:
        Shapes and types by name, and the metadata.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a complete safetensors file.
    """
    with opened_tensors(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        layouts = {
            name: Layout(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()
        }
        return layouts, file.metadata() or {}


def layouts_of(tensors: Mapping[str, Tensor]) -> dict[str, Layout]:
    """Layouts of tensors in memory, by name."""
    return {
        name: Layout(tuple(one.shape), _FLOATS.get(one.dtype, str(one.dtype)))
        for name, one in tensors.items()
    }


def check_layouts(
    source: str | Path, found: Mapping[str, Layout], expected: Mapping[str, Tensor]
) -> None:
    """Check that a file's tensors have the expected names, shapes and kinds of types.

    Args:
        source: name of the file, for error messages.
        found: layouts of the file's tensors, by name.
        expected: tensors of the expected shapes and types, by name; may be on the meta device.

    Raises:
        ValueError: a tensor is missing, unexpected or different; the message names the tensors.
    """
    faults = [f"missing {name}" for name in sorted(set(expected) - set(found))]
    faults += [f"extra {name}" for name in sorted(set(found) - set(expected))]
    for name in sorted(set(found) & set(expected)):
        layout, tensor = found[name], expected[name]
        if layout.shape != tuple(tensor.shape):
            faults.append(f"{name} is {layout.shape}, not {tuple(tensor.shape)}")
        elif layout.is_floating != tensor.is_floating_point():
            wanted = "floating" if tensor.is_floating_point() else "whole"
            faults.append(f"{name} holds {layout.dtype}, not {wanted} numbers")
    if faults:
        more = len(faults) - _NAMES_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        raise ValueError(
            f"{source}: its tensors do not fit its configuration: "
            f"{'; '.join(faults[:_NAMES_SHOWN])}{rest}"
        )


def fault_in_memory(tensor: Tensor) -> str | None:
    """Return why a tensor of a file cannot be used as it is, or ``None``.

    A few bytes of a pickle can describe a tensor of any size, by strides of 0 or on the meta
    device; whatever is computed from it needs the memory.
    """
    if tensor.layout is not torch.strided:
        return f"is {tensor.layout}, not dense"
    if tensor.dtype not in _FLOATS:
        return f"is {tensor.dtype}, not floating point of 16 to 64 bits"
    if tensor.is_meta:
        return "is on the meta device, without values"
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        return "repeats its values by strides; save it .contiguous()"
    return None


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor contains neither NaN nor infinity."""
    # aminmax propagates NaN and infinity; isfinite would allocate a mask of the whole tensor.
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def largest_magnitude(tensor: Tensor) -> float:
    """Largest magnitude of a tensor's values, without a copy of it."""
    return max(abs(float(one)) for one in tensor.aminmax())


def check_values(
    source: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    magnitudes: Mapping[str, tuple[float, float]] | None = None,
    floating: bool = False,
) -> None:
    """Check that tensors are finite and within bounds.

    Args:
        source: name of the tensors' source, for error messages.
        tensors: tensors by name; those of integers, and on the meta device, are not checked.
        magnitudes: smallest and largest allowed magnitude, by the last part of a tensor's name;
            others may have magnitudes up to :data:`LARGEST`.
        floating: refuse tensors that are not 16-bit to 64-bit floating point.

    Raises:
        ValueError: a tensor fails a check; the message names it.
    """
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"{source}: {name} is a {tensor.layout} tensor; save it as a dense one"
            )
        if tensor.dtype not in _FLOATS:
            if floating or tensor.is_complex():
                raise ValueError(f"{source}: {name} holds {tensor.dtype}, not floating numbers")
            continue
        if tensor.is_meta or not tensor.numel():
            continue
        low, high = (magnitudes or {}).get(name.rpartition(".")[2], (0.0, LARGEST))
        least, most = tensor.detach().abs().aminmax()
        if not bool(torch.isfinite(most)):
            raise ValueError(f"{source}: {name} holds NaN or infinity")
        if not low <= float(least) <= float(most) <= high:
            outside = float(most) if float(most) > high else float(least)
            raise ValueError(
                f"{source}: {name} holds {outside:.3g}; magnitudes from {low:g} to {high:g} make "
                "sense"
            )


def check_not_too_small(label: str, largest: float, dtype: torch.dtype, fix: str) -> None:
    """Refuse to store values in float16 that it rounds by more than 2⁻¹⁰ of the largest.

    Args:
        label: name of the values, for the error message.
        largest: largest magnitude of all values.
        dtype: type to store them in.
        fix: advice, for the error message.

    Raises:
        ValueError: the values are too small.
    """
    if dtype is torch.float16 and 0 < largest < _LEAST_LARGEST:
        raise ValueError(f"{label}, at most {largest:.2g}, are too small for float16; {fix}")
