"""What documents show runs: their Python, their commands, docstrings' examples, and names in prose.

Costs are cut and nothing else: trainings and fits are given tiny settings
beside those shown (``CUT_TRAINING``, ``CUT_FIT``), commands the flags of ``CUTS``; those of
``PARSED`` are only parsed.
"""

import ast
import dataclasses
import doctest
import importlib
import pkgutil
import re
import sys
import types
from pathlib import Path

import documents
import pytest

import upfeat
from upfeat.cli import main
from upfeat.cli.main import COMMANDS, build_parser
from upfeat.evaluation import harness
from upfeat.training.config import TrainConfig
from upfeat.training.settings_file import read_settings
from upfeat.upsamplers.base import UPSAMPLERS

SOURCE = Path(upfeat.__file__).parent
CUT_TRAINING = {
    "steps": 1,
    "batch_size": 1,
    "views": 1,
    "size": 64,
    "source_size": None,
    "validation_images": 0,
}
CUT_FIT = {"views": 2, "held_out": 2, "anchors": 32, "zoomed_views": 0}
CUTS = {
    "train": "--steps 1 --batch-size 1 --views 1 --size 64 --source-size none "
    "--validation-images 0 --accumulate 1",
    "fit": "--views 2 --size 32",
    "render": "--size 40x32",
}
PARSED = {
    "eval": "needs data sets and minutes",
    "compare": "needs results of eval",
    "bench": "measures for minutes",
    "probe": "needs labels",
    "export": "traces for a minute",
    "demo": "serves until it is stopped",
    "video": "needs a video",
    "raster": "needs georeferenced data",
}
OUTSIDE = ("pip", "make", "cd", "export", "git", "python", "torchrun")


def page_name(path):
    return str(path.relative_to(documents.ROOT))


@pytest.fixture
def furnished(tmp_path, monkeypatch, torchvision_operators):
    """A folder with what documents speak of, and trainings and fits that cost little."""
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("page")  # so that classes of a page can be pickled
    documents.furnish(tmp_path)
    monkeypatch.setitem(sys.modules, "page", page)
    train, fit_implicit = upfeat.train, upfeat.fit_implicit

    def cut_train(backbone, photos, config=None, **options):
        config = dataclasses.replace(config or upfeat.TrainConfig(), **CUT_TRAINING)
        return train(backbone, photos, config, **options)

    def cut_fit(image, backbone, config=None, **settings):
        return fit_implicit(image, backbone, config, **{**settings, **CUT_FIT})

    monkeypatch.setattr(upfeat, "train", cut_train)
    monkeypatch.setattr(upfeat, "fit_implicit", cut_fit)
    registered = dict(UPSAMPLERS)
    yield vars(page)
    for name in set(UPSAMPLERS) - set(registered):  # what a page has added
        del UPSAMPLERS[name]


def parse(arguments):
    """Parse the words after ``upfeat``; ``None`` for --help and --version."""
    try:
        return build_parser().parse_args(arguments)
    except SystemExit as left:
        if left.code:
            raise ValueError(f"upfeat {' '.join(arguments)} is refused") from None
        return None


def check_command(words, place):
    """Run or parse one line of a shell block."""
    if words[0] == "torchrun" or words[:3] == ["python", "-m", "upfeat"]:
        words = words[words.index("-m") + 1 :]
        parse(words[1:])
        return
    if words[0] != "upfeat":
        check_outside(words, place)
        return
    options = parse(words[1:])
    if options is None or options.command in PARSED:
        return
    # Of flags given twice the last one counts.
    code = main([*words[1:], *CUTS.get(options.command, "").split()])
    assert code == 0, f"{place}: {' '.join(words)} ends with {code}"


def check_outside(words, place):
    """Other programs are not run; what they are told exists."""
    assert words[0] in OUTSIDE, f"{place}: {words[0]} is not a program that documents use"
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        known = re.findall(r"^([\w-]+):", (documents.ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(targets) <= set(known), f"{place}: {targets}"
    if words[0] == "python":
        assert (documents.ROOT / words[1]).is_file(), f"{place}: {words[1]}"


def check_block(block, page, names):
    place = f"{page_name(page)}:{block.line}"
    if block.language == "python":
        code = "\n" * (block.line - 1) + block.code  # so that errors name the page's lines
        exec(compile(code, str(page), "exec"), names)
    elif block.language in ("sh", "bash", "console"):
        for words in documents.command_lines(block.code):
            check_command(words, place)
    elif block.language in ("yaml", "json"):
        path = Path(f"settings.{block.language}")
        path.write_text(block.code)
        settings = read_settings(path)
        settings.pop("backbone", None)
        TrainConfig.from_mapping(settings)
    else:
        pytest.fail(f'{place}: a block of "{block.language}"; say python, sh, yaml or json')


def test_blocks_are_found_with_their_places():
    text = (
        "a\n\n    upfeat info\n\n<!-- needs: timm -->\n```python\nx = 1\n```\n\n    not a command\n"
    )
    assert documents.blocks(text) == [
        documents.Block("sh", "    upfeat info\n", 3),
        documents.Block("python", "x = 1\n", 7, ("timm",)),
    ]
    assert documents.command_lines("upfeat a \\\n  b   # c\n\n# d\n") == [["upfeat", "a", "b"]]


@pytest.mark.parametrize("page", documents.PAGES, ids=page_name)
def test_blocks_of_a_page_run(page, furnished):
    for block in documents.blocks(page.read_text()):
        if all(importlib.util.find_spec(module) for module in block.needs):
            check_block(block, page, furnished)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_are_commands(name):
    for words in documents.command_lines(COMMANDS[name].EXAMPLE):
        check = words[words.index("-m") + 1 :] if "-m" in words else words
        assert check[0] == "upfeat"
        parse(check[1:])


def modules():
    """Modules whose docstrings hold examples."""
    for found in pkgutil.walk_packages([str(SOURCE)], "upfeat."):
        path = SOURCE.parent / Path(*found.name.split("."))
        path = path / "__init__.py" if found.ispkg else path.with_suffix(".py")
        if path.is_file() and ">>>" in path.read_text():
            yield found.name
    yield "upfeat"


@pytest.mark.parametrize("name", sorted(modules()))
def test_examples_of_docstrings(name, furnished):
    result = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL,
    )
    assert result.attempted
    assert not result.failed


def spans(page):
    """Code in the prose of a page, with its line."""
    text = documents._FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())
    for match in re.finditer(r"`([^`\n]+(?:\n[^`\n]+)?)`", text):
        yield " ".join(match[1].split()), text.count("\n", 0, match.start()) + 1


