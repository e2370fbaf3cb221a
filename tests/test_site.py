"""The documentation's site: what it names, how its links lead, the pictures it shows."""

import re
import types
from importlib import import_module

import documents
import pytest

import upfeat

DOCS = documents.ROOT / "docs"


@pytest.fixture(scope="module")
def from_docs():
    """Modules of the site's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        yield import_module


@pytest.fixture(scope="module")
def hooks(from_docs):
    pytest.importorskip("mkdocs", reason='pip install "upfeat[docs]"')
    return from_docs("site_hooks")


def test_the_reference_has_every_public_name():
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    listed = set(re.findall(r"^::: upfeat\.(\w+)$", pages, re.MULTILINE))
    assert set(upfeat.__all__) - listed <= {"__version__"}


def test_every_page_has_its_place_in_the_site(hooks):
    config = types.SimpleNamespace(nav=[{"Home": "README.md"}])
    config.nav += [{name: []} for name in ("Start", "Concepts", "Guides", "Reference")]
    config.nav += [{"Evidence": []}, {"Project": []}]
    hooks.on_config(config)
    shown = str(config.nav)
    for page in DOCS.rglob("*.md"):
        assert f"'{page.relative_to(DOCS).as_posix()}'" in shown, page


def test_links_lead_to_the_site_s_own_pages(hooks):
    page = DOCS / "evidence" / "results.md"
    text = "[a](../../src/upfeat/scales.py), [b](../guides/text.md#x), [c](../../benchmarks)\n"
    fenced = "```python\nx = y[0](../../README.md)\n```\n"
    assert hooks.relinked(text + fenced, page) == (
        "[a](../repository/src/upfeat/scales.py.md), [b](../guides/text.md#x), "
        "[c](../repository/benchmarks/contents.md)\n" + fenced
    )
    readme = hooks.relinked("![p](docs/images/coffee.jpg) [q](LICENSE)", documents.ROOT / "a.md")
    assert readme == "![p](../images/coffee.jpg) [q](LICENSE.md)"


def test_nothing_is_fetched_from_outside(hooks):
    script = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
    config, page = types.SimpleNamespace(site_url=""), types.SimpleNamespace(url="guides/text.html")
    page.file = types.SimpleNamespace(src_uri="guides/text.md")
    inside = hooks.on_post_page(script, page, config)
    assert inside == '<script src="../site_worker.js"></script>'
    inside = hooks.on_post_template(script, "404.html", config)
    assert inside == '<script src="/site_worker.js"></script>'


def test_commands_are_described_by_their_parsers(hooks):
    text = hooks.commands()
    assert all(f"\n## upfeat {name}\n" in f"\n{text}" for name in ("run", "train", "demo"))


def test_pictures_are_drawn(from_docs):
    pictures = from_docs("pictures")
    scene = pictures.Scene(64)
    for draw in (pictures.views, pictures.weights, pictures.zoom):
        assert draw(scene).width > 200
    shown = {f"../images/{name}.jpg" for name in pictures.PICTURES}
    pages = "\n".join(page.read_text() for page in (DOCS / "concepts").glob("*.md"))
    assert all(f"({name})" in pages for name in shown)


def test_the_diagram_leaves_out_what_follows(from_docs):
    diagram = from_docs("diagram")
    edges = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert diagram.reduced(edges) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert diagram.levels(edges) == [["c"], ["b"], ["a"]]
