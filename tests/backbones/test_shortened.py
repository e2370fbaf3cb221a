"""Blocks behind the last layer chosen are not run, and nobody can tell otherwise."""

import copy
import pickle
import threading
import types

import pytest
import torch

import upfeat

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 64,
    "patch_size": 16,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2]}
TEXT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
# Model, configuration, and the list of blocks in the part that sees.
FAMILIES = {
    "vit": ("ViT", VIT, "layers"),
    "beit": ("Beit", VIT, "layers"),
    "dinov2": ("Dinov2", DINO, "encoder.layer"),
    "dinov2_registers": ("Dinov2WithRegisters", DINO, "encoder.layer"),
    "dinov3": ("DINOv3ViT", {**VIT, "num_register_tokens": 4}, "model.layer"),
    "clip": ("CLIP", {"vision_config": VIT, "text_config": TEXT}, "vision_model.encoder.layers"),
    "siglip": ("SiglipVision", VIT, "encoder.layers"),
    "swin": ("Swin", {**SWIN, "window_size": 4}, "encoder.layers"),
    "convnext": ("ConvNext", STAGES, "encoder.stages"),
    "resnet": ("ResNet", {**STAGES, "embedding_size": 8}, "encoder.stages"),
    "poolformer": ("PoolFormer", STAGES, "encoder.block"),
}


def _make(family):
    name, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    network = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**options)
    )
    with torch.no_grad():
        for value in network.parameters():  # norms and biases that change something
            value.add_(0.1 * torch.randn_like(value))
    return network.eval()


def _blocks(network, family):
    """The list of blocks, which had other names in older versions of transformers."""
    try:
        return network.get_submodule(FAMILIES[family][2])
    except AttributeError:
        count = len(FAMILIES[family][1].get("depths", range(4)))
        lists = [one for one in network.modules() if isinstance(one, torch.nn.ModuleList)]
        return next(one for one in lists if len(one) == count)


def _counted(blocks):
    """Count the calls of each block, without hooks."""
    calls = [0] * len(blocks)

    def count(number, forward):
        def counted(*args, **options):
            calls[number] += 1
            return forward(*args, **options)

        return counted

    for number, block in enumerate(blocks):
        for one in block if isinstance(block, torch.nn.ModuleList) else [block]:
            one.forward = count(number, one.forward)
    return calls


def _whole(backbone, x):
    """Features of the whole model."""
    reader = backbone.module
    cut, reader.cut = reader.cut, None
    try:
        return backbone(x)
    finally:
        reader.cut = cut


