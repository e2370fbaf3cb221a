"""Imports of optional libraries on demand, with a one-line error for a missing library."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from upfeat.optional import import_optional

_LOG = logging.getLogger("upfeat.backbones")


def import_library(name: str, *, extra: str) -> Any:
    """Import an optional library.

    Args:
        name: name of the library's module.
        extra: extra of this package that installs the library.

    Raises:
        ValueError: the library is not installed, or fails to import.
    """
    top = name.partition(".")[0]
    return import_optional(name, f"{top} is not installed: pip install 'upfeat[{extra}]'")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries' log messages about retried downloads; a failure still raises an error."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def without_broken(name: str) -> Iterator[None]:
    """Hide an installed package that fails to import, so that packages importing it still work.

    A torchvision whose build does not match PyTorch's fails to import, and with it fail all models
    of transformers, although none of them needs torchvision.
    """
    if name in sys.modules or find_spec(name) is None:
        yield
        return
    try:
        import_module(name)
    except Exception as error:  # a broken build may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _LOG.warning("%s cannot be imported (%s): going on without it", name, reason)
        for module in [one for one in sys.modules if one.partition(".")[0] == name]:
            del sys.modules[module]
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
        try:
            yield
        finally:
            sys.modules.pop(name, None)
        return
    yield
