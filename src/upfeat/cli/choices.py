"""Names that --help lists, and arguments that several commands share.

The names are repeated here or parsed from the source, since importing the registries would import
PyTorch, which --help must not wait for; a test compares them with the registries.
"""

from __future__ import annotations

import argparse
import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upfeat.bounds import PASSES

if TYPE_CHECKING:
    from upfeat.heads import SavedHead
    from upfeat.model import FeatUp

DEFAULT_BACKBONE = "efficientnet_lite0"
BACKBONE_HELP = (
    "efficientnet_lite0 (or .stride8, .stride32, …), timm:NAME, hf:ID-OR-FOLDER, "
    "open_clip:NAME/TAG, hub:REPO:NAME, a TorchScript or exported file, or my_file.py:make"
)
LAYER_HELP = (
    "layer of a library's backbone, from 0, or the name of a module inside a model of hub: or of "
    "my_file.py:make; several are concatenated (default: the last)"
)
_RESULTS = (".safetensors", ".npy", ".zarr", ".png", ".jpg", ".jpeg", ".pt", ".pth")
"""Suffixes of files, which users may give where a folder is meant."""

DEFAULT_UPSAMPLER = "detail"


_WITHOUT_WEIGHTS = r"^    (published_by = |wants_hidden = True)"
"""Pattern in classes of upsamplers that need a file, or weights for one backbone."""


def _registered() -> list[str]:
    """List the upsamplers for any backbone, by parsing the source files that register them."""
    pattern = r"^@UPSAMPLERS\.register\nclass [^\n]+\n(.*?)(?=^\S)"
    found = []
    for path in sorted((Path(__file__).parents[1] / "upsamplers").glob("*.py")):
        for body in re.findall(
            pattern, path.read_text("utf-8") + "\nend\n", re.MULTILINE | re.DOTALL
        ):
            name = re.search(r'^    name = "(\w+)"$', body, re.MULTILINE)
            if name and not re.search(_WITHOUT_WEIGHTS, body, re.MULTILINE):
                found.append(name[1])
    return found


UPSAMPLERS = tuple(sorted(_registered(), key=lambda name: (name != DEFAULT_UPSAMPLER, name)))

BASELINES = ("nearest", "bilinear", "bicubic", "joint_bilateral", "jbu_stack", "neighbourhood")
"""Upsamplers that every evaluation includes by default."""

UPSAMPLER_HELP = (
    f"{', '.join(UPSAMPLERS)}, the full name of shipped weights (listed by upfeat info), a folder "
    "that save_pretrained wrote, or a published checkpoint (AnyUp, JAFAR, NAF, UPLiFT, FeatUp) "
    f"(default: {DEFAULT_UPSAMPLER} with --early; for efficientnet_lite0 and lite1 early_detail, "
    "trained on their early layers)"
)


def add_layer(parser: argparse.ArgumentParser) -> None:
    """Declare ``--layer``."""
    parser.add_argument("--layer", type=layer_of, nargs="+", metavar="N", help=LAYER_HELP)


def add_backbone(parser: argparse.ArgumentParser) -> None:
    """Declare ``--backbone`` and ``--layer``."""
    parser.add_argument(
        "--backbone",
        type=name_of,
        default=DEFAULT_BACKBONE,
        metavar="NAME",
        help=f"{BACKBONE_HELP} (default: %(default)s)",
    )
    add_layer(parser)


def add_upsampler(parser: argparse.ArgumentParser) -> None:
    """Declare ``--upsampler``."""
    parser.add_argument("--upsampler", metavar="NAME", help=UPSAMPLER_HELP)


def add_passes(parser: argparse.ArgumentParser, what: str = "image") -> None:
    """Declare ``--passes``; ``what`` names the things whose features are computed."""
    parser.add_argument(
        "--passes",
        type=int,
        choices=PASSES,
        default=1,
        help=f"2: average features of the {what} and its mirror image; 5: also use the {what} "
        "enlarged to 1.7 times its sides; 8: its mirror image too (default: %(default)s)",
    )


def add_early(parser: argparse.ArgumentParser) -> None:
    """Declare ``--early``."""
    parser.add_argument(
        "--early",
        action=argparse.BooleanOptionalAction,
        help="whether to use early layers, on a finer grid: the backbone's own, or, for "
        "transformers, those of the embedded EfficientNet-Lite0 (default: with the default "
        "upsampler, and with one that was trained on them)",
    )