def known_flags():
    """Flags by command."""
    parsers = build_parser()._subparsers._group_actions[0].choices
    return {name: set(parser._option_string_actions) for name, parser in parsers.items()}


@pytest.mark.parametrize("page", documents.PAGES, ids=page_name)
def test_names_in_prose_exist(page):
    flags = known_flags()
    for span, line in spans(page):
        place = f"{page_name(page)}:{line}: {span}"
        if (page.parent / span).exists():
            continue
        for path in re.findall(r"(?<![\w.])upfeat((?:\.[A-Za-z_]\w*)+)", span):
            value = upfeat
            for name in path[1:].split("."):
                assert hasattr(value, name), place
                value = getattr(value, name)
        if match := re.match(r"upfeat ([a-z]+)\b", span):
            assert match[1] in COMMANDS, place
            for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", span):
                assert flag in flags[match[1]], place


@pytest.mark.parametrize("page", documents.PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), target


def messages():
    """Text that the package may show: every string that is no statement of its own."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if text and id(node) not in alone:
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", node.value


def test_hints_name_what_there_is():
    """Commands, flags, extras and functions that messages speak of."""
    flags = set.union(*known_flags().values()) | {"--version", "--nproc-per-node"}
    extras = re.search(
        r"\[project\.optional-dependencies\]\n(.*?)\n\[",
        (documents.ROOT / "pyproject.toml").read_text(),
        re.DOTALL,
    )
    extras = set(re.findall(r"^(\w+) =", extras[1], re.MULTILINE))
    for place, text in messages():
        shown = f"{place}: {text}"
        for command in re.findall(r"\bupfeat ([a-z]+) (?=-)", text):
            assert command in COMMANDS, shown
        for flag in re.findall(r"(?:^|(?<=[\s'\"]))--[a-z][a-z-]*[a-z](?![\w:])", text):
            assert flag in flags, shown
        for extra in re.findall(r"upfeat\[(\w+)\]", text):
            assert extra in extras, shown
        for name in re.findall(r"\bupfeat\.([A-Za-z_]\w*)\(", text):
            assert hasattr(upfeat, name), shown


def test_the_readme_knows_every_command():
    readme = (documents.ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"upfeat {name}" not in readme] == []


def test_settings_of_a_fit_are_documented_with_their_defaults():
    page = (documents.ROOT / "docs" / "guides" / "implicit.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page, re.MULTILINE))
    fields = dataclasses.fields(upfeat.FitConfig)
    assert rows.keys() == {field.name for field in fields}
    for field in fields:
        assert ast.literal_eval(rows[field.name]) == field.default, field.name


def test_settings_of_a_training_are_documented():
    page = (documents.ROOT / "docs" / "guides" / "training.md").read_text()
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"\w+", cell)}
    missing = {field.name for field in dataclasses.fields(TrainConfig)} - names - {"out"}
    assert not missing


def test_every_docstring_of_a_configuration_names_its_fields():
    for config in (upfeat.FitConfig, upfeat.TrainConfig):
        for field in dataclasses.fields(config):
            assert re.search(rf"^ +{field.name}: ", config.__doc__, re.MULTILINE), field.name


def test_baselines_of_evaluations_are_documented():
    page = (documents.ROOT / "docs" / "guides" / "evaluation.md").read_text()
    listed = ", ".join(f"`{name}`" for name in harness.BASELINES)
    assert f"the baselines ({listed})" in " ".join(page.split())


def test_first_lines_are_imperatives_or_noun_phrases():
    questions = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            # Of modules, classes and functions, and below attributes.
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                first = str(node.value.value).strip().partition("\n")[0]
                if re.match(r"(What|How|Whether|Why|Where|Which|Who)\b", first):
                    questions.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {first}")
    assert not questions
