"""Marks in files that upfeat writes, by which its own files are distinguished from others.

The mark is in the metadata of safetensors files, in a text field of pictures, in the comment of
videos, in the attributes of zarr arrays, in the field ``format`` of JSON files and in a tag at the
start of HTML files. ``.npy`` files are recognised by the length of their header.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from upfeat._version import __version__
from upfeat.array_files import is_our_npy
from upfeat.storage import read_metadata

FEATURES = "upfeat-features"
"""Mark of files of feature maps."""
PICTURE = "upfeat-picture"
"""Mark of pictures."""

VIDEO = "upfeat-video"
"""Mark of videos, in their comment."""

REPORT = "upfeat-report"
"""Mark of reports."""

_VIDEOS = (".mp4", ".mov", ".mkv", ".webm")
_VIDEO_ENDS = 1 << 16
"""Number of bytes at both ends of a video in which to search its comment, for tables follow it."""
_PICTURES = (".png", ".jpg", ".jpeg")
_HTML_MARK = '<meta name=generator content="upfeat'


def kind_of(path: Path) -> str | None:
    """Kind of a file that upfeat wrote, such as "upfeat-features"; ``None`` for any other file.

    Raises:
        OSError: the file cannot be read.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        return None  # no file, or a broken link
    try:
        if path.is_dir():
            return _ours(_zarr_attributes(path).get("format"))
        if suffix == ".safetensors":
            return _ours(read_metadata(path).get("format"))
        if suffix in _PICTURES:
            return _ours(picture_facts(path).get("format"))
        if suffix in _VIDEOS:
            return VIDEO if _is_our_video(path) else None
        if suffix == ".npy":
            return FEATURES if is_our_npy(path) else None
        if suffix == ".json":
            return _ours(json.loads(path.read_bytes()).get("format"))
        if suffix in (".html", ".htm"):
            with path.open("rb") as file:
                return REPORT if _HTML_MARK.encode() in file.read(1024) else None
    except (ValueError, AttributeError, RecursionError):
        pass
    return None


def _is_our_video(path: Path) -> bool:
    with path.open("rb") as file:
        ends = file.read(_VIDEO_ENDS)
        file.seek(max(path.stat().st_size - _VIDEO_ENDS, 0))
        ends += file.read()
    return VIDEO.encode() in ends


def html_mark() -> str:
    """Mark of reports, for the head of an HTML page."""
    return f'{_HTML_MARK} {__version__}">'


def _ours(name: object) -> str | None:
    return name if isinstance(name, str) and name.startswith("upfeat-") else None


def _zarr_attributes(folder: Path) -> Mapping[str, Any]:
    """Attributes of a zarr array, of format 3 or 2; empty for another folder."""
    if (folder / "zarr.json").is_file():
        return json.loads((folder / "zarr.json").read_bytes()).get("attributes", {})
    if (folder / ".zattrs").is_file():
        return json.loads((folder / ".zattrs").read_bytes())
    return {}


def encode_picture(picture: Image.Image, suffix: str, *, recipe: str = "") -> bytes:
    """Encode a picture as PNG or JPEG, with upfeat's mark.

    Args:
        picture: the picture.
        suffix: ".png" for PNG; any other for JPEG.
        recipe: digest of everything that the picture depends on, for
            :func:`upfeat.outputs.is_done`.

    Returns:
        Content of the file.
    """
    facts = {"Software": f"upfeat {__version__}", "format": PICTURE, "recipe": recipe}
    content = io.BytesIO()
    if suffix.lower() == ".png":
        texts = PngImagePlugin.PngInfo()
        for key, value in facts.items():
            texts.add_text(key, value)
        picture.save(content, format="PNG", pnginfo=texts)
    else:
        picture.save(content, format="JPEG", comment=json.dumps(facts).encode())
    return content.getvalue()


def picture_facts(path: Path) -> Mapping[str, Any]:
    """Read the text fields of a picture, by name; empty for a damaged picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as opened:
                info = opened.info
        except PermissionError:
            raise
        except (OSError, SyntaxError, Image.DecompressionBombError):
            return {}
    comment = info.get("comment")
    if isinstance(comment, bytes):
        return json.loads(comment)
    return {str(key): value for key, value in info.items() if isinstance(value, str)}
