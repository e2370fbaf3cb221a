"""Arguments, configurations and weights from anywhere: right, or refused by name."""

import json
import math
import subprocess
import sys
import time

import pytest
import torch
from jbu_reference import published_state
from safetensors.torch import load_file, save_file
from upsamplers.test_checkpoints import save

import upfeat
from upfeat.tensor_checks import Layout, check_layouts, check_values
from upfeat.upsamplers.base import UPSAMPLERS

ARGUMENTS = {
    "joint_bilateral": ("radius", "sigma_spatial", "sigma_range"),
    "jbu_stack": ("embed_dim", "radius", "n_stages"),
    "neighbourhood": ("radius", "query_dim", "levels", "back_projections"),
    "detail": (
        *("embed_dim", "radius", "query_dim", "levels", "back_projections"),
        *("width", "depth", "widening", "ridge"),
    ),
    "anyup": ("width", "heads", "window_ratio", "basis_side"),
    "jafar": ("embed_dim", "width", "heads"),
    "naf": ("width", "heads", "window_side"),
    "uplift": ("embed_dim", "encoder_widths", "width"),
}
CASES = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]
WRONG = [
    *(True, False, "2", "two", [2], {}, -1, 2.5e30, math.nan, math.inf, -math.inf),
    *(10**7, 10**9, 10**400, 1j, torch.ones(2)),
]
IN_FILES = [True, "2", [2], {}, -1, 1e400, 10**6 * 2 + 1, 10**9, 10**30]


def upsampler(name):
    small = {"query_dim": 4, "levels": 2}
    made = {
        "joint_bilateral": lambda: upfeat.JointBilateral(),
        "jbu_stack": lambda: upfeat.JBUStack(5, radius=1, n_stages=2),
        "neighbourhood": lambda: upfeat.NeighbourhoodUpsampler(**small),
        "detail": lambda: upfeat.DetailUpsampler(5, width=4, depth=1, **small),
        "anyup": lambda: UPSAMPLERS["anyup"](width=32),
        "jafar": lambda: UPSAMPLERS["jafar"](5, width=32),
        "naf": lambda: UPSAMPLERS["naf"](width=32),
        "uplift": lambda: UPSAMPLERS["uplift"](5, encoder_widths=(4, 6), width=18),
    }
    return made[name]()


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_constructors_take_no_nonsense(name, argument):
    for value in WRONG:
        before = time.process_time()
        with pytest.raises(ValueError, match=argument) as raised:
            UPSAMPLERS[name](
                **{**({"embed_dim": 5} if name in ("jafar", "uplift") else {}), argument: value}
            )
        assert time.process_time() - before < 1
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 200


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_configurations_take_no_nonsense(tmp_path, name, argument):
    """Whatever is in ``config.json``, it is refused at once, by its name and that of the file."""
    upsampler(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for value in IN_FILES:
        (tmp_path / "config.json").write_text(json.dumps({**config, argument: value}))
        before = time.process_time()
        with pytest.raises(ValueError, match=f"config.json: .*{argument}|config.json: not JSON"):
            upfeat.Upsampler.from_pretrained(tmp_path)
        assert time.process_time() - before < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"levels": 16}, "missing encoder.coarser"),
        ({"query_dim": 1024, "levels": 16}, "do not fit its configuration"),
        ({"radius": 16}, None),  # no tensor depends on it
        ({"start": "owner/name"}, 'argument "start" is unknown'),
        ({"backend": "cpu"}, 'argument "backend" is unknown'),
        ({"raduis": 2}, "did you mean radius"),
        ({"upsampler": ["detail"]}, "is unknown"),
        ({"upsampler": None}, "is unknown"),
    ],
)
def test_configurations_are_compared_with_the_header(tmp_path, changes, words, monkeypatch):
    """Nothing is built of an unknown size: a module with values exists when it is known to fit."""
    upsampler("neighbourhood").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    built = []
    plain = upfeat.NeighbourhoodUpsampler.__init__

    def counted(self, **arguments):
        plain(self, **arguments)
        built.append(next(self.parameters()).is_meta)

    counted.__signature__ = __import__("inspect").signature(plain)
    monkeypatch.setattr(upfeat.NeighbourhoodUpsampler, "__init__", counted)
    if words is None:
        assert upfeat.Upsampler.from_pretrained(tmp_path).radius == 16
        assert built == [True, False]
    else:
        with pytest.raises(ValueError, match=words) as raised:
            upfeat.Upsampler.from_pretrained(tmp_path)
        assert "\n" not in str(raised.value)
        assert False not in built


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"upsampler": "detail", "upsampler": "bilinear"}', "given twice"),
        ('{"upsampler": "detail", "ridge": NaN}', "NaN is no number"),
        ('{"upsampler": ' + "[" * 100_000, "nested too deeply"),
        (" " * (2 << 20), "larger than 1024 KiB"),
        ("[]", "holds list"),
    ],
)
def test_configurations_of_another_kind(tmp_path, text, words):
    upsampler("neighbourhood").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words) as raised:
        upfeat.Upsampler.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", ["jbu_stack", "neighbourhood", "detail"])
