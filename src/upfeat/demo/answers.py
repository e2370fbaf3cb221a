"""Answers to the events of the page: pictures, numbers and files of a visitor's photograph.

Pictures are sent inside messages, as ``data:`` addresses, and uploads inside the page's events:
Gradio's uploads and served files are not used, since Gradio stores them on disk.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from upfeat.demo.models import Models, offered
from upfeat.demo.pictures import (
    colour_images,
    heat_image,
    heat_range,
    jpeg_address,
    label_image,
    photo_image,
    png,
    png_address,
    sheet,
)
from upfeat.demo.session import Pair, Visit, read_upload
from upfeat.demo.visits import Visits
from upfeat.failures import failure_reason
from upfeat.machine import readable, status

PHOTOGRAPHS = {"cat": "A cat", "coffee": "A cup of coffee", "astronaut": "An astronaut"}
"""Bundled photographs: names of their files, and descriptions."""

Answer = dict[str, Any]
"""Message for the viewer: pictures and numbers, a file, or an error."""


class Answers:
    """Handlers of the page's events; each returns a message for the viewer, also for an error."""

    def __init__(self, models: Models, visits: Visits) -> None:
        """Answer from the models that are offered, and the store of visitors' photographs."""
        self.models, self.visits = models, visits

    def greet(
        self, token: str | None, backbone: str, upsampler: str, size: int
    ) -> tuple[str, Answer]:
        """Open the first bundled photograph for a new visitor."""
        return self._open(token, partial(bundled, "cat"), "cat", backbone, upsampler, size)

    def choose(
        self, token: str | None, backbone: str, upsampler: str, size: int, event: gr.EventData
    ) -> tuple[str, Answer]:
        """Open a bundled photograph."""
        name = str(event._data.get("photo"))
        return self._open(token, partial(bundled, name), name, backbone, upsampler, size)

    def upload(
        self, token: str | None, backbone: str, upsampler: str, size: int, event: gr.EventData
    ) -> tuple[str, Answer]:
        """Open a photograph that the visitor uploads."""
        label = str(event._data.get("name") or "the file")[:80]
        data = event._data.get("data")
        return self._open(
            token, partial(_decoded, data), label, backbone, upsampler, size, own=True
        )

    def change(self, token: str | None, backbone: str, upsampler: str, size: int) -> Answer:
        """Show the visitor's photograph with another model, or at another size."""

        def work() -> Answer:
            before = self.visits.get(token)
            visit = Visit(self.models(backbone, upsampler), before.original, size, before.name)
            self.visits.put(token or "", visit)
            return _opened(visit)

        return _answered(work)

    def pick(self, token: str | None, event: gr.EventData) -> Answer:
        """Show the similarity of all pixels with the picked pixel."""

        def work() -> Answer:
            y, x = (float(event._data[name]) for name in ("y", "x"))
            pair = self.visits.get(token).similarity(y, x)
            return _heat(pair, "similarity", f"Similarity with pixel (row {y:.0f}, column {x:.0f})")

        return _answered(work)

    def prompt(self, token: str | None, event: gr.EventData) -> Answer:
        """Show the similarity of all pixels with a text."""

        def work() -> Answer:
            text = str(event._data["prompt"])
            return _heat(self.visits.get(token).text(text), "text", f"Similarity with “{text}”")

        return _answered(work)

    def strokes(self, token: str | None, event: gr.EventData) -> Answer:
        """Show a segmentation by probes fitted on painted pixels."""

        def work() -> Answer:
            rows = event._data["strokes"]
            pair = self.visits.get(token).segment(rows)
            maps = {"coarse": png_address(label_image(pair.coarse))}
            maps["fine"] = png_address(label_image(pair.fine))
            return {
                "kind": "maps",
                "mode": "segment",
                "maps": maps,
                "status": f"Probes fitted on {len(rows)} painted pixels",
            }

        return _answered(work)

    def fetch(self, token: str | None, event: gr.EventData) -> Answer:
        """Make a file to download: features, head or picture."""

        def work() -> Answer:
            visit = self.visits.get(token)
            what, mode = str(event._data.get("what")), str(event._data.get("mode"))
            stem = Path(visit.name).stem or "photo"
            if what == "features":
                return _file(f"{stem}.upfeat.safetensors", visit.features_file())
            if what == "head":
                return _file(f"{stem}.head.safetensors", visit.head_file())
            return _file(f"{stem}.{mode}.png", png(_picture(visit, mode)))

        return _answered(work)

    def _open(
        self,
        token: str | None,
        content: Callable[[], bytes],
        name: str,
        backbone: str,
        upsampler: str,
        size: int,
        *,
        own: bool = False,
    ) -> tuple[str, Answer]:
        token = token or secrets.token_urlsafe(16)

        def work() -> Answer:
            original = read_upload(content(), name if own else "the photograph")
            visit = Visit(self.models(backbone, upsampler), original, size, name)
            self.visits.put(token, visit)
            return _opened(visit)

        return token, _answered(work)


