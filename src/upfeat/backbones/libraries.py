"""Optional libraries, imported when they are needed, with one line where they are not there."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_library(name: str, *, extra: str) -> Any:
    """Import an optional library.

    Args:
        name: of the module.
        extra: of this package that installs it.

    Raises:
        ValueError: it is not installed, or fails to import.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise ValueError(f"{name} cannot be imported: {error}") from None
        raise ValueError(
            f"{name} is not installed: pip install 'upfeat[{extra}]' (or pip install {name})"
        ) from None
    except Exception as error:  # as torchvision, where its build does not match PyTorch's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} is installed but cannot be imported: {reason}") from None
