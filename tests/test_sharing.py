"""Upsamplers on the hub: by its own mixin against a stub, and the card that goes along."""

import json

import pytest

import upfeat
from upfeat.sharing import model_card, read_record

hub = pytest.importorskip("huggingface_hub")


class Api:
    """What is asked of the hub, and a copy of what is uploaded."""

    asked = None

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, private, exist_ok):
        Api.asked = {"repo_id": repo_id, "private": private, "token": self.token}
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, folder_path, **options):
        Api.asked |= options
        Api.files = {path.name: path.read_bytes() for path in sorted(folder_path.iterdir())}
        return "https://hub/commit"


@pytest.fixture
def api(monkeypatch):
    import huggingface_hub.hub_mixin

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    return Api


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "x" / "upsampler"
    folder.mkdir(parents=True)
    record = {"config": {"steps": 900, "out": str(tmp_path / "runs")}, "versions": {"torch": "2"}}
    (folder / "training.json").write_text(json.dumps(record))
    return tmp_path / "runs" / "x"


def test_what_is_pushed_loads_again(api, run, tmp_path):
    upsampler = upfeat.NeighbourhoodUpsampler(query_dim=8, levels=2).eval()
    url = upsampler.push_to_hub("me/mine", run=run, private=True, token="t", branch="next")
    assert url == "https://hub/commit"
    assert api.asked["repo_id"] == "me/mine"
    assert api.asked["private"] is True
    assert api.asked["token"] == "t"
    assert api.asked["revision"] == "next"
    assert set(api.files) == {"README.md", "config.json", "model.safetensors"}
    card = api.files["README.md"].decode()
    assert 'load_upsampler("me/mine")' in card
    assert "| config.steps | 900 |" in card
    assert str(tmp_path) not in card  # where it lay is nobody's business
    for name, content in api.files.items():
        (tmp_path / name).write_bytes(content)
    again = upfeat.NeighbourhoodUpsampler.from_pretrained(tmp_path)
    assert again.config() == upsampler.config()


def test_card_is_for_machines_too():
    card = model_card({"upsampler": "detail", "embed_dim": 112}, {}, "me/mine")
    data = hub.ModelCard(card).data
    assert data.library_name == "upfeat"
    assert "feature-upsampling" in data.tags
    assert "features of 112 channels" in card
    assert "Training" not in card


def test_refusals(api, tmp_path, monkeypatch):
    upsampler = upfeat.Bilinear()
    with pytest.raises(ValueError, match="repo_id='mine' must be owner/name"):
        upsampler.push_to_hub("mine")
    with pytest.raises(FileNotFoundError, match=r"holds no training\.json"):
        read_record(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'upfeat\[hub\]'"):
        upsampler.push_to_hub("me/mine")
