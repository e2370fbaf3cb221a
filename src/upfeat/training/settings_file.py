"""Files of settings: YAML or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upfeat.optional import import_optional
from upfeat.strict_json import LARGEST as LARGEST_FILE
from upfeat.strict_json import read_object


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of settings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not contain settings, or PyYAML is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = _parse(path)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not settings (name: value)")
    return content


def _parse(path: Path) -> Any:
    if path.suffix.lower() == ".json":
        return read_object(path)
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: larger than {LARGEST_FILE >> 10} KiB, so it holds no settings")
    text = path.read_text(encoding="utf-8")
    yaml = import_optional(
        "yaml",
        f'{path}: reading YAML needs PyYAML; pip install "upfeat[train]", or give a .json file',
    )

    class Loader(yaml.SafeLoader):
        """Loader that refuses a name that is given twice, of which YAML would keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for name in names:
                if names.count(name) > 1:
                    raise yaml.YAMLError(f"{name} is given twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError(f"{path}: not YAML of ours (nested too deeply)") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
