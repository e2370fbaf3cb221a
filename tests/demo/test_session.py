"""What the page does, without the page: bounds, agreement with the library, visitors apart."""

import io
import time

import numpy as np
import pytest
import torch
from hostile import refuses
from PIL import Image

import upfeat
from upfeat.demo import session
from upfeat.demo.models import Models
from upfeat.demo.session import Visit, read_upload
from upfeat.demo.visits import Visits
from upfeat.heads import load_head


def photograph(width=120, height=90):
    file = io.BytesIO()
    gradient = Image.radial_gradient("L").resize((width, height))
    Image.merge("RGB", (gradient, gradient.rotate(180), gradient.rotate(90))).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def models():
    return Models()


@pytest.fixture(scope="module")
def original():
    return read_upload(photograph())


@pytest.fixture
def visit(models, original):
    return Visit(models("efficientnet_lite0", "bilinear"), original, 224)


def test_uploads_are_bounded(monkeypatch):
    with pytest.raises(ValueError, match="empty"):
        read_upload(b"")
    with pytest.raises(ValueError, match="photo: "):
        read_upload(b"not an image", "photo")
    with pytest.raises(ValueError, match="photo: "):
        read_upload(photograph()[:-200], "photo")
    monkeypatch.setattr(session, "MAX_PIXELS", 10_000)
    with pytest.raises(ValueError, match="million pixels"):
        read_upload(photograph())
    monkeypatch.setattr(session, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="MiB"):
        read_upload(photograph())