def add_engine(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare ``--engine``, ``--workers`` and ``--address``; ``what`` names a worker's task."""
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="compute in this process (default), or in Ray workers on this machine or a cluster",
    )
    threads = "Ray workers" if what == "tile" else "threads or Ray workers"
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"number of {threads}; each processes one {what} at a time (default: one per CPU)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="address of a Ray cluster (default: start Ray on this machine)",
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Declare ``--bands`` and ``--max-value``."""
    parser.add_argument(
        "--bands",
        type=bands_of,
        metavar="N,N,N",
        help="bands to use of files with several, counted from 0 (default: the first three)",
    )
    parser.add_argument(
        "--max-value",
        type=float,
        metavar="VALUE",
        help="value that becomes white, such as 4095 for 12 bits or 10000 for many reflectances "
        "(default: the largest value of the file's type)",
    )


def with_layers(backbone: str | None, layers: list[str] | None) -> str | None:
    """Append the layers of ``--layer`` to a backbone's name, as in "timm:NAME@3,8".

    Raises:
        ValueError: a layer is a name, and the backbone is of a library that numbers its layers.
    """
    if not layers:
        return backbone
    backbone = backbone or DEFAULT_BACKBONE
    names = [layer for layer in layers if not layer.lstrip("-").isdecimal()]
    if names and not re.match(r"hub:|.*\.py:", backbone):
        raise ValueError(f"--layer {names[0]}: layers of {backbone} are given by number, from 0")
    return f"{backbone}@{','.join(layers)}"


def load_model(options: argparse.Namespace, **chosen: Any) -> FeatUp:
    """Load the model that a command's flags describe; ``chosen`` replaces some of them."""
    import upfeat

    given = {**vars(options), **chosen}
    names = [name for name in ("upsampler", "passes", "early", "device") if name in given]
    backbone = with_layers(options.backbone, options.layer) or DEFAULT_BACKBONE
    return upfeat.load(backbone, **{name: given[name] for name in names})


def load_with_head(options: argparse.Namespace) -> tuple[FeatUp, SavedHead | None]:
    """Load a model, and the head of ``--head``, if any, which must be made for its backbone."""
    from upfeat.heads import load_head

    head = None if options.head is None else load_head(options.head)
    model = load_model(options)
    if head is not None:
        head.check_backbone(model.backbone, str(options.head))
    return model, head


def name_of(text: str) -> str:
    """Read a name; an empty name, as from an unset variable of the shell, is an error."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f'"{text}" is empty; leave it out for the default')
    return text


def layer_of(text: str) -> str:
    """Read a layer: a number, or the name of a module, such as "layer3" or "encoder.blocks.5"."""
    if not re.fullmatch(r"-\d+|\w+(\.\w+)*", text):
        raise argparse.ArgumentTypeError(f'"{text}" must be a number from 0, or a module\'s name')
    return text


def path_of(text: str) -> Path:
    """Read a path; an empty one, which would be the current folder, is an error."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f'"{text}" is empty; give a path, . for this folder')
    return Path(text)


def folder_of(text: str) -> Path:
    """Read the path of a folder of results; a new one must not be named like a single result."""
    path = path_of(text)
    if path.suffix.lower() in _RESULTS and not path.exists():
        raise argparse.ArgumentTypeError(
            f"{path} would be a folder, named like a file; give a folder, such as {path.stem}/"
        )
    return path


def matching(paths: Iterable[Path]) -> list[Path]:
    """Replace patterns such as ``*.jpg``, which shells on Windows pass on, by the files they match.

    A path that exists, or a pattern that matches nothing, stays as it is.
    """
    found: list[Path] = []
    for path in paths:
        # Path.glob accepts no absolute patterns.
        names = [] if path.exists() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
        found += map(Path, names or [path])
    return found


def size_of(text: str | None) -> tuple[int, int] | None:
    """Read "1024x768", WIDTHxHEIGHT, as (height, width).

    Raises:
        ValueError: the text has another form, or a side is 0.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    if not found or 0 in (int(found[1]), int(found[2])):
        raise ValueError(f"--size {text} must be WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(found[2]), int(found[1])


def bands_of(text: str) -> list[int]:
    """Read bands such as "4,3,2"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" must be bands such as 4,3,2') from None
