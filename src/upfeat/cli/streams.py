"""Output on terminals, which obey control characters, and may lack others, as often on Windows."""

from __future__ import annotations

import codecs
import io
import re
import sys

_ERRORS = "upfeat.plain"
_PLAIN = {
    **{"×": "x", "→": "->", "…": "...", "−": "-", "–": "-", "—": "--", "·": ".", "²": "^2"},
    **{"≥": ">=", "≤": "<=", "±": "+-", "σ": "sigma", "τ": "tau", "°": " degrees"},
}

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def say(text: str, *, error: bool = False) -> None:
    """Print one line, on standard error if it is no result, with its control characters escaped."""
    print(printable(text), file=sys.stderr if error else sys.stdout)


def printable(text: str) -> str:
    """Escape control characters, and those that change the direction of writing.

    Names of files, also inside archives, and texts in files may contain any character. A terminal
    would obey these: it would hide text, or show another.
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def accept_all_characters() -> None:
    """Let standard output and error replace what they cannot encode, rather than raise an error.

    Signs are replaced by ASCII, such as ``×`` by ``x``; other characters, which only names of files
    contain, are escaped.
    """
    codecs.register_error(_ERRORS, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    plain = (_PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode() for one in found)
    return "".join(plain), error.end
