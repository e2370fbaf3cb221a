"""Correspondence on generated pairs: known answers, a dense reference, both layouts, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import upfeat
from upfeat.evaluation import EvalConfig, evaluate
from upfeat.evaluation.data.pairs import read_pairs
from upfeat.evaluation.report.page import render
from upfeat.evaluation.tasks.correspondence import find_pixels, to_file, to_map
from upfeat.upsamplers import create_upsampler

SHIFT = (6, 4)  # (x, y): the second image shows the first one moved by so much
POINTS = [[10, 8], [30, 12], [21, 30], [40, 25]]
FAST = EvalConfig(size=48, seeds=1)


def noise(seed, size=(48, 64)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def moved(points, by=SHIFT):
    return [[x + by[0], y + by[1]] for x, y in points]


def write_pairs(root, scale=1, **changes):
    """Two pairs of a picture and its shifted copy, enlarged so that pixels become blocks."""
    (root / "images").mkdir(parents=True)
    first = noise(0)
    second = np.roll(first, SHIFT[::-1], (0, 1))
    for name, pixels in (("a.png", first), ("b.png", second)):
        Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1)).save(root / "images" / name)

    def enlarged(points):  # centres of blocks
        return [[scale * (value + 0.5) - 0.5 for value in point] for point in points]

    there = {
        "source": "a.png", "target": "b.png", "source_points": enlarged(POINTS),
        "target_points": enlarged(moved(POINTS)), "box": [0, 0, 40 * scale, 30 * scale],
        "category": "noise", **changes,
    }  # fmt: skip
    back = {
        **there, "source": "b.png", "target": "a.png", "category": "back",
        "source_points": there["target_points"], "target_points": there["source_points"],
    }  # fmt: skip
    (root / "pairs.json").write_text(json.dumps([there, back]))
    return root


def run(folder, out, backbone=None, upsamplers=("nearest",), config=FAST, **options):
    backbone = backbone or upfeat.load_backbone(lambda x: torch.cat([x, x.square()], dim=1))
    return evaluate(
        "correspondence", folder, out, upsamplers=list(upsamplers), backbone=backbone,
        config=config, **options,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [1, 3])
def test_exact_features_find_every_point(tmp_path, scale):
    """Half-pixel conventions: α = 0.01 is less than half a block here."""
    results = run(write_pairs(tmp_path / "set", scale), tmp_path / "out")
    assert [row.protocol for row in results.rows] == ["per_image", "per_point"]
    for row in results.rows:
        assert [row.scores[f"pck_{alpha}"] for alpha in (0.1, 0.05, 0.01)] == [[1]] * 3
        assert row.per_class == {"back": [1], "noise": [1]}
    assert results.data["pairs"]["number"] == 2
    assert results.data["test"]["images"] == 2
    assert "PCK@0.10 of each category" in render(results)


def test_points_are_of_upright_images(tmp_path):
    """The second image is stored turned, upright by its EXIF data."""
    root = write_pairs(tmp_path / "set")
    exif = Image.Exif()
    exif[274] = 6
    turned = Image.open(root / "images/b.png").transpose(Image.Transpose.ROTATE_90)
    turned.save(root / "images/b.png", exif=exif)
    for row in run(root, tmp_path / "out").rows:
        assert [row.scores[f"pck_{alpha}"] for alpha in (0.1, 0.05, 0.01)] == [[1]] * 3


def test_errors_count_in_units_of_the_box(tmp_path):
    """Annotations 3 pixels off: right within 0.1 of 40 pixels, wrong within 0.05."""
    root = write_pairs(tmp_path / "set")
    assert run(root, tmp_path / "out").rows[0].scores["pck_0.05"] == [1]
    pairs = json.loads((root / "pairs.json").read_text())
    for pair in pairs:
        pair["target_points"] = moved(pair["target_points"], (0, 3))
    (root / "pairs.json").write_text(json.dumps(pairs))
    scores = run(root, tmp_path / "out").rows[0].scores  # stored rows are of other annotations
    assert (scores["pck_0.1"], scores["pck_0.05"]) == ([1], [0])


def test_averages_over_pairs_and_over_points(tmp_path):
    root = write_pairs(tmp_path / "set")
    there, back = json.loads((root / "pairs.json").read_text())
    for key in ("source_points", "target_points"):
        back[key] = back[key][:1]
    back["target_points"] = [[60, 40]]
    (root / "pairs.json").write_text(json.dumps([there, back]))
    by_image, by_point = run(root, tmp_path / "out", upsamplers=["nearest", "bilinear"]).rows[:2]
    assert by_image.scores["pck_0.1"] == [0.5]
    assert by_point.scores["pck_0.1"] == [0.8]
    for row in (by_image, by_point):
        assert row.per_class == {"back": [0], "noise": [1]}


def test_a_dense_reference(tmp_path, colour_backbone):
    """Every score from plain loops in float64 over the full maps."""
    root = write_pairs(tmp_path / "set", scale=2)
    results = run(root, tmp_path / "out", colour_backbone, ["bilinear"])
    data = read_pairs(root)
    upsampler, maps = create_upsampler("bilinear", 6), {}
    for sample in data.test:
        x = colour_backbone.preprocess(sample.image, 48, align=True)
        x = ((colour_backbone.denormalize(x) * 255).round() / 255 - colour_backbone.mean) / (
            colour_backbone.std
        )
        maps[sample.name] = upsampler(colour_backbone(x), x)[0].double()
    hits = {0.1: [], 0.05: [], 0.01: []}
    for pair in data.pairs:
        source, target = maps[pair.source], maps[pair.target]
        for (x, y), truth in zip(pair.source_points, pair.target_points, strict=True):
            grid = torch.tensor([[[[2 * (x + 0.5) / 128 - 1, 2 * (y + 0.5) / 96 - 1]]]])
            query = torch.nn.functional.grid_sample(
                source[None], grid.double(), padding_mode="border", align_corners=False
            )[0, :, 0, 0]
            cosines = torch.cosine_similarity(target, query[:, None, None], dim=0)
            row, column = divmod(int(cosines.argmax()), cosines.shape[1])
            error = np.hypot(2 * column + 0.5 - truth[0], 2 * row + 0.5 - truth[1])
            for alpha, found in hits.items():
                found.append(error <= alpha * 80)
    scores = results.rows[0].scores
    for alpha, found in hits.items():
        assert scores[f"pck_{alpha}"] == [pytest.approx(np.mean(found))]


def test_equal_pixels_are_no_bias():
    """Of the four by six pixels of a cell, the prediction is at the middle."""
    cells = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = cells.repeat_interleave(4, 1).repeat_interleave(6, 2).float()
    full = torch.nn.functional.normalize(full, dim=0)
    rounding = 1e-7 * torch.rand(full.shape, generator=torch.Generator().manual_seed(1))
    full = full * (1 + rounding)
    found = find_pixels(full, cells.flatten(1).T.float() * 7)
    centres = torch.tensor([[6 * x + 2.5, 4 * y + 1.5] for y in range(3) for x in range(4)])
    assert float((found - centres).abs().max()) == 0.5
    # More points than are compared at once, and features of length 0.
    assert find_pixels(torch.zeros(5, 3, 3), torch.zeros(70, 5)).tolist() == [[1, 1]] * 70


def test_points_scale_as_images_do():
    points = torch.tensor([[0, 0], [63, 47], [64, 48], [31.5, 23.5]], dtype=torch.float64)
    there = to_map(points, (48, 64), (24, 16))
    assert there.tolist() == [[0, 0], [23, 15], [23, 15], [11.5, 7.5]]
    inner = torch.tensor([[10.0, 20], [40, 7]], dtype=torch.float64)
    back = to_file(to_map(inner, (48, 64), (96, 128)).flip(1), (48, 64), (96, 128))
    torch.testing.assert_close(back, inner)


def test_the_limit_is_one_of_pairs(tmp_path, colour_backbone):
    root = write_pairs(tmp_path / "set")
    config = EvalConfig(size=48, seeds=1, max_test=1)
    results = run(root, tmp_path / "out", colour_backbone, config=config)
    assert results.data["pairs"]["number"] == 1
    assert results.data["test"]["images"] == 2
    assert len(results.rows[0].per_class) == 1


def test_differences_are_those_of_the_scores(tmp_path, colour_backbone):
    root = write_pairs(tmp_path / "set")
    listed = json.loads((root / "pairs.json").read_text())
    for index in range(4):
        Image.fromarray(noise(2 + index)).save(root / "images" / f"{index}.png")
        listed.append({**listed[0], "target": f"{index}.png"})
    (root / "pairs.json").write_text(json.dumps(listed))
    results = run(root, tmp_path / "out", colour_backbone, ["nearest", "bilinear"])
    names = sorted(path.name for path in (root / "images").iterdir())
    assert [len(row.sums["images"]) for row in results.rows] == [6] * 4
    assert {image for row in results.rows for pair in row.sums["images"] for image in pair} == set(
        range(len(names))
    )
    rows = {(row.upsampler, row.protocol): row for row in results.rows}
    assert {one["protocol"] for one in results.differences} == {"per_image", "per_point"}
    for one in results.differences:
        own = rows[one["upsampler"], one["protocol"]].scores[one["score"]][0]
        other = rows[one["against"], one["protocol"]].scores[one["score"]][0]
        assert one["mean"] == pytest.approx(own - other)
        assert one["low"] <= one["mean"] <= one["high"]


def test_damaged_images_take_their_pairs_along(tmp_path, colour_backbone):
    root = write_pairs(tmp_path / "set")
    Image.fromarray(noise(5)).save(root / "images" / "c.jpg")
    whole = (root / "images" / "c.jpg").read_bytes()
    (root / "images" / "c.jpg").write_bytes(whole[: len(whole) // 2])
    pairs = json.loads((root / "pairs.json").read_text())
    (root / "pairs.json").write_text(json.dumps([*pairs, {**pairs[0], "target": "c.jpg"}]))
    results = run(root, tmp_path / "out", colour_backbone)
    assert results.data["pairs"]["number"] == 2
    assert [problem.name for problem in results.problems] == ["c.jpg", "pair 3"]
    (root / "pairs.json").write_text(json.dumps([{**pairs[0], "target": "c.jpg"}]))
    with pytest.raises(ValueError, match="no usable pair remains"):
        run(root, tmp_path / "out", colour_backbone)


BAD = {
    "missing image": ({"target": "none.png"}, "none.png is missing"),
    "no name": ({"source": 3}, "source must be the name of an image, not 3"),
    "outside": ({"source_points": [[65, 3]]}, r"\[65, 3\] is outside the image of 64×48"),
    "negative": ({"target_points": [[3, -1]]}, r"target_points: \[3, -1\] is outside"),
    "no points": ({"source_points": []}, "source_points must be a list of points"),
    "text": ({"source_points": [["1", 2]]}, "source_points='1' must be a finite number"),
    "three": ({"source_points": [[1, 2, 3]]}, "source_points must be a list of points"),
    "fewer": ({"source_points": [[1, 2]]}, "1 source_points but 4 target_points"),
    "flat box": ({"box": [5, 5, 5, 5]}, "box must be"),
    "short box": ({"box": [5, 5, 9]}, "box must be"),
    "category": ({"category": 3}, "category must be a name, not 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_are_left_out_with_a_reason(tmp_path, case):
    change, words = BAD[case]
    root = write_pairs(tmp_path / "set")
    pairs = json.loads((root / "pairs.json").read_text())
    (root / "pairs.json").write_text(json.dumps([{**pairs[0], **change}]))
    with pytest.raises(ValueError, match=f"no usable sample to test on.*{words}") as raised:
        read_pairs(root)
    assert "\n" not in str(raised.value)
    (root / "pairs.json").write_text(json.dumps([pairs[0], {**pairs[0], **change}]))
    data = read_pairs(root)
    assert [pair.name for pair in data.pairs] == ["pair 1"]
    assert [problem.name for problem in data.problems] == ["pair 2"]


def test_without_a_box_the_image_is_the_unit(tmp_path):
    root = write_pairs(tmp_path / "set", box=None)
    assert [pair.side for pair in read_pairs(root).pairs] == [64, 64]


@pytest.mark.parametrize("content", ["{", "{}", "[1]", "[NaN]"])
def test_lists_of_pairs_that_are_damaged(tmp_path, content):
    root = write_pairs(tmp_path / "set")
    (root / "pairs.json").write_text(content)
    with pytest.raises(ValueError, match=r"pairs\.json: (not JSON|must hold a list)"):
        read_pairs(root)
    (root / "pairs.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"pairs\.json: no such file"):
        read_pairs(root)


def write_spair(root):
    """Two pairs as SPair-71k has them, and a file that the list does not name."""
    for category in ("cat", "dog"):
        folder = root / "JPEGImages" / category
        folder.mkdir(parents=True)
        for name in ("2007_000001", "2008_000002"):
            Image.fromarray(noise(len(name))).save(folder / f"{name}.jpg")
    annotations = root / "PairAnnotation" / "test"
    annotations.mkdir(parents=True)
    names = []
    for number, category in enumerate(("cat", "dog", "dog"), 1):
        name = f"{number:06d}-2007_000001-2008_000002:{category}"
        content = {
            "pair_id": number, "filename": name, "category": category,
            "src_imname": "2007_000001.jpg", "trg_imname": "2008_000002.jpg",
            "src_imsize": [64, 48, 3], "trg_imsize": [64, 48, 3],
            "src_bndbox": [1, 2, 50, 40], "trg_bndbox": [3, 4, 24, 44],
            "src_kps": POINTS, "trg_kps": moved(POINTS), "kps_ids": ["0", "1", "4", "7"],
        }  # fmt: skip
        (annotations / f"{name}.json").write_text(json.dumps(content))
        names.append(name)
    (root / "Layout" / "large").mkdir(parents=True)
    (root / "Layout" / "large" / "test.txt").write_text("\n".join(names[:2]) + "\n")
    return root


def test_spair(tmp_path, colour_backbone):
    root = write_spair(tmp_path / "spair")
    data = read_pairs(root, layout="spair")
    assert [(pair.source, pair.category, pair.side) for pair in data.pairs] == [
        ("cat/2007_000001", "cat", 40),
        ("dog/2007_000001", "dog", 40),
    ]
    assert len(data.test) == 4
    assert data.sizes["dog/2008_000002"] == (48, 64)
    results = run(root, tmp_path / "out", colour_backbone, layout="spair")
    assert list(results.rows[0].per_class) == ["cat", "dog"]
    listed = (root / "Layout" / "large" / "test.txt").read_text().split()
    (root / "PairAnnotation" / "test" / f"{listed[0]}.json").write_text("{")
    (root / "JPEGImages" / "dog" / "2008_000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"not JSON.*2008_000002\.jpg is missing"):
        read_pairs(root, layout="spair")
    (root / "PairAnnotation" / "test" / f"{listed[0]}.json").write_text("{}")
    with pytest.raises(ValueError, match="category must be a name, not None"):
        read_pairs(root, layout="spair")
    (root / "Layout" / "large" / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="is the layout right"):
        read_pairs(root, layout="spair")


def test_other_layouts(tmp_path, colour_backbone):
    with pytest.raises(ValueError, match="layout='voc' has no pairs of images"):
        run(tmp_path, tmp_path / "out", colour_backbone, layout="voc")
    with pytest.raises(ValueError, match="layout=spair is for the task correspondence, not seg"):
        evaluate(
            "seg", tmp_path, tmp_path / "out", backbone=colour_backbone, layout="spair",
            upsamplers=["nearest"],
        )  # fmt: skip
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        read_pairs(tmp_path / "none")
