"""Output on terminals and into files whose encoding lacks some characters, as often on Windows."""

from __future__ import annotations

import codecs
import io
import sys

_ERRORS = "upfeat.plain"
_PLAIN = {
    **{"×": "x", "→": "->", "…": "...", "−": "-", "–": "-", "—": "--", "·": ".", "²": "^2"},
    **{"≥": ">=", "≤": "<=", "±": "+-", "σ": "sigma", "τ": "tau", "°": " degrees"},
}


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