def _answered(work: Callable[[], Answer]) -> Answer:
    """Return an event's answer; errors become a one-line message."""
    try:
        answer = work()
    except Exception as error:
        reason = failure_reason(error)
        if reason is None:  # raised, the viewer would wait for its answer for ever
            traceback.print_exc()
            reason = "an error of the program; the terminal of upfeat demo shows more"
        answer = {"kind": "error", "error": reason}
    return {**answer, "number": secrets.token_hex(4)}  # the viewer skips repeated numbers


def _opened(visit: Visit) -> Answer:
    coarse, fine = colour_images(visit)
    features = visit.lazy.features
    full = visit.lazy.shape.numel() * 4
    memory = status("VmRSS")
    parts = [f"{name} {seconds * 1000:.0f} ms" for name, seconds in visit.seconds.items()]
    parts.append(f"{features.shape[1]} channels")
    parts.append(f"the whole map would take {readable(full)}, kept are {readable(visit.kept)}")
    if memory is not None:
        parts.append(f"the server uses {readable(memory)}")
    return {
        "kind": "photo",
        "size": visit.shape,
        "grid": tuple(features.shape[2:]),
        "coarse": f"Coarse ({offered([visit.model.backbone.name])[0][0]})",
        "name": f"Upsampled ({visit.model.upsampler.name})",
        "texts": visit.has_texts,
        "sample": visit.name if visit.name in PHOTOGRAPHS else None,
        "photo": jpeg_address(photo_image(visit)),
        "maps": {"coarse": png_address(coarse), "fine": jpeg_address(fine)},
        "status": " · ".join(parts),
    }


def _heat(pair: Pair, mode: str, text: str) -> Answer:
    low, high = heat_range(pair)
    maps: Answer = {"low": low, "high": high}
    coarse, fine = (heat_image(part, low, high) for part in pair)
    maps["coarse"], maps["fine"] = png_address(coarse), jpeg_address(fine)
    return {"kind": "maps", "mode": mode, "maps": maps, "status": text}


def _picture(visit: Visit, mode: str) -> Image.Image:
    if mode != "features":
        pair = visit.last.get(mode)
        if pair is None:
            raise ValueError(f"there is no {mode} to draw yet; click, paint or write first")
        if mode == "segment":
            return sheet(visit, [label_image(part) for part in pair], "labels")
        span = heat_range(pair)
        return sheet(visit, [heat_image(part, *span) for part in pair], mode)
    return sheet(visit, colour_images(visit), "features")


def _file(name: str, content: bytes) -> Answer:
    return {
        "kind": "file",
        "name": name,
        "type": "image/png" if name.endswith(".png") else "application/octet-stream",
        "data": base64.b64encode(content).decode(),
        "status": f"{name}, {readable(len(content))}",
    }


def bundled(name: str) -> bytes:
    """Read the file of a bundled photograph.

    Raises:
        ValueError: there is no such photograph.
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"there is no bundled photograph {name!r}")
    return (Path(__file__).parent / "photos" / f"{name}.jpg").read_bytes()


def _decoded(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError("the upload is damaged; try again") from None
