"""Upsamplers: coarse features and an image in, features at any size out."""

from upfeat.upsamplers.base import Kernels, Upsampler, Window
from upfeat.upsamplers.detail import DetailUpsampler
from upfeat.upsamplers.interpolate import Bicubic, Bilinear, Nearest
from upfeat.upsamplers.jbu import JBUStack
from upfeat.upsamplers.joint_bilateral import JointBilateral
from upfeat.upsamplers.neighbourhood import NeighbourhoodUpsampler
from upfeat.upsamplers.pretrained import create_upsampler, list_upsamplers

__all__ = [
    "Bicubic",
    "Bilinear",
    "DetailUpsampler",
    "JBUStack",
    "JointBilateral",
    "Kernels",
    "Nearest",
    "NeighbourhoodUpsampler",
    "Upsampler",
    "Window",
    "create_upsampler",
    "list_upsamplers",
]
