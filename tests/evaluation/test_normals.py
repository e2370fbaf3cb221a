"""Normals of depth maps, their probes and scores."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import upfeat
from upfeat.evaluation import EvalConfig, evaluate
from upfeat.evaluation.data.folders import read_camera
from upfeat.evaluation.normals import angle_errors, normals_of
from upfeat.probes import Pixels, fit_normals

FAST = EvalConfig(size=48, seeds=2, pixels=60, pictures=1)


def plane(normal, size=(40, 56), field_of_view=70.0, distance=3.0):
    """Depth of a plane, as a pinhole camera with square pixels sees it."""
    height, width = size
    focal = width / (2 * math.tan(math.radians(field_of_view) / 2))
    x = (torch.arange(width, dtype=torch.float64) + 0.5 - width / 2) / focal
    y = (torch.arange(height, dtype=torch.float64)[:, None] + 0.5 - height / 2) / focal
    return distance / -(normal[0] * x + normal[1] * y + normal[2])


@pytest.mark.parametrize("normal", [(0.0, 0.0, -1.0), (0.3, 0.2, -1.0), (-0.5, 0.4, -0.9)])
def test_planes_have_their_normals_everywhere(normal):
    normal = F.normalize(torch.tensor(normal, dtype=torch.float64), dim=0)
    found = normals_of(plane(normal), 70.0)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(
        found.double(), normal[:, None, None].expand_as(found), atol=1e-5, rtol=0
    )


def test_a_sphere_has_normals_from_its_centre():
    size, focal = 160, 160 / (2 * math.tan(math.radians(60) / 2))
    x = (torch.arange(size, dtype=torch.float64) + 0.5 - size / 2) / focal
    ray = torch.stack([x.expand(size, size), x[:, None].expand(size, size), torch.ones(size, size)])
    centre, radius = torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64)[:, None, None], 1.5
    along, length = (ray * centre).sum(0), ray.square().sum(0)
    root = along.square() - length * (16 - radius**2)
    depth = torch.where(root > 0, (along - root.clamp(min=0).sqrt()) / length, torch.nan)
    found = normals_of(depth, 60.0).double()
    true = F.normalize(ray * depth - centre, dim=0)
    inner = (root > 0) & (true[2] < -0.5) & torch.isfinite(found[0])
    assert int(inner.sum()) > 2000
    assert angle_errors(found[None], torch.where(inner, true, torch.nan))[0, 0] / inner.sum() < 1


def test_unknown_depth_and_steps():
    depth = torch.full((30, 30), 2.0)
    depth[:, 15:] = 4.0
    depth[:12, :12] = torch.nan
    found = normals_of(depth, 60.0)
    known = torch.isfinite(found[0])
    assert not known[:, 14:16].any()  # the step
    assert not known[:8, :8].any()
    assert known[20:, :12].all()
    assert known[:, 18:].all()
    torch.testing.assert_close(found[:, 25, 5], torch.tensor([0.0, 0, -1]))
    assert not torch.isfinite(normals_of(torch.full((9, 9), torch.nan), 60.0)).any()
    assert torch.isfinite(normals_of(torch.full((1, 9), 2.0), 60.0)).all()


def test_errors_are_angles():
    normals = F.normalize(torch.randn(3, 4, 5), dim=0)
    normals[:, 0] = torch.nan
    turned = torch.stack([3 * normals, -normals])
    same, opposite = angle_errors(turned, normals)
    torch.testing.assert_close(
        same, torch.tensor([0.0, 0, 15, 15, 15, 15]).double(), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        opposite[[0, 2, 5]], torch.tensor([180.0 * 15, 0, 15]).double(), rtol=1e-6, atol=1e-3
    )


def test_probe_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 80, 5, generator=generator)
    true = torch.randn(3, 5, generator=generator)
    targets = F.normalize(features @ true.T + torch.tensor([0.1, -0.2, 0.4]), dim=2)
    head = fit_normals(Pixels(features, targets), generator)
    found = F.normalize(head(features.flatten(0, 1)), dim=1)
    assert float((found * targets.flatten(0, 1)).sum(1).mean()) > 0.999
    with pytest.raises(ValueError, match=r"\(N, P, 3\)"):
        fit_normals(Pixels(features, targets[..., 0]), generator)


@pytest.fixture
def rooms(tmp_path):
    """Planes whose colour is their normal; a part of each is another plane."""
    root, random = tmp_path / "rooms", np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 2)):
        for part in ("images", "depth"):
            (root / split / part).mkdir(parents=True)
        for index in range(count):
            colours, depths = [], []
            for _ in range(2):
                normal = np.array([*random.uniform(-0.4, 0.4, 2), -1])
                normal /= np.linalg.norm(normal)
                depths.append(plane(normal, (48, 64)).numpy())
                colours.append(np.broadcast_to(128 + 127 * normal, (48, 64, 3)))
            halves = np.arange(64)[None] < 32
            image = np.where(halves[..., None], *colours).round().astype(np.uint8)
            Image.fromarray(image).save(root / split / "images" / f"{index}.png")
            np.save(root / split / "depth" / f"{index}.npy", np.where(halves, *depths))
    (root / "depth.json").write_text(json.dumps({"scale": 1, "field_of_view": 70}))
    return root


def test_normals_of_full_resolution_features(rooms, tmp_path):
    colours = upfeat.load_backbone(lambda x: x)
    results = evaluate(
        "normals", rooms, tmp_path / "out", upsamplers=["nearest"], backbone=colours, config=FAST
    )
    assert [row.protocol for row in results.rows] == ["own", "transfer"]
    for row in results.rows:
        assert max(row.scores["mean_angle"]) < 3
        assert min(row.scores["within_11.25"]) > 0.97
        assert list(row.scores) == [
            "mean_angle", "rmse_angle", "within_11.25", "within_22.5", "within_30", "drift",
        ]  # fmt: skip
    assert "<figure>" in (tmp_path / "out" / "report.html").read_text()
    assert results.problems == []


def test_upsamplers_are_compared(rooms, colour_backbone, tmp_path):
    results = evaluate(
        "normals", rooms, tmp_path / "out", upsamplers=["nearest", "bilinear"],
        backbone=colour_backbone, config=FAST,
    )  # fmt: skip
    assert {one["score"] for one in results.differences} == {"mean_angle", "within_11.25"}


def test_images_without_normals_are_left_out(rooms, colour_backbone, tmp_path):
    path = rooms / "train" / "depth" / "0.npy"
    depth = np.load(path)
    depth[::2] *= 3
    np.save(path, depth)
    run = {"upsamplers": ["nearest"], "backbone": colour_backbone, "config": FAST}
    results = evaluate("normals", rooms, tmp_path / "out", **run)
    assert [problem.name for problem in results.problems] == ["train/0"]
    for path in (rooms / "train" / "depth").iterdir():
        np.save(path, depth)
    with pytest.raises(ValueError, match="no depth map of train shows"):
        evaluate("normals", rooms, tmp_path / "out2", **run)


def test_rows_of_another_field_of_view_are_not_reused(rooms, colour_backbone, tmp_path):
    def run():
        return evaluate(
            "normals", rooms, tmp_path / "out", upsamplers=["nearest"], backbone=colour_backbone,
            config=FAST,
        ).rows[0].scores["mean_angle"]  # fmt: skip

    first = run()
    assert run() == first
    (rooms / "depth.json").write_text(json.dumps({"scale": 1, "field_of_view": 120}))
    assert run() != first


@pytest.mark.parametrize("angle", [0, 180, "wide", None, True])
def test_bad_field_of_view(rooms, angle):
    (rooms / "depth.json").write_text(json.dumps({"scale": 1, "field_of_view": angle}))
    with pytest.raises(ValueError, match="field_of_view"):
        read_camera(rooms)
