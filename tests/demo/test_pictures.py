"""Pictures of the page: files in addresses, one range of colours for both maps."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from upfeat.demo import pictures
from upfeat.demo.models import Models
from upfeat.demo.session import Pair, Visit, read_upload


@pytest.fixture(scope="module")
def visit():
    file = io.BytesIO()
    Image.radial_gradient("L").resize((60, 40)).convert("RGB").save(file, "PNG")
    return Visit(Models()("efficientnet_lite0", "bilinear"), read_upload(file.getvalue()), 224)


@pytest.mark.parametrize(
    ("address", "kind", "close"),
    [(pictures.png_address, "png", 0), (pictures.jpeg_address, "jpeg", 4)],
)
def test_addresses_hold_the_picture(address, kind, close):
    y, x = np.mgrid[:20, :30]
    values = np.stack([4 * y, 5 * x, 2 * (x + y)], axis=2).astype(np.uint8)
    head, _, content = address(Image.fromarray(values)).partition(",")
    assert head == f"data:image/{kind};base64"
    found = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert np.abs(np.asarray(found).astype(int) - values).max() <= close


def test_both_maps_share_a_range_and_light_grows_with_values():
    pair = Pair(torch.tensor([[0.0, 1.0]]), torch.linspace(-2, 3, 51)[None])
    assert pictures.heat_range(pair) == (-2, 3)
    shown = pictures.heat_image(pair.fine, -2, 3).convert("L")
    light = np.asarray(shown).astype(int)[0]
    assert (np.diff(light) >= 0).all()
    assert light[-1] - light[0] > 150
    coarse = np.asarray(pictures.heat_image(pair.coarse, -2, 3).convert("L"))[0]
    assert coarse[0] == light[20]
    beyond = pictures.heat_image(torch.tensor([[-9.0, 9.0]]), -2, 3).convert("L")
    assert np.asarray(beyond).tolist() == [[light[0], light[-1]]]


def test_a_constant_map_has_a_range():
    low, high = pictures.heat_range(Pair(torch.ones(2, 2), torch.ones(3, 3)))
    assert low < high
    assert pictures.heat_image(torch.ones(2, 2), low, high).size == (2, 2)


def test_classes_have_their_colours():
    labels = torch.tensor([[0, 1, 2], [2, 1, 0]], dtype=torch.uint8)
    shown = np.asarray(pictures.label_image(labels.T.contiguous().T).convert("RGB"))
    assert (shown == np.array(pictures.CLASS_COLOURS)[labels.numpy()]).all()


def test_a_sheet_shows_photograph_coarse_and_fine_in_a_row(visit):
    photo = pictures.photo_image(visit)
    coarse, fine = pictures.colour_images(visit)
    assert photo.size == fine.size == visit.shape[::-1]
    assert coarse.size == visit.lazy.features.shape[:1:-1]
    assert (np.asarray(photo) == visit.photo.permute(1, 2, 0).numpy()).all()
    row = pictures.sheet(visit, [coarse, fine], "features")
    assert row.width >= 3 * photo.width
    assert row.height > photo.height
    found = Image.open(io.BytesIO(pictures.png(row)))
    assert (np.asarray(found) == np.asarray(row)).all()
