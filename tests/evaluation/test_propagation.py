"""Masks carried through videos: the rule, the scores, the readers, and whole evaluations."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation.scenes import write_video
from PIL import Image

import upfeat
from upfeat.cli.main import main
from upfeat.evaluation import EvalConfig, evaluate
from upfeat.evaluation.data.folders import subset
from upfeat.evaluation.data.layouts import read_dataset
from upfeat.evaluation.data.videos import read_videos
from upfeat.evaluation.label_propagation import CONTEXT, Tracker, propagate, to_cells, to_soft
from upfeat.evaluation.masks import contours, dilate, mask_scores

FAST = EvalConfig(size=48, pictures=3)


@pytest.fixture
def videos(tmp_path):
    root = tmp_path / "videos"
    for seed, name in enumerate(("ball", "pair")):
        write_video(root / "images" / name, root / "labels" / name, objects=seed + 1, seed=seed)
    return root


@pytest.fixture
def run(videos, colour_backbone, tmp_path):
    def call(out="out", upsamplers=("bilinear",), config=FAST, **options):
        options.setdefault("backbone", colour_backbone)
        return evaluate(
            "propagation", videos, tmp_path / out, upsamplers=upsamplers, config=config, **options
        )

    return call


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def dense(query, keys, labels, radius, top_k, temperature):
    """All pairs of cells at once, in the words of the published code."""
    h, w = query.shape[:2]
    place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), 2)
    place = place.view(-1, 2)
    near = ((place[:, None] - place).abs() <= radius).all(2)  # (h·w, h·w)
    affinity = torch.einsum("qc,nkc->nqk", query.flatten(0, 1), keys.flatten(1, 2))
    affinity = (affinity / temperature).exp() * near
    affinity = affinity.permute(1, 0, 2).flatten(1)  # (h·w, N·h·w)
    kth = affinity.topk(min(top_k, affinity.shape[1]), dim=1).values[:, -1:]
    affinity = torch.where(affinity < kth, 0, affinity)
    affinity = affinity / affinity.sum(1, keepdim=True)
    return (affinity @ labels.flatten(0, 2)).view(h, w, -1)


@pytest.mark.parametrize(
    ("size", "frames", "radius", "top_k"),
    [
        ((13, 17), 3, 2, 5),
        ((9, 7), 2, 30, 4),
        ((1, 1), 1, 1, 5),
        ((5, 23), 1, 1, 9),
        ((6, 6), 2, 0, 1),
    ],
)  # fmt: skip
def test_propagation_equals_that_of_all_pairs(size, frames, radius, top_k):
    query, keys = unit(*size, 6), unit(frames, *size, 6, seed=1)
    labels = torch.rand(frames, *size, 3, dtype=torch.float64)
    found = propagate(query, keys, labels, radius, top_k=top_k)
    torch.testing.assert_close(found, dense(query, keys, labels, radius, top_k, 0.1))


def test_cells_of_equal_features_count_alike():
    """Rounding does not choose among them: the mean is over the whole neighbourhood."""
    size, radius = (9, 12), 2
    one = unit(1, 1, 8).float().expand(*size, 8)
    labels = torch.rand(1, *size, 2)
    found = propagate(one, one[None], labels, radius)
    side = 2 * radius + 1
    means = F.avg_pool2d(labels.permute(0, 3, 1, 2), side, 1, radius, count_include_pad=False)
    torch.testing.assert_close(found, means[0].permute(1, 2, 0))


def test_labels_come_from_the_first_frame_and_the_last_ones():
    size, count = (10, 12), CONTEXT + 5
    features = unit(count, *size, 4)
    labels = [torch.rand(*size, 2, dtype=torch.float64)]
    tracker = Tracker(features[0], labels[0])
    for index in range(1, count):
        context = [0, *range(max(1, index - CONTEXT), index)]
        known = torch.stack([labels[one] for one in context])
        labels.append(dense(features[index], features[context], known, 2, 5, 0.1))
        torch.testing.assert_close(tracker.step(features[index]), labels[-1])


def test_cells_are_means():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 8, 12, generator=generator)
    cells = to_cells(features, (2, 3))
    torch.testing.assert_close(cells.norm(dim=2), torch.ones(2, 3))
    expected = F.normalize(features[:, 4:8, 8:12].mean((1, 2)), dim=0)
    torch.testing.assert_close(cells[1, 2], expected)
    label = torch.tensor([[0, 0, 7, 255], [0, 7, 7, 7]], dtype=torch.uint8)
    soft = to_soft(label, torch.tensor([0, 7], dtype=torch.uint8), (1, 2))
    assert soft.tolist() == [[[0.75, 0.25], [0, 0.75]]]


def official_contour(mask):
    """As in the code of the DAVIS benchmark, of which this is a transcription."""
    east, south, corner = (np.zeros_like(mask) for _ in range(3))
    east[:, :-1], south[:-1], corner[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    found = (mask ^ east) | (mask ^ south) | (mask ^ corner)
    found[-1], found[:, -1] = mask[-1] ^ east[-1], mask[:, -1] ^ south[:, -1]
    found[-1, -1] = False
    return found


def official_scores(predicted, label, number):
    valid = label != 255
    guess, true = (predicted == number) & valid, (label == number) & valid
    union = (guess | true).sum()
    region = (guess & true).sum() / union if union else 1
    radius = math.ceil(0.008 * math.hypot(*label.shape))
    ours, theirs = official_contour(guess), official_contour(true)
    if not ours.any() or not theirs.any():
        return region, float(not ours.any() and not theirs.any())

    def matched(lines, others):
        places, near = np.argwhere(lines), np.argwhere(others)
        distances = ((places[:, None] - near) ** 2).sum(2).min(1)
        return (distances <= radius**2).mean()

    precision, recall = matched(ours, theirs), matched(theirs, ours)
    return region, 2 * precision * recall / (precision + recall) if precision + recall else 0


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_the_benchmark(seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 3, (2, 6, 8), generator=generator).float()
    label, predicted = F.interpolate(coarse[None], size=(150, 210))[0].byte()
    predicted = predicted.roll(seed, 1)
    label[40:60, 50:90] = 255
    objects = torch.tensor([1, 2, 9], dtype=torch.uint8)
    expected = [official_scores(predicted.numpy(), label.numpy(), one) for one in (1, 2, 9)]
    found = mask_scores(predicted, label, objects)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found[2].tolist() == [1, 1]


def test_scores_of_masks_with_known_answers():
    label = torch.zeros(40, 40, dtype=torch.uint8)
    label[10:20, 10:20] = 4
    objects = torch.tensor([4], dtype=torch.uint8)
    assert mask_scores(label, label, objects).tolist() == [[1, 1]]
    assert mask_scores(torch.zeros_like(label), label, objects).tolist() == [[0, 0]]
    assert mask_scores(label.roll(20, 0), label, objects).tolist() == [[0, 0]]
    shifted = mask_scores(label.roll(1, 0), label, objects)[0]
    assert shifted.tolist() == pytest.approx([9 / 11, 1])
    assert not contours(torch.ones(1, 5, 5, dtype=torch.bool)).any()
    dot = torch.zeros(1, 9, 9, dtype=torch.bool)
    dot[0, 4, 4] = True
    assert dilate(dot, 2).sum() == 13


def write_davis(root, size="480p"):
    for name in ("bear", "cows"):
        write_video(
            root / "JPEGImages" / size / name, root / "Annotations" / size / name, objects=2
        )
        for path in (root / "JPEGImages" / size / name).iterdir():
            Image.open(path).save(path.with_suffix(".jpg"))
            path.unlink()
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("cows\nbear\n")
    return root


@pytest.mark.parametrize("size", ["480p", "Full-Resolution"])
def test_davis(tmp_path, size):
    dataset = read_videos(write_davis(tmp_path / "DAVIS", size), layout="davis")
    names = [sample.name for sample in dataset.test]
    expected = [f"{name}/{frame:05}" for name in ("cows", "bear") for frame in range(5)]
    assert names == expected  # in the list's order, without the last frame
    assert (dataset.name, dataset.splits, dataset.problems) == ("davis", ("test",), [])
    label = dataset.read_target(dataset.test[0])
    assert sorted(np.unique(label)) == [0, 1, 2]
    assert {sample.group for sample in dataset.test} == {"bear", "cows"}


def test_davis_of_which_files_are_missing(tmp_path):
    root = write_davis(tmp_path / "DAVIS")
    listed = root / "ImageSets" / "2017" / "val.txt"
    listed.write_text("cows\nbear\nlost\n")
    for path in sorted((root / "Annotations" / "480p" / "bear").iterdir())[1:-1]:
        path.unlink()
    (dataset_bear, lost) = read_videos(root, layout="davis").problems
    assert str(dataset_bear).startswith("bear: has no label to score")
    assert "lost: " in str(lost)
    assert str(lost).endswith("is missing")
    listed.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"val\.txt: not a list in UTF-8"):
        read_videos(root, layout="davis")
    listed.write_text("lost\n")
    with pytest.raises(ValueError, match=r"no usable sample to test on \(lost: .* is missing"):
        read_videos(root, layout="davis")
    listed.unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.txt: no such file.*is the layout right"):
        read_videos(root, layout="davis")


def test_folders_of_frames(videos):
    labels = videos / "labels"
    (labels / "ball" / "00003.png").unlink()
    (labels / "pair" / "00000.png").rename(labels / "pair" / "00009.png")
    (videos / "images" / "empty").mkdir()
    (labels / "empty").mkdir()
    (videos / "images" / "bare").mkdir()
    dataset = read_videos(videos)
    assert [sample.name for sample in dataset.test] == [f"ball/{frame:05}" for frame in range(6)]
    reads = [dataset.read_target(sample) is None for sample in dataset.test]
    assert reads == [False, False, False, True, False, False]
    reasons = {problem.name: problem.reason for problem in dataset.problems}
    assert set(reasons) == {"labels/pair/00009.png", "pair", "empty", "bare"}
    assert reasons["pair"] == "the first frame, 00000.png, has no label"
    assert reasons["empty"] == "has no frames"
    assert reasons["labels/pair/00009.png"] == "has no image"


def test_frames_are_in_the_order_of_their_numbers(videos):
    """Frame 2 stands before frame 10, not after it as in the order of letters."""
    names = ["f2", "f02b", "f9", "f10", "f10a", "g1"]
    for kind in ("images", "labels"):
        for path, name in zip(sorted((videos / kind / "ball").iterdir()), names, strict=True):
            path.rename(path.with_stem(name))
    (videos / "labels" / "ball" / "f10.png").unlink()
    found = [sample.name for sample in read_videos(videos).test]
    assert found[: len(names)] == [f"ball/{name}" for name in names]


@pytest.mark.parametrize(
    ("layout", "error", "words"),
    [
        ("voc", ValueError, "layout=voc is not for videos; propagation takes"),
        ("davis", FileNotFoundError, "is the layout right"),
        ("folder", FileNotFoundError, "images: no such file"),
    ],
)
def test_folders_that_are_no_videos(tmp_path, layout, error, words):
    with pytest.raises(error, match=words):
        read_videos(tmp_path, layout=layout)
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        read_videos(tmp_path / "none")
    with pytest.raises(ValueError, match="layout=davis is for the task propagation, not seg"):
        read_dataset(tmp_path, "seg", layout="davis")


def test_masks_follow_objects_whose_features_tell_them(run):
    exact = upfeat.load_backbone(lambda x: torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
    (row, again) = run(backbone=exact, upsamplers=("nearest",)).rows
    assert (row.protocol, again.protocol) == ("features", "labels")
    assert row.scores["j"][0] > 0.8
    assert again.scores["j"][0] > 0.99  # cells of one pixel
    assert set(row.per_class) == {"ball", "pair"}


def test_features_of_objects_are_better_than_none(run, colour_backbone):
    blind = upfeat.load_backbone(lambda x: torch.ones(len(x), 2, *(s // 8 for s in x.shape[2:])))
    seeing, unseeing = (
        run(out, backbone=one).rows for out, one in (("a", colour_backbone), ("b", blind))
    )
    for row, other in zip(seeing, unseeing, strict=True):
        assert row.scores["jf"][0] > other.scores["jf"][0] + 0.2


def test_files_of_an_evaluation(run, tmp_path):
    steps = []
    results = run(
        upsamplers=("nearest", "bilinear"), on_step=lambda label, *counts: steps.append(counts)
    )
    assert [(row.upsampler, row.protocol) for row in results.rows] == [
        (name, protocol) for name in ("nearest", "bilinear") for protocol in ("features", "labels")
    ]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["data"]["test"]["images"] == 12
    for row in results.rows:
        j, f, both = (row.scores[name][0] for name in ("j", "f", "jf"))
        assert both == pytest.approx((j + f) / 2)
        # A mean over objects, of which the second sequence has two.
        one, two = (row.per_class[name][0] for name in ("ball", "pair"))
        assert both == pytest.approx((one + 2 * two) / 3)
    assert {one["score"] for one in content["differences"]} == {"jf", "f"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "J&amp;F of each sequence" in page
    assert page.count("<figure>") == 3
    assert all("target" in example for example in results.examples.values())
    assert not [name for name in results.examples if name.endswith("/00000")]
    assert all(0 <= done <= total for done, total in steps)


def test_max_test_counts_sequences(run, videos):
    results = run(config=replace(FAST, max_test=1))
    assert results.data["test"]["images"] == 6
    assert len(results.rows[0].per_class) == 1
    samples = read_videos(videos).test
    drawn = [subset(samples, 1, seed=seed) for seed in range(8)]
    assert all(one in (samples[:6], samples[6:]) for one in drawn)
    assert drawn[0] == subset(samples, 1)
    assert subset(samples, 2) == samples


def test_frames_without_labels_are_passed_through(run, videos):
    whole = run("whole")
    for frame in (1, 2, 3, 4):
        (videos / "labels" / "ball" / f"{frame:05}.png").unlink()
    some = run("some")
    for before, after in zip(whole.rows, some.rows, strict=True):
        assert after.per_class["pair"] == before.per_class["pair"]
        # Objects are followed worse from frame to frame.
        assert 0 < after.per_class["ball"][0] < before.per_class["ball"][0]


def damage_frame(videos):
    (videos / "images" / "ball" / "00002.png").write_bytes(b"text")


def shrink_label(videos):
    Image.new("L", (6, 4)).save(videos / "labels" / "ball" / "00004.png")


def shrink_frame(videos):
    for part in ("images", "labels"):
        path = videos / part / "ball" / "00003.png"
        Image.open(path).resize((80, 48)).save(path)


def empty_first(videos):
    Image.new("L", (64, 48)).save(videos / "labels" / "ball" / "00000.png")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_frame, "ball: is left out, because one of its frames cannot be used"),
        (shrink_label, "4×6 pixels but the image 48×64"),
        (shrink_frame, "ball: is left out, because its frames differ in size: 48×64 and 48×80"),
        (empty_first, "ball: is left out, because its first label has no object"),
    ],
)
def test_sequences_that_cannot_be_used_are_left_out_whole(run, videos, damage, words):
    damage(videos)
    results = run(config=replace(FAST, pictures=1))
    assert any(words in str(problem) for problem in results.problems)
    assert all(set(row.per_class) == {"pair"} for row in results.rows)
    (videos / "images" / "pair").rename(videos / "images" / "gone")
    with pytest.raises(ValueError, match=r"no (usable sample|sequence)"):
        run("none")


def test_objects_that_appear_later_are_named(run, videos):
    path = videos / "labels" / "ball" / "00004.png"
    label = np.array(Image.open(path))
    label[:20, 40:] = 9
    Image.fromarray(label).save(path)
    (problem,) = run().problems
    assert str(problem).endswith("are scored as background: 9")
    assert problem.name == "ball"


def test_command(videos, tmp_path, capsys):
    davis = write_davis(tmp_path / "DAVIS")
    arguments = ["eval", "propagation", str(davis), "--layout", "davis", "--size", "48"]
    arguments += ["--upsamplers", "bilinear", "-o", str(tmp_path / "out"), "--max-test", "1"]
    assert main(arguments) == 0
    assert "J&F" in capsys.readouterr().out
