"""Names of code: computed from imports, changed by every line that decides a result."""

import ast
import shutil

import pytest

import upfeat
from upfeat import provenance


def names(*modules):
    return {path.relative_to(provenance._PACKAGE).as_posix() for path in source_files(*modules)}


source_files = provenance.source_files


def test_what_decides_a_score_is_found_by_its_imports():
    found = names("upfeat.evaluation.harness", "upfeat.evaluation.tasks.seg")
    assert {"implicit/anchors.py", "evaluation/tasks/seg.py", "upsamplers/jbu.py"} <= found
    assert "backends/triton/window.py" in found  # imported by name, when a kernel starts
    assert "upsamplers/featup_checkpoint.py" in found  # imported in a function
    assert not {name for name in found if name.startswith(("cli/", "training/"))}
    assert "evaluation/report/page.py" not in found  # shows scores, decides none


@pytest.mark.parametrize("changed", ["implicit/anchors.py", "views.py", "evaluation/metrics.py"])
def test_older_code_is_not_mistaken(changed, tmp_path, monkeypatch):
    copy = tmp_path / "upfeat"
    shutil.copytree(provenance._PACKAGE, copy, ignore=shutil.ignore_patterns("weights", "*.so"))
    monkeypatch.setattr(provenance, "_PACKAGE", copy)
    plain = provenance.source_digest.__wrapped__
    before = plain("upfeat.evaluation.tasks.seg")
    assert plain("upfeat.evaluation.tasks.seg") == before
    path = copy / changed
    path.write_text(path.read_text() + "# changed\n")
    assert plain("upfeat.evaluation.tasks.seg") != before


def test_cached_fits_are_keyed_by_code_and_weights(monkeypatch):
    from upfeat.evaluation import methods

    backbone = upfeat.load_backbone("efficientnet_lite0")
    first = methods.ImplicitMethod(backbone).weights
    assert methods.ImplicitMethod(backbone).weights == first
    monkeypatch.setattr(methods, "source_digest", lambda *modules: "older")
    assert methods.ImplicitMethod(backbone).weights != first


def test_upsamplers_are_told_apart():
    first, second = (upfeat.JointBilateral(radius=radius) for radius in (1, 2))
    found = {provenance.identify_upsampler(each) for each in (first, second, upfeat.Nearest())}
    assert len(found) == 3


class Own(upfeat.Nearest):
    """As a user's own class: its file counts."""


def test_classes_of_other_files_are_known_by_their_content(monkeypatch):
    before = provenance.identify_upsampler(Own())
    monkeypatch.setattr(provenance, "_source", lambda cls: b"edited")
    assert provenance.identify_upsampler(Own()) != before


def test_imports_are_found_as_parsing_finds_them():
    for path in sorted(provenance._PACKAGE.rglob("*.py")):
        names = []
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                parts = [f"{node.module}.{alias.name}" for alias in node.names]
                names += [part if provenance._file(part) else node.module for part in parts]
            elif isinstance(node, ast.Constant) and str(node.value).startswith("upfeat."):
                names += provenance._matching(str(node.value))
        files = [
            {provenance._file(name) for name in some} - {None}
            for some in (names, provenance._mentioned(path))
        ]
        assert files[0] == files[1], path
