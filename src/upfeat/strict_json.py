"""Strict JSON for untrusted files: bounded in size, without NaN, infinity and duplicate names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

LARGEST = 1 << 20
"""Largest size of a settings file in bytes; upfeat writes a few hundred."""


def read_object(path: Path, *, largest: int = LARGEST) -> dict[str, Any]:
    """Read a JSON file that contains one object.

    Args:
        path: the JSON file.
        largest: largest allowed size of the file, in bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is too large, is not strict JSON, or does not contain an object.
    """
    return _object(read_value(path, largest=largest), str(path))


def read_value(path: Path, *, largest: int = LARGEST) -> Any:
    """Read a JSON file with any value, in UTF-8, with or without a byte order mark.

    Arguments and errors are those of :func:`read_object`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path}: larger than {largest >> 10} KiB, so it holds no settings")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    return _parse(text, str(path))


def parse_object(text: str, source: str) -> dict[str, Any]:
    """Parse the text of one JSON object.

    Args:
        text: the JSON.
        source: name of the source, for error messages.

    Raises:
        ValueError: the text is not JSON, is not an object, contains NaN, infinity or a duplicate
            name, or is nested more deeply than the interpreter's stack allows.

    Example:
        >>> parse_object('{"radius": 2}', "config.json")
        {'radius': 2}
    """
    return _object(_parse(text, source), source)


def _parse(text: str, source: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"{source}: not JSON of ours (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{source}: not JSON ({_short(error)})") from None


def _object(content: Any, source: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{source}: holds {type(content).__name__}, not an object (name: value)")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{json.dumps(twice[:60])} is given twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
