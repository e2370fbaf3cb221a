"""Imports of optional packages, with a one-line error for one that is missing or broken."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_optional(name: str, missing: str) -> Any:
    """Import a module of an optional package.

    Args:
        name: name of the module.
        missing: message if the package is not installed, with the command that installs it.

    Raises:
        ValueError: the package is not installed, or fails to import.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name in (name, name.partition(".")[0]):
            raise ValueError(missing) from None
        raise ValueError(f"{name} cannot be imported: {error}") from None
    except Exception as error:  # for example a torchvision whose build does not match PyTorch's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = ""
        if "torchvision" in reason:
            fix = "; install torchvision from where torch came from: their builds must match"
        raise ValueError(f"{name} is installed but cannot be imported: {reason}{fix}") from None