def test_weights_that_are_not_finite(tmp_path, name, value):
    """By every door, with the tensor's name; what was there before stays."""
    made = upsampler(name)
    made.save_pretrained(tmp_path)
    before = {key: one.contiguous().clone() for key, one in made.state_dict().items()}
    for key in list(before)[::5]:
        state = {other: one.contiguous().clone() for other, one in before.items()}
        state[key].view(-1)[-1] = value
        save_file(state, tmp_path / "model.safetensors")
        pattern = rf"model.safetensors: .*{key} holds"
        with pytest.raises(ValueError, match=pattern):
            upfeat.Upsampler.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"{key} holds"):
            made.load_state_dict(state)
        model = upfeat.FeatUp(Five(), made)
        with pytest.raises(ValueError, match=rf"{key} holds"):
            model.upsampler.load_state_dict(state)
        inside = {f"upsampler.{other}": one for other, one in state.items()}
        with pytest.raises(ValueError, match=rf"{key} holds"):
            model.load_state_dict(inside, strict=False)
        for other, one in made.state_dict().items():
            assert torch.equal(one, before[other])


class Five(torch.nn.Module):
    """Five channels of 16×16 cells."""

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 16)[:, [0, 1, 2, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_numbers(tmp_path, dtype):
    upsampler("jbu_stack").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["channel_mix.bias"] = torch.ones(5).to(dtype)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"channel_mix.bias holds .*, not floating numbers"):
        upfeat.Upsampler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("neighbourhood", "log_temperature", 100.0),
        ("detail", "neighbourhood.log_sigma", -90.0),
        ("jbu_stack", "stages.1.sigma_spatial", 0.0),
        ("naf", "periods", 0.0),
    ],
)
def test_weights_that_would_give_nan(tmp_path, name, key, value):
    made = upsampler(name)
    made.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state[key].fill_(value)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{key} holds {abs(value):g}; magnitudes from"):
        upfeat.Upsampler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("upsampler.up2.range_proj.0.bias", torch.full((32,), math.nan), "holds NaN"),
        ("upsampler.up4.sigma_spatial", torch.tensor(-math.inf), "holds NaN or infinity"),
        ("upsampler.up1.range_temp", torch.tensor(1, dtype=torch.int64), "torch.int64, not float"),
        ("upsampler.fixup_proj.1.bias", torch.ones(6, dtype=torch.complex64), "torch.complex64"),
        (
            "upsampler.fixup_proj.1.bias",
            torch.full((6,), 1e300, dtype=torch.float64),
            "1e.300; mag",
        ),
        ("upsampler.fixup_proj.1.bias", torch.ones(6).to_sparse(), "sparse"),
    ],
)
def test_published_checkpoints_with_such_weights(tmp_path, key, value, words):
    state = published_state()
    upfeat.JBUStack.from_featup(save(tmp_path / "good.ckpt", state))
    path = save(tmp_path / "bad.ckpt", {"state_dict": {**state, key: value}})
    with pytest.raises(ValueError, match=f"bad.ckpt: {key} .*{words}") as raised:
        upfeat.JBUStack.from_featup(path)
    assert "\n" not in str(raised.value)


