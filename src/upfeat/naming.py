"""What to say of a name that is not known."""

import difflib


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """One line that says so and suggests the close names.

    Args:
        kind: what was looked for, as "backbone".
        name: what the user gave.
        known: all names there are.
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
    return f'{kind} "{name}" is unknown; {hint}'
