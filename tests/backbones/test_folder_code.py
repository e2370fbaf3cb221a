"""Code in folders of transformers' models is never run, whatever the terminal answers."""

import json
from functools import partial

import pytest

import upfeat
from upfeat.text import load_text_backbone

pytest.importorskip("transformers")

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import PretrainedConfig, PreTrainedModel
class Config(PretrainedConfig):
    model_type = "unheard_of"
class Model(PreTrainedModel):
    config_class = Config
"""
CONFIGS = {
    "an unknown kind": {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
    },
    "a known kind without a model": {
        "model_type": "encoder-decoder",
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "bert"},
        "architectures": ["Unheard"],
        "auto_map": {"AutoModel": "code.Model"},
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("load", ["backbone", "text"])
def test_code_of_a_folder_is_not_run(tmp_path, monkeypatch, kind, pretrained, load):
    """transformers asks on the terminal, or whatever is piped into the program, by default."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    for variable in ("HF_HOME", "HF_MODULES_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    (folder / "code.py").write_text(CODE)
    (folder / "model.safetensors").touch()
    make = partial(upfeat.load_backbone, pretrained=pretrained)
    with pytest.raises(ValueError) as refused:
        (load_text_backbone if load == "text" else make)(f"hf:{folder}")
    assert not asked
    assert not list(tmp_path.rglob("ran"))
    message = str(refused.value)
    assert message.startswith(f"hf:{folder}: ")
    assert "\n" not in message
    if kind == "an unknown kind":
        assert "is code of its own, which is not run; if you trust it" in message