def test_nothing_that_is_not_finite_is_saved(tmp_path):
    made = upsampler("jbu_stack")
    with torch.no_grad():
        made.stages[0].range_temperature.fill_(math.nan)
    with pytest.raises(ValueError, match=r"stages.0.range_temperature holds NaN"):
        made.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_half_precision_is_read_and_checked(tmp_path):
    made = upsampler("jbu_stack")
    made.save_pretrained(tmp_path)
    state = {key: one.half() for key, one in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    again = upfeat.Upsampler.from_pretrained(tmp_path)
    assert next(again.parameters()).dtype == torch.float32
    torch.testing.assert_close(again.state_dict(), made.state_dict(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 7, b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7],
)
def test_headers_that_are_none(tmp_path, content):
    upsampler("neighbourhood").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a whole safetensors file") as raised:
        upfeat.Upsampler.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_headers_that_lie_about_sizes(tmp_path):
    upsampler("neighbourhood").save_pretrained(tmp_path)
    for shape in ([10**12, 10**12], [0, 10**15], [2**63]):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        header = json.dumps({"log_sigma": entry}).encode()
        content = len(header).to_bytes(8, "little") + header
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            upfeat.Upsampler.from_pretrained(tmp_path)


def test_loading_draws_nothing_and_imports_no_compiler():
    """A module without values tells its shapes; that must not cost seconds of imports."""
    code = (
        "import sys, torch, upfeat\n"
        "torch.manual_seed(0); before = torch.get_rng_state()\n"
        "for name in upfeat.list_upsamplers(): upfeat.upsamplers.create_upsampler(name)\n"
        "assert torch.equal(torch.get_rng_state(), before)\n"
        "print([m for m in ('sympy', 'torch._dynamo') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_checks_of_tensors_alone():
    with pytest.raises(ValueError, match=r"x: a is a torch.sparse_coo tensor"):
        check_values("x", {"a": torch.eye(2).to_sparse()})
    with pytest.raises(ValueError, match=r"x: a holds torch.int64, not floating"):
        check_values("x", {"a": torch.ones(2, dtype=torch.int64)}, floating=True)
    check_values("x", {"a": torch.ones(2, dtype=torch.int64), "b": torch.empty(0)})
    expected = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)}
    check_layouts("x", {"a": Layout((2,), "BF16"), "b": Layout((2,), "I64")}, expected)
    with pytest.raises(ValueError, match=r"b holds F32, not whole numbers"):
        check_layouts("x", {"a": Layout((2,), "F32"), "b": Layout((2,), "F32")}, expected)
    many = {f"n{index}": Layout((1,), "F32") for index in range(1000)}
    with pytest.raises(ValueError, match=r"and 998 more") as raised:
        check_layouts("x", many, expected)
    assert len(str(raised.value)) < 300


def test_a_full_disk_leaves_the_earlier_upsampler_whole(tmp_path, fill_disk):
    """A mixture of files whose weights have equal shapes would be read without an error."""
    upfeat.NeighbourhoodUpsampler(radius=1, query_dim=4, levels=2).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fill_disk()
    with pytest.raises(OSError, match="No space left on device"):
        upfeat.NeighbourhoodUpsampler(radius=3, query_dim=4, levels=2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_remains_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".upfeat-4000000000-abcdefgh.safetensors").write_bytes(b"half")
    upfeat.NeighbourhoodUpsampler(query_dim=4, levels=2).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
