"""Gradio page of :mod:`upfeat.demo.answers`: its parts, their events, and the server."""

from __future__ import annotations

import errno
import io
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.themes import Base, Default
from PIL import Image

from upfeat.demo.answers import PHOTOGRAPHS, Answers, bundled
from upfeat.demo.models import Models, offered
from upfeat.demo.pictures import png_address
from upfeat.demo.session import MAX_BYTES, MAX_PIXELS, SIZES
from upfeat.demo.visits import Visits

if TYPE_CHECKING:
    from collections.abc import Awaitable

HERE = Path(__file__).parent
QUEUE = 24
"""Number of requests that may wait; further requests are refused."""

_BUSY = """(...chosen) => {
  const detail = { busy: "Computing features…" };
  document.dispatchEvent(new CustomEvent("upfeat-say", { detail }));
  return chosen;
}"""
"""Script that shows that features are being computed, and passes on what was chosen."""
_BODY = MAX_BYTES * 4 // 3 + (1 << 16)
_START = 448
_POSTED = ("queue/join", "reset", "cancel")
"""Addresses of Gradio that the page sends data to."""
_READ = ("queue/data", "heartbeat/", "startup-events", "app_id")
"""Addresses of Gradio, or beginnings of them, that the page and the server's start read."""


def build(models: Models, visits: Visits) -> gr.Blocks:
    """Build the page.

    Args:
        models: backbones and upsamplers to offer.
        visits: store of the visitors' photographs.
    """
    answers = Answers(models, visits)
    with gr.Blocks(title="upfeat", analytics_enabled=False) as blocks:
        token = gr.State(None)
        gr.HTML(_HEADING, elem_classes="uf-heading")
        picker = gr.HTML("", html_template=_picker(), js_on_load=_read("picker.js"))
        with gr.Row(elem_classes="uf-models"):
            backbone = gr.Dropdown(offered(models.backbones), label="Backbone", min_width=240)
            upsampler = gr.Dropdown(offered(models.upsamplers), label="Upsampler", min_width=240)
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
        blocks.load(answers.greet, chosen, **opening)
        picker.choose(answers.choose, chosen, **opening)
        picker.upload(answers.upload, chosen, **opening)
        for control in (backbone, upsampler, size):
            control.change(answers.change, chosen, js=_BUSY, **listen)
        # The viewer asks again as soon as it is answered, which is before Gradio takes an event for
        # ended; by default, a second one of its kind is dropped, and the viewer waits for ever.
        asking = {**listen, "trigger_mode": "multiple"}
        viewer.pick(answers.pick, [token], **asking)
        viewer.strokes(answers.strokes, [token], **asking)
        viewer.prompt(answers.prompt, [token], **asking)
        viewer.fetch(answers.fetch, [token], **asking)
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
        ValueError: the port is in use, or the address is not one of this machine's.
    """
    from starlette.middleware import Middleware

    host = host.strip("[]")
    port = _free_port(host, port)
    _, address, _ = blocks.launch(
        server_name=f"[{host}]" if ":" in host else host,  # as in addresses of IPv6
        server_port=port,
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


def _free_port(host: str, port: int) -> int:
    """Return the port if it is free, or any free port for 0, which Gradio does not take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"port={port} is in use; give another, or 0 for any") from None
            raise ValueError(
                f"host={host!r} must be an address of this machine ({error.strerror})"
            ) from None
        return probe.getsockname()[1]


class _Bounded:
    """Middleware that refuses large requests, and what the page does not use, before reading them.

    Of Gradio's addresses, others store uploads, recordings and what a visitor sees on disk, serve
    files and fetch from servers.
    """

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
        if too_large or not _is_used(scope["method"], scope["path"]):
            code = 413 if too_large else 403
            await send({"type": "http.response.start", "status": code, "headers": []})
            await send({"type": "http.response.body", "body": b"refused"})
            return
        await self.app(scope, receive, send)


def _is_used(method: str, path: str) -> bool:
    """Return whether the page sends such requests; there may be folders before the path."""
    _, below, asked = path.partition("/gradio_api/")
    if method == "POST":
        return asked in _POSTED
    return method in ("GET", "HEAD") and (not below or asked.startswith(_READ))


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _picker() -> str:
    buttons = []
    for name, label in PHOTOGRAPHS.items():
        with Image.open(io.BytesIO(bundled(name))) as image:
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
