"""Heads from folders of labelled photographs: what is drawn, what is kept out, what is refused."""

import shutil

import numpy as np
import pytest
import torch
from evaluation.scenes import COLOURS, write_scene
from PIL import Image

import upfeat
from upfeat.labelled import Scores, train_on_folder

FEW = {"pixels": 40, "folds": 2}


@pytest.fixture
def folder(tmp_path):
    for seed in range(4):
        write_scene(tmp_path / "set", f"s{seed}", seed)
    (tmp_path / "set" / "classes.json").write_text('["ground", "box", "disc"]')
    return tmp_path / "set"


@pytest.fixture
def model():
    """Colours as they are: every pixel is a cell."""
    exact = upfeat.load_backbone(lambda x: torch.cat([x, x.square()], 1), name="exact", stride=1)
    return upfeat.load(exact, upsampler="nearest")


def test_a_head_tells_the_colours_of_classes_apart(model, folder):
    head, scores = train_on_folder(model, folder, **FEW)
    assert (head.names, head.kind, head.upsampler) == (
        ["ground", "box", "disc"],
        "classes",
        "nearest",
    )
    assert head.backbone["name"] == "exact"
    assert (scores.groups, scores.matrices.shape, scores.iou.shape) == (4, (2, 3, 3), (3,))
    assert scores.accuracy > 0.99
    x = model.preprocess(COLOURS[None, :, :])  # an image of one row, a pixel for each class
    logits = torch.einsum("kc,bchw->bkhw", head.weight, model(x)) + head.bias[:, None, None]
    assert logits[0, :, 0].argmax(0).tolist() == [0, 1, 2]


def test_a_seed_decides_everything_and_progress_is_told(model, folder):
    told = []
    first, again, other = (
        train_on_folder(model, folder, seed=seed, on_image=told.append, **FEW)[0].weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert told == [f"s{seed}" for seed in range(4)] * 3


def test_photographs_to_test_on_are_not_looked_at(model, folder, tmp_path):
    alone, _ = train_on_folder(model, folder, **FEW)
    split = tmp_path / "split"
    shutil.copytree(folder, split / "train")
    write_scene(split / "test", "x", 9)
    Image.new("L", (64, 48), 99).save(split / "test" / "labels" / "x.png")
    shutil.copy(folder / "classes.json", split)
    found, scores = train_on_folder(model, split, **FEW)
    assert torch.equal(found.weight, alone.weight)
    assert scores.groups == 4


def test_a_smaller_size_is_that_of_photographs_and_labels(model, folder):
    _, scores = train_on_folder(model, folder, size=24, **FEW)
    assert scores.groups == 4
    assert scores.accuracy > 0.9


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (np.full((48, 64), 7, np.uint8), "class indices 7 are outside the list of 3"),
        (np.full((48, 64), 255, np.uint8), "no pixel has a label"),
        (np.zeros((24, 32), np.uint8), r"is 24×32 pixels but its image 48×64 \(height×width\)"),
        (np.zeros((48, 64, 3), np.uint8), "mode RGB; labels must hold one index"),
        (None, "not a readable picture"),
    ],
)
def test_labels_that_do_not_fit_are_named_with_their_file(model, folder, label, words):
    path = folder / "labels" / "s2.png"
    if label is None:
        path.write_bytes(path.read_bytes()[:50])
    else:
        Image.fromarray(label).save(path)
    with pytest.raises(ValueError, match=rf"labels/s2\.png: .*{words}"):
        train_on_folder(model, folder, **FEW)


def test_labels_that_a_size_loses_are_left_out(model, folder):
    label = np.full((48, 64), 255, np.uint8)
    label[0, 0] = 1
    Image.fromarray(label).save(folder / "labels" / "s2.png")
    _, scores = train_on_folder(model, folder, size=12, **FEW)
    assert scores.groups == 3


def test_too_few_photographs_and_classes_are_refused(model, folder):
    for path in (folder / "labels").iterdir():
        Image.new("L", (64, 48), 1).save(path)
    with pytest.raises(ValueError, match="the labels show one class only; a head needs two"):
        train_on_folder(model, folder, **FEW)
    for name in ("s1", "s2"):
        (folder / "labels" / f"{name}.png").unlink()
    (folder / "labels" / "s3.png").unlink()
    with pytest.raises(ValueError, match="no usable sample to train on"):
        train_on_folder(model, folder, **FEW)


def test_scores_as_lines():
    """Two pixels of the first fold are taken for a class that only the second one has."""
    first = [[8, 0, 2], [0, 0, 0], [0, 0, 0]]
    second = [[10, 0, 0], [0, 0, 0], [0, 0, 4]]
    scores = Scores(torch.tensor([first, second]), 4)
    assert scores.lines(["a", "long", "c"]) == [
        "a         90.0 ± 14.1 %",
        "long      –",
        "c         66.7 %",
        "mean IoU  78.3 ± 14.1 %",
        "accuracy  91.7 ± 14.1 %",
    ]
