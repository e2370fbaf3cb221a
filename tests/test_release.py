"""What a release promises: hashes of the weights, one version, lower bounds that are tested."""

import hashlib
import re

import documents

import upfeat

PROJECT = (documents.ROOT / "pyproject.toml").read_text()
WEIGHTS = documents.ROOT / "src" / "upfeat" / "weights"


def test_hashes_are_those_of_the_weights():
    lines = (WEIGHTS / "SHA256SUMS").read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    found = {
        path.relative_to(WEIGHTS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in WEIGHTS.rglob("*.safetensors")
    }
    assert listed == found, "docs/releasing.md says how SHA256SUMS is written"


def test_lower_bounds_are_those_of_the_minimum_job():
    core = PROJECT.partition("\ndependencies = [")[2].partition("\n]")[0]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', core))
    text = (documents.ROOT / "constraints-minimum.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, re.MULTILINE))
    assert pinned.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pinned[name]), name


def test_the_version_stands_in_one_place():
    citation = (documents.ROOT / "CITATION.cff").read_text()
    changes = (documents.ROOT / "CHANGELOG.md").read_text()
    version = upfeat.__version__
    released = version.partition(".dev")[0]
    assert f"\nversion: {released}\n" in citation or "dev" in version
    assert f"## [{released}]" in changes or "## [Unreleased]" in changes
