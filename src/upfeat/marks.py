"""Marks inside files of upfeat, so that none is taken for somebody else's.

Safetensors in their metadata, pictures in a text, ``.npy`` by the length of its header, zarr in its
attributes, JSON and HTML by a word at their start.
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
from upfeat.storage import is_our_npy, read_metadata

FEATURES = "upfeat-features"
"""The mark of files of feature maps."""
PICTURE = "upfeat-picture"
"""The mark of pictures."""

VIDEO = "upfeat-video"
"""The mark of videos, in their comment."""

REPORT = "upfeat-report"
"""The mark of reports."""

_VIDEOS = (".mp4", ".mov", ".mkv", ".webm")
_VIDEO_ENDS = 1 << 16
"""Bytes at both ends of a video among which its comment stands, with all tables after it."""
_PICTURES = (".png", ".jpg", ".jpeg")
_HTML_MARK = '<meta name=generator content="upfeat'


def kind_of(path: Path) -> str | None:
    """Kind of a file that upfeat made, such as "upfeat-features"; ``None`` for any other.

    Raises:
        OSError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        return None  # a link that leads nowhere, at most
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
    """Mark for the head of an HTML page, so that it is known as ours."""
    return f'{_HTML_MARK} {__version__}">'


def _ours(name: object) -> str | None:
    return name if isinstance(name, str) and name.startswith("upfeat-") else None


def _zarr_attributes(folder: Path) -> Mapping[str, Any]:
    """Of a zarr array, of format 3 or 2."""
    if (folder / "zarr.json").is_file():
        return json.loads((folder / "zarr.json").read_bytes()).get("attributes", {})
    if (folder / ".zattrs").is_file():
        return json.loads((folder / ".zattrs").read_bytes())
    return {}


def encode_picture(picture: Image.Image, suffix: str, *, recipe: str = "") -> bytes:
    """A picture as the bytes of a file that says it is ours.

    Args:
        picture: to encode.
        suffix: ".png", or else JPEG.
        recipe: digest of all that the picture depends on, for :func:`upfeat.outputs.is_done`.
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
    """The texts inside a picture; of one that is not whole, none."""
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
