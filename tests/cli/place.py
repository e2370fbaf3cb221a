"""A folder with one of everything that commands read, and a backbone that takes no time."""

import torch
from evaluation.scenes import write_scene
from implicit.test_features import make_features
from published_reference import published_state

import upfeat

MINE = """
import torch
import upfeat

def make():
    return upfeat.load_backbone(lambda x: torch.nn.functional.avg_pool2d(x, 8), name="mine")
"""


def write_place(root):
    for split, seeds in (("train", (0, 1)), ("test", (2,))):
        for seed in seeds:
            write_scene(root / "data" / split, f"s{seed}", seed)
            write_scene(root / "labelled", f"s{seed}", seed)
    for name in ("data", "labelled"):
        (root / name / "classes.json").write_text('["ground", "box", "disc"]')
    (root / "empty").mkdir()
    (root / "photo.png").write_bytes((root / "data" / "train" / "images" / "s0.png").read_bytes())
    (root / "text.txt").write_text("text")
    (root / "mine.py").write_text(MINE)
    torch.manual_seed(0)
    torch.save(published_state(upfeat.NAF()), root / "naf.pth")
    upfeat.JointBilateral().save_pretrained(root / "own")
    make_features().save(root / "f.safetensors")
    return root
