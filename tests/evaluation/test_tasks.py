"""Depth and class activation: known answers on generated pictures."""

import json

import numpy as np
import pytest
import torch
from evaluation.scenes import scene
from PIL import Image

import upfeat
from upfeat.evaluation import EvalConfig, evaluate
from upfeat.evaluation.data.folders import read_photographs
from upfeat.evaluation.data.targets import read_depth
from upfeat.evaluation.tasks.cam import CAM_BACKBONE, Penultimate, activation
from upfeat.upsamplers import create_upsampler

FAST = EvalConfig(size=48, seeds=2, pixels=60, pictures=1, views=2)


@pytest.fixture
def depth_folder(tmp_path):
    """Depth falls with brightness; its unit differs from image to image."""
    root = tmp_path / "rooms"
    for split, seeds in (("train", range(5)), ("test", range(20, 22))):
        for part in ("images", "depth"):
            (root / split / part).mkdir(parents=True)
        for seed in seeds:
            grey = 60 + 60 * scene(seed).astype(np.uint8)
            Image.fromarray(grey).convert("RGB").save(root / split / "images" / f"{seed}.png")
            millimetres = ((4000 - 10 * grey.astype(np.float32)) * (1 + seed % 3)).astype(np.uint16)
            millimetres[0, :5] = 0
            Image.fromarray(millimetres).save(root / split / "depth" / f"{seed}.png")
    (root / "depth.json").write_text('{"scale": 0.001}')
    return root


def test_depth_of_full_resolution_features_is_exact(depth_folder, tmp_path):
    perfect = upfeat.load_backbone(lambda x: torch.cat([x, x.square()], dim=1))
    results = evaluate(
        "depth", depth_folder, tmp_path / "out", upsamplers=["nearest"], backbone=perfect,
        config=FAST,
    )  # fmt: skip
    assert [row.protocol for row in results.rows] == ["own", "transfer"]
    for row in results.rows:
        assert max(row.scores["rmse"]) < 1e-2
        assert row.scores["delta_1.25"] == [1, 1]
    assert "<figure>" in (tmp_path / "out" / "report.html").read_text()


def test_depth_of_coarse_features_is_worse(depth_folder, colour_backbone, tmp_path):
    def run(out):
        return evaluate(
            "depth", depth_folder, tmp_path / out, upsamplers=["nearest", "bilinear"],
            backbone=colour_backbone, config=FAST,
        )  # fmt: skip

    first, again = run("a"), run("b")
    assert [row.scores for row in first.rows] == [row.scores for row in again.rows]
    assert min(first.rows[0].scores["rmse"]) > 0.05


def test_depth_files(tmp_path):
    values = np.array([[0, 1000], [2000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.array([[np.nan, 1], [2, 65.535]], np.float32)
    np.testing.assert_array_equal(read_depth(tmp_path / "a.png", 0.001), expected)
    np.save(tmp_path / "b.npy", expected)
    np.testing.assert_array_equal(read_depth(tmp_path / "b.npy"), expected)
    np.save(tmp_path / "flat.npy", np.ones(4))
    np.save(tmp_path / "unknown.npy", np.zeros((2, 2)))
    np.save(tmp_path / "objects.npy", np.array([[None]]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("text")
    for name, words in (
        ("flat", "must be"),
        ("unknown", "no depth is known"),
        ("objects", "not a readable"),
        ("text", "not a readable"),
    ):
        with pytest.raises(ValueError, match=words):
            read_depth(tmp_path / f"{name}.npy")


@pytest.mark.parametrize("content", ["{", "[]", '{"scale": 0}', '{"scale": true}'])
def test_bad_depth_scale(depth_folder, tmp_path, content):
    (depth_folder / "depth.json").write_text(content)
    with pytest.raises(ValueError, match=r"depth\.json"):
        evaluate("depth", depth_folder, tmp_path / "out", upsamplers=["nearest"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["nearest", "joint_bilateral", "jbu_stack"])
def test_activation_is_the_classifier_on_every_pixel(name):
    backbone = Penultimate(upfeat.load_backbone(CAM_BACKBONE))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 64, 96, generator=generator)
    features = backbone(x)
    upsampler = create_upsampler(name, backbone.embed_dim)
    heat = activation(upfeat.UpsampledFeatures(features, x, upsampler), backbone.head_of(7))
    weight = backbone.network.classifier.weight[7]
    logits = torch.einsum("c,chw->hw", weight, upsampler(features, x)[0]).clamp(min=0)
    torch.testing.assert_close(heat, logits / logits.max(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_penultimate_features_are_what_the_classifier_averages():
    network = upfeat.load_backbone(CAM_BACKBONE)
    backbone = Penultimate(network)
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    logits = network.classifier(backbone(x).mean((2, 3)))
    torch.testing.assert_close(logits, network.classify(x))
    assert (backbone.embed_dim, backbone.stride) == (1280, 32)


def test_class_activation(folder, tmp_path):
    config = EvalConfig(size=48, seeds=1, max_test=2, pictures=1)
    results = evaluate("cam", folder, tmp_path / "out", upsamplers=["bilinear"], config=config)
    (row,) = results.rows
    assert results.backbone["name"] == f"{CAM_BACKBONE}.head"
    assert 0 <= row.scores["average_drop"][0] <= 1
    assert 0 <= row.scores["average_increase"][0] <= 1
    assert len(row.pictures) == 1
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["data"]["test"]["images"] == 2
    with pytest.raises(ValueError, match="has no classifier"):
        evaluate(
            "cam", folder, tmp_path / "out", upsamplers=["bilinear"],
            backbone="efficientnet_lite0", config=config,
        )  # fmt: skip


def test_photographs_alone(folder, tmp_path):
    assert len(read_photographs(folder).test) == 3
    assert len(read_photographs(folder / "train" / "images").test) == 6
    both = read_photographs(folder, split_seed=0)
    assert (len(both.train), len(both.test)) == (6, 3)
    alone = [read_photographs(folder / "train" / "images", split_seed=seed) for seed in (0, 0, 1)]
    assert [(len(part.train), len(part.test)) for part in alone] == [(4, 2)] * 3
    assert alone[0].test == alone[1].test != alone[2].test
    assert not {s.name for s in alone[0].train} & {s.name for s in alone[0].test}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no photographs were found"):
        read_photographs(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_photographs(tmp_path / "none")
    with pytest.raises(ValueError, match='task="segm" is unknown'):
        evaluate("segm", folder, tmp_path / "out")
