"""A small upsampler of every class, for tests that run all of them."""

import torch

import upfeat


def stack_of(*given, **options):
    """Make a JBU stack with a constant, which is 0 initially."""
    stack = upfeat.JBUStack(*given, **options)
    torch.nn.init.normal_(stack.channel_mix.bias)
    return stack


SMALL = {
    "anyup": lambda: upfeat.AnyUp(width=16, heads=2),
    "bicubic": upfeat.Bicubic,
    "bilinear": upfeat.Bilinear,
    "detail": lambda: upfeat.DetailUpsampler(4, query_dim=8, levels=3, width=8, depth=1),
    "early_detail": lambda: upfeat.EarlyDetailUpsampler(
        4, hidden_dim=3, query_dim=8, levels=3, width=8, depth=1, smoothing=2, least_contrast=0.5
    ),
    "jafar": lambda: upfeat.JAFAR(4, width=16, heads=2),
    "jbu_stack": lambda: stack_of(4, n_stages=2),
    "joint_bilateral": upfeat.JointBilateral,
    "naf": lambda: upfeat.NAF(width=32, heads=2, window_side=3),
    "nearest": upfeat.Nearest,
    "uplift": lambda: upfeat.UPLiFT(4, encoder_widths=(4, 6, 8), width=18),
    "neighbourhood": lambda: upfeat.NeighbourhoodUpsampler(
        query_dim=8, levels=3, back_projections=1, least_contrast=0.5
    ),
}
"""By name of the class in the registry; of four channels where they are made for some."""
