"""Names that --help lists.

They stand here once more, because help is there before PyTorch could be imported; a test holds them
against the registries.
"""

DEFAULT_BACKBONE = "efficientnet_lite0"

DEFAULT_UPSAMPLER = "detail"

UPSAMPLERS = (
    "detail",
    "neighbourhood",
    "jbu_stack",
    "joint_bilateral",
    "bicubic",
    "bilinear",
    "nearest",
)

BASELINES = ("nearest", "bilinear", "bicubic", "joint_bilateral", "jbu_stack", "neighbourhood")
"""What every evaluation holds."""

UPSAMPLER_HELP = (
    f"{', '.join(UPSAMPLERS)}; weights by their full name (upfeat info lists them), a folder that "
    "save_pretrained wrote, or a published checkpoint (AnyUp, JAFAR, NAF, FeatUp) (default: "
    f"{DEFAULT_UPSAMPLER})"
)
