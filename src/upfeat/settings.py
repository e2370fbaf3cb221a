"""Declarations of settings, from which checks, flags, docstrings and tables are generated."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from upfeat import bounds
from upfeat.bounds import LARGEST

AnyConfig = TypeVar("AnyConfig", bound=type)


class Setting(NamedTuple):
    """Declaration of one field of a configuration."""

    meaning: str
    """Phrase in lower case for the docstring, ``--help`` and the table in the documentation."""
    check: Callable[[str, Any], Any]
    """Function from name and value to the converted value; raises ValueError if out of range."""
    flag: bool = True
    """True if the command has a flag for the setting."""
    operational: bool = False
    """True if results do not depend on the setting."""


def setting(
    default: Any,
    meaning: str,
    check: Callable[[str, Any], Any],
    *,
    flag: bool = True,
    operational: bool = False,
) -> Any:
    """Declare a field of a configuration; see :class:`Setting`.

    Example:
        >>> @documented
        ... @dataclasses.dataclass(frozen=True)
        ... class Config:
        ...     '''Settings of a walk.'''
        ...
        ...     steps: int = setting(10, "how far to go", Whole(1, 99))
        ...
        ...     def __post_init__(self) -> None:
        ...         check(self)
        >>> Config(steps=100)
        Traceback (most recent call last):
        ValueError: steps=100 must be 99 or less
        >>> print(table(Config))
        | setting | default | meaning |
        | --- | --- | --- |
        | `steps` | `10` | how far to go |
    """
    metadata = {"setting": Setting(meaning, check, flag, operational)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Whole(NamedTuple):
    """Check of a whole number; see :func:`upfeat.bounds.whole`."""

    least: int = 1
    most: int = LARGEST
    optional: bool = False

    def __call__(self, name: str, value: Any) -> int | None:
        """Check a value."""
        return bounds.whole(name, value, self.least, self.most, optional=self.optional)


class Number(NamedTuple):
    """Check of a finite number; see :func:`upfeat.bounds.number`."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    text: bool = False

    def __call__(self, name: str, value: Any) -> float:
        """Check a value."""
        low, high, above, below, text = self
        return bounds.number(name, value, low, high, above=above, below=below, text=text)


class Choice(NamedTuple):
    """Check of a name among known names; see :func:`upfeat.bounds.choice`."""

    known: Sequence[str]

    def __call__(self, name: str, value: Any) -> str:
        """Check a value."""
        return bounds.choice(name, value, self.known)


class Name(NamedTuple):
    """Check of a name or a path, given as text."""

    optional: bool = True

    def __call__(self, name: str, value: Any) -> str | None:
        """Check the value of a setting and return it."""
        if isinstance(value, os.PathLike) and not self.optional:
            return os.fspath(value)
        if not isinstance(value, str) and not (self.optional and value is None):
            raise ValueError(f"{name}={bounds.shown(value)} must be a name")
        return value


def options(name: str, value: Any) -> dict[str, Any]:
    """Check a dictionary of options; return a copy, which the caller cannot change."""
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{name}={bounds.shown(value)} must be names and values")
    return dict(value)


def names(name: str, value: Any) -> tuple[str, ...]:
    """Check a list of names; return it as a tuple."""
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{name}={bounds.shown(value)} must be a list of names")
    return tuple(value)


def folder(name: str, value: Any) -> Path | None:
    """Check a path; return it as a ``Path``."""
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}={bounds.shown(value)} must be a folder")
    return None if value is None else Path(value)


def settings_of(config: type) -> dict[str, Setting]:
    """Declared settings of a configuration class, by name."""
    declared = {field.name: field.metadata.get("setting") for field in dataclasses.fields(config)}
    return {name: one for name, one in declared.items() if one is not None}


def check(config: Any) -> None:
    """Check every setting of a configuration and convert it to its type; for ``__post_init__``.

    Raises:
        ValueError: a setting is out of range.
    """
    checked = {
        name: one.check(name, getattr(config, name))
        for name, one in settings_of(type(config)).items()
    }
    for name, value in checked.items():
        object.__setattr__(config, name, value)


def check_each(source: str | Path, config: type, values: Mapping[str, Any]) -> None:
    """Check values of a file for a configuration class; names that it lacks are not checked.

    Raises:
        ValueError: a value is out of range; the message begins with ``source``.
    """
    declared = settings_of(config)
    for name, value in values.items():
        if name in declared:
            try:
                declared[name].check(name, value)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None


def documented(config: AnyConfig) -> AnyConfig:
    """Append the settings to a configuration's docstring; use as a decorator above dataclass."""
    lines = [f"        {name}: {one.meaning}." for name, one in settings_of(config).items()]
    config.__doc__ = "\n".join([(config.__doc__ or "").rstrip(), "", "    Attributes:", *lines, ""])
    return config


def add_flags(parser: argparse._ActionsContainer, config: type) -> None:
    """Add a flag for each setting to a parser; options contain only the flags that were given."""
    for name, one in settings_of(config).items():
        if one.flag:
            flag = f"--{name.replace('_', '-')}"
            meaning = one.meaning.replace("`", "")
            parser.add_argument(
                flag,
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=f"{meaning} (default: {getattr(config, name)})",
            )


def table(config: type) -> str:
    """Format the settings of a configuration class as a Markdown table."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(config):
        one = field.metadata.get("setting")
        if one is not None:
            missing = field.default is dataclasses.MISSING
            default = field.default_factory() if missing else field.default  # pyright: ignore[reportCallIssue]
            rows.append(f"| `{field.name}` | `{default!r}` | {one.meaning} |")
    return "\n".join(rows)
