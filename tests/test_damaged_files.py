"""Files of ours, cut off or altered anywhere: refused as such, never half read."""

import json

import pytest
import torch

import upfeat
from upfeat.heads import SavedHead, describe_backbone, load_head, save_head
from upfeat.storage import read_metadata, read_tensors, write_tensors
from upfeat.tensor_checks import read_layouts
from upfeat.training.checkpoint import FORMAT, Checkpoints
from upfeat.translation import Translation


class Patches(upfeat.Backbone):
    """A backbone of one convolution."""

    def __init__(self):
        super().__init__(name="patches", embed_dim=4, stride=8)
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(4, 3, 8, 8, generator=draw))

    def extract(self, x):
        return torch.nn.functional.conv2d(x, self.weight, stride=8)


BACKBONE = Patches().requires_grad_(False)


def _lazy(path):
    draw = torch.Generator().manual_seed(0)
    features, guidance = (torch.randn(1, c, s, s, generator=draw) for c, s in ((4, 3), (3, 24)))
    upfeat.UpsampledFeatures(features, guidance, upfeat.Bilinear()).save(path)


def _head(path):
    weight, bias = torch.ones(2, 4), torch.zeros(2)
    facts = describe_backbone(BACKBONE)
    save_head(path, SavedHead(weight, bias, ["sky", "–é"], "classes", facts, "bilinear"))


def _translation(path):
    Translation(torch.eye(4), torch.zeros(4)).save(path, BACKBONE)


KINDS = {
    "lazy": (_lazy, upfeat.UpsampledFeatures.load),
    "head": (_head, load_head),
    "translation": (_translation, lambda path: Translation.load(path, BACKBONE)),
    "tensors": (_head, read_tensors),
    "layouts": (_head, read_layouts),
}


def _sections(content):
    """Places where a part of a safetensors file ends, and some between."""
    header = 8 + int.from_bytes(content[:8], "little")
    facts = json.loads(content[8:header])
    ends = {header + one["data_offsets"][1] for key, one in facts.items() if key != "__metadata__"}
    return sorted({0, 1, 7, 8, 9, header // 2, header - 1, header, *ends, len(content) - 1})


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_off_at_any_section_is_refused_by_its_name(tmp_path, kind):
    write, read = KINDS[kind]
    path = tmp_path / "file.safetensors"
    write(path)
    read(path)
    content = path.read_bytes()
    for cut in _sections(content):
        if cut == len(content):
            continue
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"file\.safetensors: not a whole safetensors file"):
            read(path)
    for longer in (content + b"\0", content + content):
        path.write_bytes(longer)
        with pytest.raises(ValueError, match=r"file\.safetensors: not a whole safetensors file"):
            read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused(tmp_path, kind):
    _, read = KINDS[kind]
    for path in (tmp_path, tmp_path / "none.safetensors", tmp_path / "none" / "a.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"{path.name}: no such file"):
            read(path)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="link: no such file"):
        read(tmp_path / "link")


@pytest.mark.parametrize("kind", ["lazy", "head", "translation"])
def test_files_of_other_kinds_are_told(tmp_path, kind):
    for other, (write, _) in KINDS.items():
        if other in (kind, "tensors", "layouts") or write is KINDS[kind][0]:
            continue
        write(tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"other\.safetensors: (not|holds|made|no) "):
            KINDS[kind][1](tmp_path / "other.safetensors")


@pytest.mark.parametrize("kind", ["lazy", "head"])
def test_facts_that_are_missing_or_nonsense_are_refused(tmp_path, kind):
    write, read = KINDS[kind]
    path = tmp_path / "file.safetensors"
    write(path)
    tensors, facts = read_tensors(path)
    harmless = {"upfeat_version", "kind", "upsampler"} if kind == "head" else {"upfeat_version"}
    for name in facts:
        for value in (None, "", "[", "3", "[1]", '{"a": NaN}', "[" * 5000):
            kept = {key: one for key, one in facts.items() if key != name}
            write_tensors(path, tensors, kept if value is None else {**kept, name: value})
            if name in harmless or (kind == "lazy" and name == "normalization" and value is None):
                continue
            with pytest.raises(ValueError, match=r"file\.safetensors") as raised:
                read(path)
            assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight", torch.eye(3), r"weight is \(3, 3\), not \(4, 4\)"),
        ("bias", torch.zeros(3), r"bias is \(3,\)"),
        ("bias", torch.full((4,), torch.nan), "bias holds NaN"),
        ("weight", torch.eye(4).long(), "weight holds"),
    ],
)
def test_translations_whose_tensors_do_not_fit_are_refused(tmp_path, name, value, words):
    path = tmp_path / "t.safetensors"
    _translation(path)
    tensors, facts = read_tensors(path)
    write_tensors(path, {**tensors, name: value}, facts)
    with pytest.raises(ValueError, match=rf"t\.safetensors: .*{words}"):
        Translation.load(path, BACKBONE)


def test_metadata_of_strangers_is_never_trusted(tmp_path):
    path = tmp_path / "file"
    for content in (
        b"",
        b"\xff" * 8,
        (1 << 62).to_bytes(8, "little"),
        b"[" * 60,
        b"\2" + b"\0" * 7,
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="file: not a safetensors file"):
            read_metadata(path)
    deep = b"[" * 100_000
    path.write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(ValueError, match="file: not a safetensors file"):
        read_metadata(path)
    path.write_bytes((24).to_bytes(8, "little") + b'{"__metadata__": [1, 2]}')
    assert read_metadata(path) == {}


def _state(step, weight):
    objectives = {"one": {"weight": torch.full((3,), weight)}}
    return {"step": step, "objectives": objectives, "optimizer": {}, "best": {}, "stale": 0}


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.newest() is None
    for step in range(1, 6):
        checkpoints.write(_state(step, float(step)))
    assert [path.name[5:13] for path in checkpoints.paths()] == ["00000003", "00000004", "00000005"]
    *_, before, newest = checkpoints.paths()
    content = newest.read_bytes()
    for cut in (0, 1, 30, len(content) // 2, len(content) - 30, len(content) - 1):
        newest.write_bytes(content[:cut])
        with pytest.warns(UserWarning, match=f"{newest.name}: damaged"):
            state = checkpoints.newest()
        assert state is not None
        assert state["step"] == 4
    flipped = content.replace(torch.tensor(5.0).numpy().tobytes(), b"\0\0\0\1")
    assert flipped != content
    newest.write_bytes(flipped)
    with pytest.warns(UserWarning, match="damaged .the checksum of its part"):
        assert checkpoints.newest()["step"] == 4  # pyright: ignore[reportOptionalSubscript]
    torch.save({"format": FORMAT, **_state(5, torch.nan)}, newest)
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoints.newest()["step"] == 4  # pyright: ignore[reportOptionalSubscript]
    for path in (before, newest, checkpoints.paths()[0]):
        path.write_bytes(b"no archive")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="all 3 checkpoints are damaged; remove the run's folder"),
    ):
        checkpoints.newest()
