"""Unseen views: known answers, fitted downsamplers, and what is kept on disk."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import upfeat
from upfeat.downsamplers import AttentionDownsampler, SimpleDownsampler
from upfeat.evaluation import EvalConfig, evaluate
from upfeat.evaluation import downsampler_fit as fitting
from upfeat.evaluation.data.view_features import view_features
from upfeat.evaluation.downsampler_fit import Cells, fit, leading_components, to_cells
from upfeat.evaluation.tasks import consistency

FAST = EvalConfig(size=48, seeds=2, views=2, downsamplers=("box", "simple", "attention"))


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    monkeypatch.setattr(fitting, "_STEPS", 40)
    monkeypatch.setattr(fitting, "MAX_CELLS", 512)
    monkeypatch.setattr(consistency, "N_FIT_IMAGES", 6)


@pytest.fixture
def run(folder, tmp_path):
    def call(backbone, upsamplers, out="out", config=FAST):
        return evaluate(
            "consistency", folder, tmp_path / out, upsamplers=upsamplers, backbone=backbone,
            config=config,
        )  # fmt: skip

    return call


def cells_of(target, values, leading=None):
    """Cells of features with one channel for values and one for saliency."""
    leading = values if leading is None else leading
    spread = values[:, None].expand(-1, 30, *values.shape[1:])
    target = target[:, None].expand(-1, 30)
    return Cells(spread, leading[:, None], target, torch.zeros(len(target), 1))


LEADING = torch.tensor([[0.0, 1.0]])  # the one leading component is the second channel


def error_of(downsampler, cells):
    """Mean squared error on whole features (N, 2, k, k), of the first channel."""
    maps = torch.stack([cells.values[:, 0], cells.leading[:, 0]], dim=1)
    guess = downsampler(maps, (1, 1))[:, 0, 0, 0]
    return float((guess - cells.target[:, 0]).square().mean().detach())


def test_features_of_full_resolution_explain_every_view(run):
    exact = upfeat.load_backbone(lambda x: x * 1.0)
    for row in run(exact, ["nearest"]).rows:
        assert max(row.scores["error"]) < 1e-6
        assert min(row.scores["cosine"]) > 0.999


def test_edges_from_the_image_explain_views_better(run):
    coarse = upfeat.load_backbone(lambda x: F.avg_pool2d(x, 8))
    found = run(coarse, ["nearest", "joint_bilateral"]).rows
    rows = {(row.upsampler, row.protocol): row.scores for row in found}
    assert list(rows) == [
        (name, kind) for name in ("nearest", "joint_bilateral") for kind in FAST.downsamplers
    ]
    for kind in FAST.downsamplers:
        nearest, guided = rows["nearest", kind], rows["joint_bilateral", kind]
        for seed in range(2):
            assert 0 < guided["error"][seed] < nearest["error"][seed] < 1
            assert guided["cosine"][seed] > nearest["cosine"][seed]


def test_scores_do_not_depend_on_the_unit_of_the_features(run, colour_backbone):
    small = 2.0**-30
    tiny = upfeat.load_backbone(lambda x: colour_backbone(x) * small)
    ours, theirs = (
        run(one, ["bilinear"], str(index)).rows for index, one in enumerate((colour_backbone, tiny))
    )
    for one, other in zip(ours, theirs, strict=True):
        for name in ("error", "cosine", "drift"):
            assert other.scores[name] == pytest.approx(one.scores[name], rel=0.02)
        moved = [value + math.log(small) for value in one.scores["nll"]]
        assert other.scores["nll"] == pytest.approx(moved, abs=0.05)


def test_one_seed_gives_the_same_digits_whatever_else_runs(run, colour_backbone):
    first = run(colour_backbone, ["bilinear"], "a").rows
    again = run(colour_backbone, ["nearest", "bilinear"], "b").rows[3:]
    alone = EvalConfig(size=48, seeds=1, views=2, downsamplers=("attention",))
    (attention,) = run(colour_backbone, ["bilinear"], "c", alone).rows
    assert [row.scores for row in first] == [row.scores for row in again]
    # How many seeds share one product rounds it differently.
    assert attention.scores["error"] == pytest.approx(first[2].scores["error"][:1], rel=1e-4)


def test_views_of_one_cell_have_no_error(run, colour_backbone, tmp_path):
    """Nor features that never change: there is no variance to compare with."""
    small = EvalConfig(size=8, seeds=2, views=2, downsamplers=("box",), max_test=1)
    rows = run(colour_backbone, ["bilinear"], config=small).rows
    blind = upfeat.load_backbone(lambda x: torch.ones(len(x), 2, *(s // 8 for s in x.shape[2:])))
    for row in (*rows, *run(blind, ["bilinear"], "blind").rows):
        assert row.scores["error"] == pytest.approx([math.nan] * 2, nan_ok=True)
    content = json.loads((tmp_path / "blind" / "results.json").read_bytes())
    assert content["rows"][0]["scores"]["error"]["values"] == [None, None]
    assert ">–<" in (tmp_path / "blind" / "report.html").read_text(encoding="utf-8")


def test_the_report_knows_every_score(run, colour_backbone, tmp_path):
    run(colour_backbone, ["bilinear"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "view error" in page
    assert "view NLL" in page


def test_a_fit_finds_the_blur(monkeypatch):
    monkeypatch.setattr(fitting, "_STEPS", 200)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 4, 4, generator=generator)
    kernel = torch.rand(4, 4, generator=generator)
    kernel /= kernel.sum()
    cells = cells_of((values * kernel).sum((1, 2)), values)
    fitted = fit("simple", cells, LEADING, 0).downsampler
    assert isinstance(fitted, SimpleDownsampler)
    assert error_of(fitted, cells) < 0.1 * error_of(SimpleDownsampler(4), cells)


def test_a_fit_finds_what_saliency_tells(monkeypatch):
    monkeypatch.setattr(fitting, "_STEPS", 200)
    generator = torch.Generator().manual_seed(0)
    values, leading = torch.randn(2, 400, 4, 4, generator=generator)
    weights = (2 * leading).flatten(1).softmax(1).view(-1, 4, 4)
    cells = cells_of((values * weights).sum((1, 2)), values, leading)
    fitted = fit("attention", cells, LEADING, 0).downsampler
    assert isinstance(fitted, AttentionDownsampler)
    assert error_of(fitted, cells) < 0.1 * error_of(SimpleDownsampler(4), cells)


def test_a_box_is_the_mean_and_its_deviation_the_likeliest():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 4, 4, generator=generator)
    cells = cells_of(values.mean((1, 2)) + 0.3 * torch.randn(300, generator=generator), values)
    fitted = fit("box", cells, LEADING, 0)
    maps = torch.randn(1, 2, 8, 12, generator=generator)
    expected = F.avg_pool2d(maps, 4)
    torch.testing.assert_close(fitted.downsampler(maps, (2, 3)), expected)
    scale = fitted.uncertainty(torch.zeros(1, 2, 1, 1)).item()
    assert scale == pytest.approx(error_of(fitted.downsampler, cells) ** 0.5, rel=1e-3)


def test_cells_are_patches_row_by_row():
    maps = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    cells = to_cells(maps, (2, 3))
    assert cells.shape == (12, 3, 2, 2)
    assert torch.equal(cells[7], maps[1, :, 0:2, 2:4])


def test_leading_components_have_variance_one_and_do_not_mix(run, colour_backbone, tmp_path):
    class Images(list):
        device = torch.device("cpu")

    class Sample:
        def __init__(self, generator):
            scale = torch.tensor([5.0, 1, 0.1])[:, None, None]
            self.features = scale * torch.randn(3, 8, 9, generator=generator) + 7

    generator = torch.Generator().manual_seed(0)
    images = Images(Sample(generator) for _ in range(4))
    leading, unit = leading_components(images)
    assert unit == 1
    cells = torch.cat([image.features.flatten(1) for image in images], dim=1)
    torch.testing.assert_close(torch.cov(leading @ cells), torch.eye(3), atol=0.02, rtol=0)
    assert leading[0].abs().argmax() == 0


def test_views_are_kept_on_disk(run, colour_backbone, folder, tmp_path):
    from upfeat.evaluation.data.folders import read_photographs
    from upfeat.evaluation.data.prepared import prepare

    dataset = read_photographs(folder)
    images = prepare(dataset, dataset.test, colour_backbone, 48, tmp_path, label="")
    calls = []

    def counted(x):
        calls.append(len(x))
        return torch.cat([F.avg_pool2d(x, 8), F.avg_pool2d(x, 8).square()], dim=1)

    backbone = upfeat.load_backbone(counted)
    calls.clear()
    views, seen = view_features(images, 0, backbone, 3, 1)
    again, stored = view_features(images, 0, backbone, 3, 1)
    assert calls == [3]
    assert torch.equal(seen, stored)
    assert torch.equal(views.offset, again.offset)
    assert not torch.equal(views.offset, view_features(images, 0, backbone, 3, 2)[0].offset)


def test_one_photograph_is_refused(folder, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / "test" / "images" / "s20.png").rename(alone / "a.png")
    with pytest.raises(ValueError, match="no usable sample to train on"):
        evaluate("consistency", alone, tmp_path / "out", upsamplers=["nearest"], config=FAST)


@pytest.mark.parametrize("kinds", [(), ("blur",), ("box", "box")])
def test_bad_downsamplers(kinds):
    with pytest.raises(ValueError, match="downsamplers="):
        EvalConfig(downsamplers=kinds)
