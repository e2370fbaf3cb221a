"""Files of one array, written some rows at a time: safetensors, and ``.npy``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from upfeat.storage import DTYPES, replacing, reserve, tensor_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bytes of the header, the mark of upfeat's own .npy files: NumPy writes 128 bytes for an array of
# three axes, and every reader accepts the longer header as padding.
_NPY_HEADER = 1088


class ArrayFile:
    """Array (C, H, W) in a file, written some rows at a time.

    The file is not mapped into memory, because a mapped write to a full disk kills the process.
    """

    def __init__(self, file: IO[bytes], header: bytes, shape: Sequence[int], itemsize: int) -> None:
        """Reserve the disk space of the whole array, and write the header."""
        self._file, self._start = file, len(header)
        self._shape, self._itemsize = shape, itemsize
        reserve(file, len(header) + int(np.prod(shape)) * itemsize)
        file.write(header)

    def write_rows(self, top: int, values: NDArray[Any], left: int = 0) -> None:
        """Write ``values``, (C, rows, columns), from row ``top`` and column ``left`` on."""
        _, height, width = self._shape
        for channel, rows in enumerate(values):
            # Whole rows are adjacent in the file.
            for row, part in enumerate([rows] if rows.shape[1] == width else rows):
                place = (channel * height + top + row) * width + left
                self._file.seek(self._start + place * self._itemsize)
                self._file.write(np.ascontiguousarray(part).data)


@contextmanager
def create_array(
    path: Path, shape: Sequence[int], dtype: str, metadata: dict[str, str]
) -> Iterator[ArrayFile]:
    """Context to write a file with an array (C, H, W), which exists once the block has ended.

    Args:
        path: path of the file: ``.npy``, or else a safetensors file with one tensor, ``features``.
        shape: (C, H, W) of the array.
        dtype: "float16" or "float32"; for a safetensors file also "bfloat16", whose values are
            given to :meth:`ArrayFile.write_rows` as int16 with the same bits.
        metadata: metadata of the safetensors file.

    Raises:
        OSError: the disk has too little space, or writing failed.
    """
    kind = np.dtype("int16" if dtype == "bfloat16" else dtype).newbyteorder("<")
    size = int(np.prod(shape)) * kind.itemsize
    if path.suffix.lower() == ".npy":
        header = _npy_header(shape, kind.str)
    else:
        name = DTYPES[getattr(torch, dtype)]
        header = tensor_header([("features", name, list(shape))], [size], metadata)
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield ArrayFile(file, header, shape, kind.itemsize)


def _npy_header(shape: Sequence[int], dtype: str) -> bytes:
    """Make a ``.npy`` header of version 1.0, of the length that :func:`is_our_npy` recognises."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    content = text.encode().ljust(_NPY_HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content


def is_our_npy(path: Path) -> bool:
    """Return whether a ``.npy`` file has the header that :func:`create_array` writes."""
    with path.open("rb") as file:
        start = file.read(_NPY_HEADER)
    length = (_NPY_HEADER - 10).to_bytes(2, "little")
    whole = len(start) == _NPY_HEADER and start.endswith(b" \n")
    return whole and start.startswith(b"\x93NUMPY\x01\x00" + length)
