"""A user's typed program, which ``make lint`` checks in pyright's strict mode; it is never run.

Results have the types that a reader expects, without a cast: no ``Any``, no needless union.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import assert_type

import upfeat
from upfeat import functional
from upfeat.batch import Engine, Extraction, extract, read_extracted
from upfeat.evaluation import EvalConfig, Results, compare, evaluate
from upfeat.features import PCA
from upfeat.raster import Features, Scene, make_plan, upsample_raster
from upfeat.training import StepReport
from upfeat.video import VideoReport, VideoSettings, render_video

Array = NDArray[np.float16]


class Contrast(upfeat.Backbone):
    """A backbone of a user's own."""

    def __init__(self) -> None:
        super().__init__(name="contrast", embed_dim=6, stride=8)

    def extract(self, x: Tensor) -> Tensor:
        return x[:, :, ::8, ::8].repeat(1, 2, 1, 1)


def features(buffer: Array) -> None:
    model = upfeat.load()
    assert_type(model.backbone, upfeat.Backbone)
    assert_type(model.upsampler, upfeat.Upsampler)
    x = model.preprocess(Path("photo.jpg"), 224, align=True, bands=[0, 1, 2])
    assert_type(model(x), Tensor)
    assert_type(model(x, (100, 200), mask=np.zeros((8, 8), bool)), Tensor)
    assert_type(model(x, out=buffer), Array)
    lazy = model.lazy(x)
    assert_type(lazy.full(torch.float16), Tensor)
    assert_type(lazy.full(out=buffer, max_memory="2GB"), Array)
    assert_type(lazy.project(torch.zeros(2, 112)), Tensor)
    assert_type(lazy.project(torch.zeros(2, 112), out=buffer), Array)
    assert_type(lazy.pca(), PCA)
    assert_type(lazy.shape, torch.Size)


def parts() -> None:
    backbone = upfeat.load_backbone(nn.Conv2d(3, 8, 16, stride=16))
    x = backbone.preprocess("photo.jpg")
    assert_type(backbone(x), Tensor)
    assert_type(Contrast(), Contrast)
    assert_type(Contrast()(x), Tensor)
    assert_type(upfeat.WrappedBackbone(nn.Identity(), name="one"), upfeat.WrappedBackbone)
    upsampler = upfeat.load_upsampler("detail")
    assert_type(upsampler(backbone(x), x, (100, 200)), Tensor)
    assert_type(upfeat.NAF()(backbone(x), x, out=torch.zeros(1)), Tensor)
    assert_type(upfeat.ImageFirst(upsampler)(x, backbone(x)), Tensor)
    assert_type(upfeat.JBUStack.from_pretrained("folder"), upfeat.JBUStack)
    assert_type(upfeat.load(Contrast(), upsampler=upsampler), upfeat.FeatUp)
    assert_type(functional.joint_bilateral_upsample(x, x), Tensor)
    with upfeat.attach(nn.Sequential(), "0", upsampler) as attached:
        assert_type(attached.ratio(), tuple[int, int])


def work(buffer: Array) -> None:
    def tell(report: StepReport) -> None:
        print(report.losses["total"])

    config = upfeat.TrainConfig(upsampler="jbu_stack", steps=2000, out=Path("runs/x"))
    assert_type(
        upfeat.train("efficientnet_lite0", "photos", config, on_step=tell), upfeat.Upsampler
    )
    implicit = upfeat.fit_implicit("photo.jpg", "efficientnet_lite0", upfeat.FitConfig(size=64))
    assert_type(implicit.render((100, 200)), Tensor)
    assert_type(implicit.render(out=buffer), Array)
    model = upfeat.load()
    extract(model, "photos/", "features/", Extraction("lazy", size=64), engine=Engine(workers=2))
    assert_type(read_extracted("a.safetensors", model.upsampler), upfeat.UpsampledFeatures)
    assert_type(render_video(model, "a.mp4", "b.mp4", VideoSettings(size=64)), VideoReport)
    assert_type(evaluate("seg", "data", "out", config=EvalConfig(size=64)), Results)
    compare("out")
    what = Features(model.embed_dim, {})
    with Scene("scene.tif") as scene:
        plan = make_plan(scene.size, model, what, max_memory="4GB")
        assert_type(upsample_raster(scene, "features.zarr", model, what, plan), Path)