def test_scans_of_an_upload_are_bounded():
    """Every scan takes the time of the whole picture: hours, in a file of 16 MiB."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 128).save(file, "jpeg", progressive=True)
    content = file.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    assert read_upload(content[:-2] + 9 * last + content[-2:]).shape == (3, 64, 64)
    with pytest.raises(ValueError, match="mine is a JPEG of more than 1000 scans; save it anew"):
        read_upload(content[:-2] + 1000 * last + content[-2:], "mine")


@pytest.mark.parametrize("orientation", range(2, 9))
def test_uploads_are_upright(original, orientation):
    """A photograph of every orientation by EXIF that is upright is the same upload."""
    turns = [
        Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270,
    ]  # fmt: skip
    stored = Image.open(io.BytesIO(photograph())).transpose(turns[orientation - 2])
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    stored.save(file, "PNG", exif=exif)
    assert torch.equal(read_upload(file.getvalue()), original)


def test_messages_name_no_options_that_the_page_lacks():
    file = io.BytesIO()
    Image.fromarray(np.full((40, 40), 300, np.float32)).save(file, "TIFF")
    with pytest.raises(ValueError, match="photo: no photograph of 8 or 16 bits") as caught:
        read_upload(file.getvalue(), "photo")
    assert "max_value" not in str(caught.value)


@pytest.mark.parametrize("size", [(120, 90), (1400, 900), (30000, 40)])
def test_area_is_bounded_whatever_the_shape(size):
    image = read_upload(photograph(*size))
    assert image.dtype == torch.uint8
    assert image.shape[1] * image.shape[2] <= 2.1 * session.SIZES[-1] ** 2


def test_features_are_those_of_the_library_at_that_size(models):
    model = models("efficientnet_lite0", "bilinear")
    visit = Visit(model, read_upload(photograph()), 224)
    x = model.preprocess(photograph(), 224)
    torch.testing.assert_close(visit.lazy.features, model.backbone(x), rtol=0, atol=0.05)


def test_answers_equal_the_library(visit):
    height, width = visit.shape
    x = visit.model.preprocess(visit.photo)
    assert x.shape[2:] == (height, width)
    point = torch.tensor([100.0, 50.0])
    expected = visit.lazy.similarity(point)[0, 0]
    pair = visit.similarity(100.4, 50.9)
    torch.testing.assert_close(pair.fine, expected, atol=1e-4, rtol=1e-4)
    assert pair.coarse.shape == visit.lazy.features.shape[2:]
    assert pair.coarse.max() == pytest.approx(1, abs=1e-5)
    coarse, fine = visit.colours()
    assert fine.shape == (3, height, width)
    assert coarse.dtype == fine.dtype == torch.uint8
    visit.cool()
    torch.testing.assert_close(visit.similarity(100, 50).fine, pair.fine)


@pytest.mark.parametrize("point", [(-1, 0), (0, 10_000), (float("nan"), 0)])
def test_points_outside_are_refused(visit, point):
    with pytest.raises(ValueError, match=r"outside|must be a finite number"):
        visit.similarity(*point)


@pytest.mark.parametrize("name", ["y", "x"])
def test_points_that_are_no_numbers_are_refused(visit, name):
    refuses(visit.similarity, name, (int, float), y=1, x=1)
    for value in (float("nan"), float("inf"), -1, 10**30):
        with pytest.raises(ValueError):
            visit.similarity(**{"y": 1, "x": 1, name: value})


def test_strokes_become_labels_and_a_head(visit, tmp_path):
    strokes = [(0, 20, x) for x in range(20, 60)] + [(2, 200, x) for x in range(100, 140)]
    pair = visit.segment(strokes)
    assert set(pair.fine.unique().tolist()) == {0, 2}
    right = [int(pair.fine[y, x]) == label for label, y, x in strokes]
    assert sum(right) > 0.9 * len(right)
    path = tmp_path / "head.safetensors"
    path.write_bytes(visit.head_file())
    head = load_head(path)
    assert head.names == ["class 1", "class 3"]
    head.check_backbone(visit.model.backbone, "head")


def test_thinning_loses_no_class(visit):
    strokes = [(0, y, x) for y in range(40) for x in range(200)] + [(1, 100, 100), (2, 150, 100)]
    pair = visit.segment(strokes)
    assert {int(pair.fine[100, 100]), int(pair.fine[150, 100])} == {1, 2}
    assert len(visit._strokes(strokes)) <= session.MAX_STROKE_POINTS


def test_bad_strokes_are_refused(visit):
    for strokes in ([], [(0, 1, 1)], [(0, 1, 1), (0, 2, 2)]):
        with pytest.raises(ValueError, match="two classes"):
            visit.segment(strokes)
    for strokes in ([(3, 1, 1), (0, 1, 1)], [(0, 1, 9999), (1, 1, 1)]):
        with pytest.raises(ValueError, match="stroke"):
            visit.segment(strokes)
    for strokes in ([("x", 1, 1)], [(1, 2)], None):
        with pytest.raises(ValueError, match="rows"):
            visit.segment(strokes)
    with pytest.raises(ValueError, match="no head"):
        visit.head_file()


def test_features_are_what_the_library_reads(visit, tmp_path):
    path = tmp_path / "features.safetensors"
    path.write_bytes(visit.features_file())
    loaded = upfeat.UpsampledFeatures.load(path, visit.model.upsampler)
    assert loaded.shape == visit.lazy.shape


def test_texts_need_a_text_tower(visit):
    assert not visit.has_texts
    with pytest.raises(ValueError, match="no text tower"):
        visit.text("a cat")


def test_names_are_those_offered(models):
    assert models("efficientnet_lite0", "bilinear").backbone.name == "efficientnet_lite0"
    for names in (("/etc/passwd", "detail"), ("efficientnet_lite0", "../x")):
        with pytest.raises(ValueError, match="not offered"):
            models(*names)
    with pytest.raises(FileNotFoundError):
        Models(upsamplers=["missing.safetensors"])
    for device in ("nonsense", "meta"):  # before the page opens
        with pytest.raises(ValueError, match=f'device="{device}"'):
            Models(device=device)


class Plain:
    """A visit that counts how often it was made cold."""

    def __init__(self):
        self.cooled = 0

    def cool(self):
        self.cooled += 1


def test_visitors_are_few_apart_and_not_kept():
    now = [0.0]
    visits = Visits(3, warm=1, seconds=100, clock=lambda: now[0])
    made = {name: Plain() for name in "abcd"}
    for name in "abc":
        visits.put(name, made[name])
    assert made["c"].cooled == 0
    assert made["a"].cooled
    assert visits.get("a") is made["a"]
    visits.put("d", made["d"])
    assert len(visits) == 3
    for name in ("b", "e", None):
        with pytest.raises(ValueError, match="choose one again"):
            visits.get(name)
    now[0] = 99
    assert visits.get("a") is made["a"]
    now[0] = 150
    with pytest.raises(ValueError, match="again"):
        visits.get("d")
    assert visits.get("a") is made["a"]


def test_photographs_are_removed_without_a_request():
    visits = Visits(seconds=0.2)
    visits.put("a", Plain())
    for _ in range(100):
        if not len(visits):
            break
        time.sleep(0.05)
    assert len(visits) == 0
