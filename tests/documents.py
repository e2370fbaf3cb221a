"""The code of documents: blocks with their places, and how a page's are run.

Pages are Markdown. Every ``python`` block is executed, every ``sh`` block and every indented line
that starts with a command is run or parsed, in the order of the page, in one folder and with one
namespace for each page. The files that a reader would bring along are brought by :func:`furnish`;
every other name a page must make itself, so that a reader may paste it as it is.

A comment on the line before a block says what is special about it::

    <!-- needs: timm -->      skipped where that module is not installed
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import jbu_reference
import numpy as np
import torch
from PIL import Image
from published_reference import published_state

import upfeat
from upfeat.frames import VideoWriter
from upfeat.heads import SavedHead, describe_backbone, save_head

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "examples" / "photos"
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "csrc" / "README.md")
    if path.name != "CHANGELOG.md"
)

_FENCE = re.compile(
    r"(?:^<!--\s*needs:\s*(?P<needs>[\w., ]+?)\s*-->\n)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```\s*$",
    re.MULTILINE | re.DOTALL,
)
_INDENTED = re.compile(r"(?<=\n\n)(?P<code>(?: {4}[^\n]*\n)+)")
_COMMAND = re.compile(r"\s*(upfeat|torchrun|python -m upfeat)\s")


@dataclass(frozen=True)
class Block:
    """Code in a page.

    Attributes:
        language: of its fence; "sh" for indented commands.
        code: its lines.
        line: of the page that its first line is.
        needs: modules without which it is left out.
    """

    language: str
    code: str
    line: int
    needs: tuple[str, ...] = ()


def blocks(text: str) -> list[Block]:
    """Blocks of a page in order."""
    found = []
    for match in _FENCE.finditer(text):
        needs = tuple(re.findall(r"[\w.]+", match["needs"] or ""))
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], match["code"], line, needs))
    # Blanked, so that the indented lines inside fences are not found twice.
    rest = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in _INDENTED.finditer(rest):
        if _COMMAND.match(match["code"]):
            line = rest.count("\n", 0, match.start("code")) + 1
            found.append(Block("sh", match["code"], line))
    return sorted(found, key=lambda block: block.line)


def command_lines(code: str) -> list[list[str]]:
    """Words of each line of a shell block: continued lines joined, comments dropped."""
    joined = re.sub(r"\\\n\s*", "", code)
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def furnish(folder: Path) -> None:
    """Put the files that documents speak of into a folder. Names, a page makes by itself."""
    cat = Image.open(PHOTOS / "cat.jpg")
    cat.resize((80, 64)).save(folder / "photo.jpg")
    cat.resize((80, 64)).save(folder / "scene.tif")
    (folder / "photos").mkdir()
    for index in range(3):
        cat.crop((40 * index, 20, 40 * index + 160, 140)).resize((96, 72)).save(
            folder / "photos" / f"{index}.jpg"
        )
    cat.resize((80, 64)).save(folder / "photos" / "photo.jpg")
    _write_head(folder / "head.safetensors")
    _write_clip(cat, folder / "clip.mp4")
    torch.save(jbu_reference.published_state(), folder / "published.ckpt")
    torch.save(published_state(upfeat.NAF()), folder / "naf_release.pth")


def _write_head(path: Path) -> None:
    """A head of two classes for the default model."""
    made_by = describe_backbone(upfeat.load_backbone("efficientnet_lite0"))
    weight = torch.randn(2, 112, generator=torch.Generator().manual_seed(0))
    save_head(path, SavedHead(weight, torch.zeros(2), ["a", "b"], "classes", made_by, "detail"))


def _write_clip(image: Image.Image, path: Path) -> None:
    """A video of three frames, where videos can be written."""
    if find_spec("av") is None:
        return
    with VideoWriter(path, Fraction(10)) as writer:
        for left in (0, 8, 16):
            writer.add(np.asarray(image.crop((left, 0, left + 320, 256)).resize((80, 64))), None)
