"""Tables of the documents that are made from benchmarks and code: none has drifted."""

import importlib.util
import re

import documents
import pytest


@pytest.fixture(scope="module")
def generate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(documents.ROOT / "docs")  # as a script has its own folder
        yield loaded()


def loaded():
    place = documents.ROOT / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_page_has_drifted(generate, capsys):
    code = generate.main(["--check"])
    assert code == 0, f"run python docs/generate.py: {capsys.readouterr().out}"


def test_drift_is_found(generate, monkeypatch):
    page = documents.ROOT / "docs" / "evidence" / "performance.md"
    text = page.read_text()
    assert generate.generated(text) == text
    read = generate._read

    def slower(name):
        data = read(name)
        for row in data.get("measurements", ()):
            row["seconds"] *= 2
        return data

    monkeypatch.setattr(generate, "_read", slower)
    assert generate.generated(text) != text


def test_hours_on_measured_cores_are_those_by_the_clock(generate):
    found = generate._read("extract")
    rate = found["rates"]["lazy"]["images_per_second"]
    line = next(line for line in generate.extract_cost().splitlines() if "`lazy`" in line)
    assert line.split(" | ")[2:4] == [
        f"{1e6 / rate / 3600:.1f} h",
        f"{1e6 / rate / 3600 * found['threads'] / 64:.2f} h",
    ]


@pytest.fixture(scope="module")
def figures(generate):
    return generate.figures


def test_a_figure_in_a_sentence_is_written(figures):
    page = 'It is <!-- = data("probes")["x"]:.1f -->1.0<!-- / -->.'
    names = {"x": 2.04}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "data", lambda name: names)
        assert figures.filled(page) == page.replace(">1.0<", ">2.0<")
        names["x"] = -3
        assert "−3.0" in figures.filled(page)
        names["x"] = -0.04
        assert figures.filled(page) == page.replace(">1.0<", ">0.0<")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-0.0", "0.0"),
        ("+0.0 / −0.1", "0.0 / −0.1"),
        ("-0.04", "−0.04"),
        ("+0", "0"),
        ("2.5e-6", "2.5e−6"),
    ],
)
def test_a_figure_that_rounds_to_zero_has_no_sign(figures, text, expected):
    assert figures.plain(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n  <!-- = 1 -->1<!-- / -->", "a line begins with a figure"),
        ("a <!-- = data('nothing')['x'] --><!-- / -->", "fails"),
        ("a <!-- = probe('Lite', 'own', 'bilinear') --><!-- / -->", "tables of probes.json"),
    ],
)
def test_a_figure_that_cannot_be_written_is_refused(figures, text, message):
    with pytest.raises(ValueError, match=message):
        figures.filled(text)


def test_every_setting_has_a_row(generate):
    from upfeat.training.config import TrainConfig

    table = generate.settings("upfeat.training.config.TrainConfig")
    assert all(f"| `{name}` |" in table for name in TrainConfig.__dataclass_fields__)


def test_no_table_of_figures_is_typed_by_hand(generate):
    for page in (documents.ROOT / "docs" / "evidence").glob("*.md"):
        rest = generate._BLOCK.sub("", page.read_text())
        assert re.findall(r"^\|.*\d.*\d.*\|$", rest, re.MULTILINE) == [], page.name


# A number and a unit of time, memory or accuracy; and what is no measurement but a limit, a setting
# or somebody else's published figure.
_MEASURED = re.compile(r"\d[\d.,]* ?(?:ms|s|seconds|minutes|hours|[KMGT]i?B|%|points)(?!\w)")
_NOT_MEASURED = {
    "csrc/README.md": {"1.6 MB", "8 MiB"},
    "docs/guides/demo.md": {"16 MiB", "20 minutes"},
    "docs/guides/evaluation.md": {"95 %", "0.75 %"},
    "docs/guides/implicit.md": {"1 %"},
    "docs/guides/published.md": {"56 ms", "1.8 GB"},
    "docs/guides/rasters.md": {"134 MB"},
    "docs/releasing.md": {"6 MB"},
}


@pytest.mark.parametrize(
    "name", [page.relative_to(documents.ROOT).as_posix() for page in documents.PAGES]
)
def test_no_figure_is_typed_by_hand(generate, figures, name):
    page = documents.ROOT / name
    text = figures._FIGURE.sub("", generate._BLOCK.sub("", page.read_text()))
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    typed = {match[0] for match in _MEASURED.finditer(prose)} - _NOT_MEASURED.get(name, set())
    assert typed == set(), "docs/figures.py says how a sentence gets its figures"