@pytest.fixture
def network():
    return _make("dinov2")


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 96)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_later_blocks_are_not_run(family, layer):
    network = _make(family)
    backbone = upfeat.load_backbone(network, layer=layer)
    calls = _counted(_blocks(network, family))
    for size in ((64, 64), (96, 160)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = _whole(backbone, x)
            calls[:] = [0] * len(calls)
            assert torch.equal(backbone(x), expected)
        assert all(calls[: layer + 1])
        assert not any(calls[layer + 1 :])


def test_the_last_of_several_layers_counts(network, x):
    backbone = upfeat.load_backbone(network, layer=[2, 0])
    calls = _counted(network.encoder.layer)
    found = backbone(x)
    assert calls == [1, 1, 1, 0]
    assert torch.equal(found, _whole(backbone, x))


@pytest.mark.parametrize("layer", [None, 3, -1, [0, 3]])
def test_the_last_layer_needs_all(network, x, layer):
    backbone = upfeat.load_backbone(network, layer=layer)
    calls = _counted(network.encoder.layer)
    backbone(x)
    assert calls == [1] * 4


def test_a_model_that_counts_on_all_its_blocks_is_run_whole(x):
    class Counting(transformers.Dinov2Model):
        def forward(self, pixel_values, **options):
            self.encoder.layer[3]
            return super().forward(pixel_values, **options)

    backbone = upfeat.load_backbone(Counting(transformers.Dinov2Config(**DINO)), layer=1)
    assert backbone.module.cut is None
    calls = _counted(backbone.module.network.encoder.layer)
    backbone(x)
    assert calls == [1] * 4


def test_states_that_depend_on_later_blocks_stay_as_they_are(x):
    class Adding(transformers.Dinov2Model):
        def forward(self, pixel_values, **options):
            output = super().forward(pixel_values, **options)
            states = output.hidden_states
            output.hidden_states = tuple(one + states[-1] for one in states) if states else None
            return output

    network = Adding(transformers.Dinov2Config(**DINO)).eval()
    states = network(x, output_hidden_states=True).hidden_states
    expected = states[2][:, 1:].mT.unflatten(2, (4, 6))
    torch.testing.assert_close(upfeat.load_backbone(network, layer=1)(x), expected)


def test_the_model_stays_as_it_was(network, x):
    names, output = list(network.state_dict()), network(x).last_hidden_state
    modules = list(network.modules())
    backbone = upfeat.load_backbone(network, layer=1)
    for _ in range(3):
        backbone(x)
    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))
    assert list(network.state_dict()) == names
    found = network(x, output_hidden_states=True)
    assert len(found.hidden_states) == 5
    assert torch.equal(found.last_hidden_state, output)
    assert len(list(backbone.parameters())) == len(list(network.parameters()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_originals_go_on(network, x, duplicate):
    """Copying removes transformers' hooks, which a shortened model may not put back twice."""
    backbone = upfeat.load_backbone(network, layer=1)
    expected = backbone(x)
    for one in (duplicate(backbone), backbone):
        for _ in range(3):
            assert torch.equal(one(x), expected)
        inner = one.module.network
        assert len(inner(x, output_hidden_states=True).hidden_states) == 5
        calls = _counted(inner.encoder.layer)
        assert torch.equal(one(x), expected)
        assert calls == [1, 1, 0, 0]


def test_changes_of_the_model_are_seen(network, x):
    backbone = upfeat.load_backbone(network, layer=1)
    before = backbone(x)
    other = {name: value + 0.1 for name, value in network.state_dict().items()}
    network.load_state_dict(other, assign=True)
    loaded = backbone(x)
    assert torch.equal(loaded, _whole(backbone, x))
    assert not torch.equal(loaded, before)
    network.encoder.layer[1] = torch.nn.Identity()
    network.encoder.layer[1] = copy.deepcopy(network.encoder.layer[0])
    assert torch.equal(backbone(x), _whole(backbone, x))
    network.encoder = copy.deepcopy(network.encoder)
    assert torch.equal(backbone(x), _whole(backbone, x))
    backbone.to(torch.float64)
    assert backbone(x.double()).dtype == torch.float64
    torch.testing.assert_close(backbone(x), _whole(backbone, x), rtol=0, atol=0)


@pytest.mark.parametrize("place", ["encoder.layer.3.mlp", "encoder.layer.1", "encoder", ""])
def test_hooks_are_called(network, x, place):
    backbone = upfeat.load_backbone(network, layer=1)
    expected, seen = backbone(x), []
    network.get_submodule(place).register_forward_hook(lambda *given: seen.append(given))
    assert torch.equal(backbone(x), expected)
    assert len(seen) == 1


def test_a_forward_of_its_own_may_run_the_whole_model(network, x):
    """So do hooks of accelerate, which are functions in place of ``forward``."""
    backbone = upfeat.load_backbone(network, layer=1)
    expected, forward = backbone(x), network.forward
    network.forward = types.MethodType(lambda self, *args, **more: forward(*args, **more), network)
    assert torch.equal(backbone(x), expected)


def test_gradients_are_the_same(network, x):
    backbone = upfeat.load_backbone(network, layer=1)

    def gradients(run):
        given = x.clone().requires_grad_()
        return torch.autograd.grad(
            run(given).square().sum(), [given, *network.parameters()], allow_unused=True
        )

    found, expected = gradients(backbone), gradients(lambda given: _whole(backbone, given))
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_threads_share_a_model(network, x):
    """One thread reads an early layer, while another one runs the model itself."""
    backbone = upfeat.load_backbone(network, layer=1)
    expected, last = backbone(x), network(x).last_hidden_state
    wrong = []

    def repeat(run, result):
        wrong.extend(run for _ in range(20) if not torch.equal(run(), result))

    threads = [
        threading.Thread(target=repeat, args=pair)
        for pair in ((lambda: backbone(x), expected), (lambda: network(x).last_hidden_state, last))
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong


def test_programs_are_made_of_the_whole_model(network, x):
    backbone = upfeat.load_backbone(network, layer=1)
    program = torch.export.export(backbone, (x,))
    torch.testing.assert_close(program.module()(x), backbone(x))
