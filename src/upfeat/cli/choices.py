"""Names that --help lists.

They stand here once more, or are read off the source, because help is there before PyTorch could be
imported; a test holds them against the registries.
"""

import re
from pathlib import Path

DEFAULT_BACKBONE = "efficientnet_lite0"

DEFAULT_UPSAMPLER = "detail"


def _registered() -> list[str]:
    """Names of the upsamplers that need no file, read off the source that registers them."""
    pattern = r"^@UPSAMPLERS\.register\nclass [^\n]+\n(.*?)(?=^\S)"
    found = []
    for path in sorted((Path(__file__).parents[1] / "upsamplers").glob("*.py")):
        for body in re.findall(pattern, path.read_text() + "\nend\n", re.MULTILINE | re.DOTALL):
            name = re.search(r'^    name = "(\w+)"$', body, re.MULTILINE)
            if name and not re.search(r"^    published_by = ", body, re.MULTILINE):
                found.append(name[1])
    return found


UPSAMPLERS = tuple(sorted(_registered(), key=lambda name: (name != DEFAULT_UPSAMPLER, name)))

BASELINES = ("nearest", "bilinear", "bicubic", "joint_bilateral", "jbu_stack", "neighbourhood")
"""What every evaluation holds."""

UPSAMPLER_HELP = (
    f"{', '.join(UPSAMPLERS)}; weights by their full name (upfeat info lists them), a folder that "
    "save_pretrained wrote, or a published checkpoint (AnyUp, JAFAR, NAF, FeatUp) (default: "
    f"{DEFAULT_UPSAMPLER})"
)
