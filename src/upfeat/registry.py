"""Registries of items by name, with suggestions for mistyped names."""

import difflib
from typing import TypeVar

Item = TypeVar("Item")
AnyItem = TypeVar("AnyItem")


class Registry(dict[str, Item]):
    """Items by name, in the order of registration.

    Example:
        >>> shapes = Registry[type]("shape")
        >>> @shapes.register
        ... class Square:
        ...     name = "square"
        >>> shapes["square"].__name__
        'Square'
        >>> shapes.find("sqare")
        Traceback (most recent call last):
        ValueError: shape "sqare" is unknown; did you mean square?
    """

    def __init__(self, kind: str) -> None:
        """Make an empty registry.

        Args:
            kind: noun for the items in error messages, such as "upsampler".
        """
        super().__init__()
        self.kind = kind

    def register(self, item: AnyItem) -> AnyItem:
        """Add an item under its ``name``; usable as a decorator.

        Raises:
            ValueError: the item has no name, or its name is taken by another item.
        """
        name = getattr(item, "name", None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{self.kind} {item!r} has no name; set its attribute name to a text")
        other = self.setdefault(name, item)  # pyright: ignore[reportArgumentType]
        if other is not item:
            raise ValueError(f'{self.kind} "{name}" is registered already, as {other!r}')
        return item

    def find(self, name: str) -> Item:
        """Return the item with the given name.

        Raises:
            ValueError: there is no such item; the message suggests close names.
        """
        if name not in self:
            raise ValueError(unknown_name(self.kind, name, list(self)))
        return self[name]


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """Compose a one-line message for an unknown name, with close names as suggestions.

    Args:
        kind: noun for the item, such as "backbone".
        name: the unknown name.
        known: all known names.
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
    return f'{kind} "{_cut(name)}" is unknown; {hint}'


def _cut(name: str) -> str:
    """Return the start of a name, in one line."""
    return " ".join(name[:60].splitlines())
