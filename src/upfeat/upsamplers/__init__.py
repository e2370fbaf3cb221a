"""Upsamplers: coarse features and an image in, features at any size out."""

from upfeat.upsamplers.anyup import AnyUp
from upfeat.upsamplers.base import Kernels, Upsampler, Window
from upfeat.upsamplers.checkpoints import write_checkpoint
from upfeat.upsamplers.detail import DetailUpsampler
from upfeat.upsamplers.early_detail import EarlyDetailUpsampler
from upfeat.upsamplers.image_first import ImageFirst
from upfeat.upsamplers.interpolate import Bicubic, Bilinear, Nearest
from upfeat.upsamplers.jafar import JAFAR
from upfeat.upsamplers.jbu import JBUStack
from upfeat.upsamplers.joint_bilateral import JointBilateral
from upfeat.upsamplers.naf import NAF
from upfeat.upsamplers.neighbourhood import NeighbourhoodUpsampler
from upfeat.upsamplers.pretrained import create_upsampler, list_upsamplers, load_upsampler
from upfeat.upsamplers.uplift import UPLiFT

__all__ = [
    "AnyUp",
    "ImageFirst",
    "JAFAR",
    "NAF",
    "UPLiFT",
    "load_upsampler",
    "write_checkpoint",
    "Bicubic",
    "Bilinear",
    "DetailUpsampler",
    "EarlyDetailUpsampler",
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
