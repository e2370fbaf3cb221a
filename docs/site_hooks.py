"""Hooks of the documentation's site: pages that lie elsewhere in the repository, and tables of it.

Documents link to files by relative paths, as GitHub shows them. Where such a path leads out of
``docs/``, the site gets a page of that file under ``repository/`` and the link leads there; so do
links of the README and its neighbours, which are pages of the site as well.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

log = get_plugin_logger("site")
DOCS = Path(__file__).parent
ROOT = DOCS.parent
SHELF = "repository"
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
_LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"^(`{3,}).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_BUILT = re.compile(r"<!-- built: (\w+) -->")
_ROLE = re.compile(r":(?:func|meth|class|data|attr|mod|exc):<code>[~.]?")
_OUTSIDE = re.compile(r"""<(?:script|img|link)\b[^>]*?\b(?:src|href)=["']?(https?:[^"'\s>]+)""")
_LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".sh": "sh", ".cpp": "cpp"}
_COPIED = {".json", ".jpg", ".png", ".svg", ".ipynb", ".tif"}


def site_place(path: Path) -> str:
    """Where the site has a file of the repository: a path below its root."""
    if path.is_relative_to(DOCS) and path.suffix != ".py" and path.is_file():
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return f"{SHELF}/{name}/contents.md"
    return f"{SHELF}/{name}" if path.suffix in {".md", *_COPIED} else f"{SHELF}/{name}.md"


def linked(text: str, path: Path) -> list[Path]:
    """Files of the repository that a document links to."""
    targets = (path.parent / match[2] for match in _LINK.finditer(_FENCE.sub("", text)))
    return [target.resolve() for target in targets if target.exists()]


def relinked(text: str, path: Path) -> str:
    """A document with its links as the site has them."""
    folder = posixpath.dirname(site_place(path))

    def lead(match: re.Match[str]) -> str:
        target = (path.parent / match[2]).resolve()
        if not target.exists():
            return match[0]  # reported by the build
        return match[1] + posixpath.relpath(site_place(target), folder or ".") + match[3]

    parts, last = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(lead, text[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join(parts) + _LINK.sub(lead, text[last:])


def shown(path: Path) -> str:
    """The page of a file or folder that is no document: its text, or what it contains."""
    name = path.relative_to(ROOT).as_posix()
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n"
    if path.is_dir():
        files = sorted(one.name for one in path.iterdir() if one.is_file())
        return head + "\n".join(f"* [{one}]({one})" for one in files)
    language = _LANGUAGES.get(path.suffix, "text")
    return f"{head}``````{language}\n{path.read_text(encoding='utf-8')}\n``````\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give pages that the navigation does not name a place at the end of their folder's section."""
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    sections = {title: pages for entry in config.nav or [] for title, pages in entry.items()}
    for page in sorted(DOCS.rglob("*.md")):
        place = page.relative_to(DOCS).as_posix()
        if place not in named:
            heading = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            folder = place.partition("/")[0]
            sections[folder.capitalize() if "/" in place else "Project"].append({heading: place})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of ``docs/`` that documents lead to."""
    waiting = [ROOT / name for name in ALWAYS]
    for page in files.documentation_pages():
        waiting += linked(page.content_string, DOCS / page.src_uri)
    known = {file.src_uri for file in files}
    while waiting:
        path = waiting.pop()
        place = site_place(path)
        if place in known or (path.is_relative_to(DOCS) and path.suffix != ".py"):
            continue
        known.add(place)
        if path.suffix in _COPIED:
            files.append(File.generated(config, place, abs_src_path=str(path)))
            continue
        text = path.read_text(encoding="utf-8") if path.suffix == ".md" else shown(path)
        inner = path / "contents.md" if path.is_dir() else path
        waiting += linked(text, inner)
        files.append(File.generated(config, place, content=relinked(text, inner)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links of documents to the site's pages, and build what only the site shows."""
    if page.file.generated_by:
        return markdown
    markdown = relinked(markdown, DOCS / page.file.src_uri)
    return _BUILT.sub(lambda match: BUILT[match[1]](), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show roles of docstrings (``:func:`` and the like) as the code they mark."""
    return _ROLE.sub("<code>", html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Take the worker of the search from the site itself, not from outside."""
    place = posixpath.relpath("site_worker.js", posixpath.dirname(page.url) or ".")
    return _kept_inside(output, place, page.file.src_uri)


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """Likewise of pages that no document makes: 404.html, whose addresses begin at the root."""
    root = urlsplit(config.site_url or "/").path
    return _kept_inside(output, posixpath.join(root, "site_worker.js"), template_name)


def _kept_inside(output: str, worker: str, name: str) -> str:
    output = output.replace("https://unpkg.com/iframe-worker/shim", worker)
    for address in _OUTSIDE.findall(output):
        log.warning("%s would be fetched from outside by %s", address, name)
    return output


def commands() -> str:
    """Every command with its arguments, from the parsers."""
    from upfeat.cli.main import COMMANDS, build_parser

    parsers = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    return "\n".join(_command(name, parsers[name], COMMANDS[name].EXAMPLE) for name in COMMANDS)


def _command(name: str, parser: ArgumentParser, example: str) -> str:
    lines = [f"## upfeat {name}", "", f"{parser.description}", ""]
    lines += ["```sh", dedent(example).strip(), "```", "", "| argument | |", "| --- | --- |"]
    for action in parser._actions:
        if action.help in (None, "==SUPPRESS==") or "--help" in action.option_strings:
            continue
        words = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        if action.option_strings and action.nargs != 0:
            values = "|".join(map(str, action.choices or ())) or action.metavar or action.dest
            words += f" {str(values).upper() if not action.choices else values}"
        words = words.replace("|", "&#124;").replace("<", "&lt;")  # escapes stay visible in code
        text = (action.help or "").replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| <code>{words}</code> | {text % vars(action) if '%(' in text else text} |")
    return "\n".join([*lines, ""])


BUILT = {"commands": commands}
