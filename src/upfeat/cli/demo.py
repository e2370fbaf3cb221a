"""``upfeat demo``: the web page."""

from __future__ import annotations

import argparse

from upfeat.cli.choices import BACKBONE_HELP, name_of

HELP = "Serve a web page for trying out features: click, paint, compare."
EXAMPLE = "  upfeat demo\n  upfeat demo --upsampler published.safetensors --port 8000"

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--backbone",
        type=name_of,
        action="append",
        default=[],
        metavar="NAME",
        help=f"backbone to offer before the others; may be repeated: {BACKBONE_HELP}",
    )
    parser.add_argument(
        "--text-backbone",
        metavar="NAME",
        help="also offer a CLIP or SigLIP model for searching by text: hf:ID-OR-FOLDER or "
        "open_clip:NAME/TAG",
    )
    parser.add_argument(
        "--upsampler",
        action="append",
        default=[],
        metavar="FILE",
        help="upsampler to offer before the others: a published checkpoint (AnyUp, JAFAR, NAF, "
        "UPLiFT, FeatUp) or a folder that save_pretrained wrote; may be repeated",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda, mps, …")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to bind to (default: %(default)s, this machine only); 0.0.0.0 lets everyone "
        "who can reach this machine use the page, without a password or encryption",
    )
    parser.add_argument(
        "--port", type=int, default=7860, help="port; 0 for any free one (default: %(default)s)"
    )


def execute(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from upfeat.cli.console import note
    from upfeat.optional import import_optional

    import_optional("gradio", 'the page needs Gradio: pip install "upfeat[demo]"')
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port {options.port} must be from 0 to 65535")
    from upfeat.demo.models import Models
    from upfeat.demo.page import build, serve
    from upfeat.demo.visits import Visits

    models = Models(
        options.backbone,
        options.upsampler,
        text_backbone=options.text_backbone,
        device=options.device,
    )
    if options.host.strip("[]") not in _LOOPBACK:
        note(
            "demo",
            f"bound to {options.host}: everyone who can reach this machine can use the page and "
            "its processor; there is no password, and photographs travel unencrypted",
        )
    page = build(models, Visits())
    serve(page, options.host, options.port, say=_announce)
    return 0


def _announce(address: str) -> None:
    print(f"The page: {address} (Ctrl+C ends it)", flush=True)
