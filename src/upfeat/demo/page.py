"""Gradio page around :mod:`upfeat.demo.session`.

Pictures are sent inside messages, as ``data:`` addresses, and uploads inside the page's events:
Gradio's uploads and served files are not used, since Gradio stores them on disk.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from upfeat.demo.models import Models
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
from upfeat.demo.session import (
    MAX_BYTES,
    MAX_PIXELS,
    SIZES,
    Pair,
    Visit,
    Visits,
    read_upload,
)
from upfeat.failures import failure_reason
from upfeat.machine import readable, status

# Set before the import: Gradio would report each start to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio as gr
from gradio.themes import Base, Default

if TYPE_CHECKING:
    from collections.abc import Awaitable

HERE = Path(__file__).parent
PHOTOGRAPHS = {"cat": "A cat", "coffee": "A cup of coffee", "astronaut": "An astronaut"}
QUEUE = 24
"""Number of requests that may wait; further requests are refused."""

_BODY = MAX_BYTES * 4 // 3 + (1 << 16)
_START = 448
Answer = dict[str, Any]


def build(models: Models, visits: Visits) -> gr.Blocks:
    """Build the page.

    Args:
        models: backbones and upsamplers to offer.
        visits: store of the visitors' photographs.
    """
    page = _Page(models, visits)
    with gr.Blocks(title="upfeat", analytics_enabled=False) as blocks:
        token = gr.State(None, time_to_live=visits.seconds, delete_callback=visits.drop)
        gr.HTML(_HEADING, elem_classes="uf-heading")
        picker = gr.HTML("", html_template=_picker(), js_on_load=_read("picker.js"))
        with gr.Row(elem_classes="uf-models"):
            backbone = gr.Dropdown(models.backbones, label="Backbone", min_width=240)
            upsampler = gr.Dropdown(
                [(Path(name).name, name) for name in models.upsamplers],
                label="Upsampler",
                min_width=240,
            )
            size = gr.Dropdown(
                [(f"{one} pixels", one) for one in SIZES],
                value=_START,
                label="Output size (shorter side)",
                min_width=240,
            )
        viewer = gr.HTML(
            {}, html_template=_read("viewer.html"), js_on_load=_read("viewer.js"), elem_id="viewer"
        )
        gr.HTML(_notes(visits), elem_classes="uf-hint uf-notes")
        chosen = [token, backbone, upsampler, size]
        # One request at a time: each uses all cores anyway, and memory stays that of one request.
        listen = {
            "outputs": [viewer],
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        opening = {**listen, "outputs": [token, viewer]}
        blocks.load(page.greet, chosen, **opening)
        picker.choose(page.choose, chosen, **opening)
        picker.upload(page.upload, chosen, **opening)
        for control in (backbone, upsampler, size):
            control.change(page.change, chosen, **listen)
        viewer.pick(page.pick, [token], **listen)
        viewer.strokes(page.strokes, [token], **listen)
        viewer.prompt(page.prompt, [token], **listen)
        viewer.fetch(page.fetch, [token], **listen)
    blocks.queue(max_size=QUEUE, default_concurrency_limit=1, api_open=False)
    return blocks


def serve(
    blocks: gr.Blocks, host: str, port: int, *, block: bool = True, say: Callable[[str], None]
) -> None:
    """Serve a page until it is interrupted.

    Args:
        blocks: the page, from :func:`build`.
        host: address to bind to.
        port: port to bind to; 0 for any free port.
        block: wait until the page is interrupted; otherwise return as soon as it is served.
        say: called with the page's address.

    Raises:
        OSError: the port is in use.
    """
    from starlette.middleware import Middleware

    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port or _free_port(host),
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        state_session_capacity=200,
        max_file_size=1,
        theme=_theme(),
        head=f"<style>{_read('page.css')}</style>",  # Gradio would rewrite it if given as css=
        app_kwargs={
            "middleware": [Middleware(_Bounded)],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
    )
    say(address)
    if block:
        blocks.block_thread()


def _free_port(host: str) -> int:
    """Return a port that is free now, since Gradio does not take 0 for any free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


class _Bounded:
    """Middleware that refuses large requests and Gradio's uploads to disk before reading them."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        unsized = scope["method"] == "POST" and b"chunked" in dict(scope["headers"]).get(
            b"transfer-encoding", b""
        )
        too_large = unsized or not length.isdigit() or int(length) > _BODY
        if too_large or "/upload" in scope["path"]:
            code = 413 if too_large else 403
            await send({"type": "http.response.start", "status": code, "headers": []})
            await send({"type": "http.response.body", "body": b"refused"})
            return
        await self.app(scope, receive, send)


class _Page:
    """Handlers of the page's events; each returns a message for the viewer, also for an error."""

    def __init__(self, models: Models, visits: Visits) -> None:
        self.models, self.visits = models, visits

    def greet(
        self, token: str | None, backbone: str, upsampler: str, size: int
    ) -> tuple[str, Answer]:
        """Open the first bundled photograph for a new visitor."""
        return self._open(token, partial(_bundled, "cat"), "cat", backbone, upsampler, size)

    def choose(
        self, token: str | None, backbone: str, upsampler: str, size: int, event: gr.EventData
    ) -> tuple[str, Answer]:
        """Open a bundled photograph."""
        name = str(event._data.get("photo"))
        return self._open(token, partial(_bundled, name), name, backbone, upsampler, size)

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
    """Return an event's answer; errors that the visitor can mend become a one-line message."""
    try:
        answer = work()
    except Exception as error:
        reason = failure_reason(error)
        if reason is None:
            raise
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
    if mode in visit.last:
        pair = visit.last[mode]
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


def _bundled(name: str) -> bytes:
    if name not in PHOTOGRAPHS:
        raise ValueError(f"there is no bundled photograph {name!r}")
    return (HERE / "photos" / f"{name}.jpg").read_bytes()


def _decoded(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError("the upload is damaged; try again") from None


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _picker() -> str:
    buttons = []
    for name, label in PHOTOGRAPHS.items():
        with Image.open(HERE / "photos" / f"{name}.jpg") as image:
            image.thumbnail((168, 168))
            address = png_address(image.convert("RGB"))
        buttons.append(
            f'<button type="button" data-photo="{name}" title="{label}">'
            f'<img src="{address}" alt="{label}"></button>'
        )
    bounds = (
        f'<span data-limit="{MAX_BYTES}">At most {MAX_BYTES >> 20} MiB and '
        f"{MAX_PIXELS // 10**6} million pixels. It is worked on in memory and never stored.</span>"
    )
    page = _read("picker.html").replace("<!-- photographs -->", "".join(buttons))
    return page.replace("<!-- bounds -->", bounds)


def _notes(visits: Visits) -> str:
    return (
        "<p>Requests are answered one at a time, in turn; at most "
        f"{QUEUE} wait, and further ones are turned away. A photograph is forgotten "
        f"{visits.seconds / 60:.0f} minutes after its last use, or sooner when more than "
        f"{visits.most} visitors are here. Nobody else can see yours.</p>"
    )


def _theme() -> Base:
    """Return a theme with the fonts of the visitor's system, so that no font is downloaded."""
    return Default(
        font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


_HEADING = (
    "<h1>Features at every pixel</h1><p>A backbone sees a photograph as a coarse grid of features; "
    "upfeat brings them to the photograph’s own pixels. Choose a photograph, then click, paint and "
    "compare.</p>"
)
