"""The probe of published comparisons, and upsampling to a part of the image's resolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upfeat
from upfeat.evaluation import EvalConfig, evaluate
from upfeat.evaluation.passes import find_passes
from upfeat.evaluation.trained_probe import BATCH, EPOCHS, RATE, Labelled, train_classifier
from upfeat.features import UpsampledFeatures
from upfeat.upsamplers import create_upsampler

TINY = EvalConfig(size=48, seeds=2, probe="adamw", protocols=("own", "transfer"), pictures=0)


def maps(upsampler, count=3):
    generator = torch.Generator().manual_seed(0)
    upsampler = create_upsampler(upsampler).requires_grad_(False)
    made = []
    for index in range(count):
        size = 4 + index, 6
        features = torch.randn(1, 5, *size, generator=generator)
        image = torch.rand(1, 3, 8 * size[0], 8 * size[1], generator=generator)
        label = torch.randint(0, 3, image.shape[2:], generator=generator, dtype=torch.uint8)
        label[:2] = 255
        made.append(Labelled(UpsampledFeatures(features, image, upsampler), label))
    return made


@pytest.mark.parametrize("upsampler", ["bilinear", "detail_universal"])
def test_equals_a_convolution_on_the_upsampled_features(upsampler):
    made = maps(upsampler)
    finished = []
    with torch.no_grad():  # of a notebook; the probe is trained even so
        probe = train_classifier(
            made.__getitem__, 3, 5, 3, torch.Generator().manual_seed(1), finished.append
        )
    assert finished == list(range(1, EPOCHS + 1))

    generator = torch.Generator().manual_seed(1)
    conv = nn.Conv2d(5, 3, 1)
    with torch.no_grad():
        start = torch.empty(3, 6).uniform_(-(5**-0.5), 5**-0.5, generator=generator)
        conv.weight.copy_(start[:, 1:, None, None])
        conv.bias.copy_(start[:, 0])
    optimizer = torch.optim.AdamW(conv.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * EPOCHS)
    for _ in range(EPOCHS):
        order = torch.randperm(3, generator=generator).tolist()
        for batch in (order[:BATCH], order[BATCH:]):
            logits = [conv(made[index].features.full()).flatten(2)[0].T for index in batch]
            labels = [made[index].label.flatten().long() for index in batch]
            optimizer.zero_grad()
            F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=255).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(probe.weight, conv.weight[:, :, 0, 0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.bias, conv.bias.detach(), rtol=1e-4, atol=1e-5)


def test_a_map_whose_heads_record_no_gradients():
    class Fixed(UpsampledFeatures):
        def project(self, *args, **kwargs):
            return super().project(*args, **kwargs).detach()

    made = maps("bilinear", 2)
    fixed = [
        Labelled(Fixed(one.features, one.guidance, one.upsampler), label) for one, label in made
    ]
    found = [
        train_classifier(each.__getitem__, 2, 5, 3, torch.Generator().manual_seed(1), id)
        for each in (made, fixed)
    ]
    torch.testing.assert_close(*(probe.weight for probe in found), rtol=1e-4, atol=1e-5)


def test_scores_and_repeats(folder, colour_backbone, tmp_path):
    def run(name):
        return evaluate(
            "seg", folder, tmp_path / name, upsamplers=["nearest", "bilinear"],
            backbone=colour_backbone, config=TINY,
        )  # fmt: skip

    first, again = run("a"), run("b")
    assert [row.scores for row in first.rows] == [row.scores for row in again.rows]
    rows = {(row.upsampler, row.protocol): row for row in first.rows}
    assert len(rows) == 4
    own, transfer = (rows["nearest", protocol].scores["miou"] for protocol in TINY.protocols)
    assert own == transfer  # nearest is the coarse features
    assert len(set(own)) == 2  # seeds differ
    assert "1×1 convolution" in (tmp_path / "a" / "report.html").read_text()


def test_depth_has_no_such_probe(tmp_path):
    with pytest.raises(ValueError, match="probe=adamw is for seg"):
        evaluate("depth", tmp_path, tmp_path / "out", config=TINY)


def test_ratios_from_one_to_the_stride(colour_backbone):
    image = torch.rand(1, 3, 48, 64)
    backbone = colour_backbone

    def full(name):
        return find_passes(name, backbone).model.lazy(image).full()

    features, plain = backbone(image), create_upsampler("bilinear")
    torch.testing.assert_close(full("bilinear@x1"), plain(features, image, (48, 64)))
    detail = upfeat.load(backbone, upsampler="detail_universal")
    torch.testing.assert_close(full("detail_universal@x8"), detail(image))
    quarter = find_passes("nearest@x4", backbone)
    assert quarter.passes == 1
    assert quarter.model.backbone(image).shape == (1, 6, 24, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bilinear@x9", "ratio must be from 1 to 8"),
        ("bilinear@x0", "ratio must be from 1 to 8"),
        ("no_such@x2", "no_such"),
    ],
)
def test_bad_ratios(colour_backbone, name, message):
    with pytest.raises(ValueError, match=message) as raised:
        find_passes(name, colour_backbone)
    assert "\n" not in str(raised.value)
