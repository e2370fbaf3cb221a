"""Arguments of what users call first are refused by their names, whatever they are given."""

import numpy as np
import pytest
import torch
from hostile import refuses
from torch import nn

import upfeat
from upfeat.backbones import Backbone
from upfeat.text import TextBackbone


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.Conv2d(8, 5, 1))


ATTACHED = {
    "layer": (), "upsampler": (), "stride": (), "mean": (), "std": (), "head": (), "guidance": (),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACHED)
def test_attach(name):
    whole, given = network(), {"layer": "0", "upsampler": upfeat.Bilinear(), "stride": 4}
    refuses(lambda **options: upfeat.attach(whole, **options), name, ATTACHED[name], **given)
    x = torch.randn(1, 3, 32, 48)
    assert whole(x).shape == (1, 5, 2, 3)  # nothing was left in it


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("upsampler", ()),
        ("device", (int,)),
        ("bands", ()),
        ("passes", (bool, np.bool_)),
        ("early", (bool,)),
        ("max_memory", (float, int)),
        ("translation", (str,)),
    ],
)
def test_load(name, kinds):
    backbone = upfeat.load_backbone(network()[0])
    options = {"passes": 5} if name == "translation" else {"upsampler": "bilinear"}
    kinds = {torch.Tensor, *kinds} if name == "passes" else kinds
    refuses(lambda **given: upfeat.load(backbone, **given), name, kinds, **options)


@pytest.mark.parametrize("lazy", [False, True])
def test_calls_of_a_model(lazy):
    model = upfeat.load(network()[0], upsampler="bilinear")
    x = torch.randn(1, 3, 32, 48)
    call = model.lazy if lazy else model
    refuses(lambda **given: call(x, **given), "output_size", (torch.Tensor,))
    refuses(lambda **given: call(x, **given), "mask", (torch.Tensor,))
    with pytest.raises(ValueError, match=r"mask must be \(H, W\) or \(B, 1, H, W\), not \(2,\)"):
        call(x, mask=torch.ones(2))
    if not lazy:
        refuses(lambda **given: call(x, **given), "out")
    refuses(lambda x: call(x), "x")


@pytest.mark.parametrize(("name", "kinds"), [("photos", (str,)), ("config", ()), ("on_step", ())])
def test_train(tmp_path, name, kinds):
    given = {"photos": tmp_path / "none", "config": upfeat.TrainConfig()}
    refuses(lambda **options: upfeat.train(network()[0], **options), name, kinds, **given)
    with pytest.raises(TypeError, match="config is of type dict; give a TrainConfig, as TrainConf"):
        upfeat.train(network()[0], tmp_path, {"steps": 3})


@pytest.mark.parametrize(
    "name", ["features", "guidance", "upsampler", "output_size", "missing", "hidden"]
)
def test_lazy_features(name):
    given = {
        "features": torch.ones(1, 4, 2, 2),
        "guidance": torch.ones(1, 3, 8, 8),
        "upsampler": upfeat.Bilinear(),
    }
    kinds = (torch.Tensor,) if name == "output_size" else ()
    refuses(upfeat.UpsampledFeatures, name, kinds, **given)
    for wrong in (torch.ones(1, 1, 8, 8), torch.ones(2, 1, 8, 8) > 0, torch.ones(1, 1, 8, 7) > 0):
        with pytest.raises(ValueError, match="missing is"):
            upfeat.UpsampledFeatures(**given, missing=wrong)


def test_masks_are_tensors_or_arrays():
    model = upfeat.load(network()[0], upsampler="bilinear")
    x, mask = torch.randn(1, 3, 32, 48), torch.zeros(32, 48, dtype=torch.bool)
    mask[:16, :20] = True
    expected = model(x, mask=mask)
    assert not expected[..., mask].any()
    for other in (mask.numpy(), mask.byte(), mask.numpy().astype(float), mask[None, None].numpy()):
        assert torch.equal(model(x, mask=other), expected)
        assert torch.equal(model.lazy(x, mask=other).full(), expected)


class Texts(TextBackbone):
    """Remembers what it is asked; no model stands behind it."""

    def __init__(self):
        Backbone.__init__(self, name="texts", embed_dim=1, stride=1)
        self.model, self.tokenizer, self.asked = None, object(), []
        self._tower = self

    def texts(self, model, tokenizer, texts):
        self.asked += texts
        return torch.eye(len(texts))


def test_templates_and_prompts_may_hold_braces():
    backbone = Texts()
    found = backbone.encode_text(["a {cat}", "{}"], ["the {} of {", "{0} {}"])
    assert backbone.asked == ["the a {cat} of {", "{0} a {cat}", "the {} of {", "{0} {}"]
    assert found.shape == (2, 4)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    for prompts in ("cat", [], [3], None, [None]):
        with pytest.raises(ValueError, match="prompts="):
            backbone.encode_text(prompts)
    for templates in ([], ["none"], ["{}", "none"]):
        with pytest.raises(ValueError, match="templates="):
            backbone.encode_text(["cat"], templates)
