"""Upload of saved upsamplers to the Hugging Face hub, and the model card in their folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from upfeat._version import __version__
from upfeat.bounds import shown
from upfeat.optional import import_optional
from upfeat.storage import write_bytes
from upfeat.strict_json import read_object

CARD_FILE = "README.md"
RECORD_FILE = "training.json"
"""File in the folder of weights with the record of their training."""

_TAGS = ("upfeat", "feature-upsampling", "image-feature-extraction")


def push_to_hub(
    save: Callable[[Path], None],
    config: Mapping[str, Any],
    run: str | Path | None,
    repo_id: str,
    /,
    **options: Any,
) -> str:
    """Upload a saved folder to the hub, by :class:`huggingface_hub.ModelHubMixin`.

    Args:
        save: function that writes the upsampler's files to a folder.
        config: configuration of the upsampler, for :func:`model_card`.
        run: folder of the training that made the upsampler; ``None`` for none.
        repo_id: name of the repository, "owner/name".
        **options: options of ``ModelHubMixin.push_to_hub``: ``commit_message``, ``private``,
            ``token``, ``branch``, ``create_pr``, and patterns of files.

    Returns:
        The URL of the commit.

    Raises:
        FileNotFoundError: ``run`` is not the folder of a training.
        ValueError: huggingface_hub is not installed, or ``repo_id`` is not "owner/name".
        OSError: the hub cannot be reached, or refuses the upload.
    """
    record = {} if run is None else read_record(Path(run))
    hub = import_optional(
        "huggingface_hub",
        "huggingface_hub is not installed: pip install 'upfeat[hub]' (or pip install "
        "huggingface_hub)",
    )
    owner, _, name = repo_id.partition("/")
    if not (owner and name) or "/" in name:
        raise ValueError(f"repo_id={shown(repo_id)} must be owner/name")

    class Shared(hub.ModelHubMixin):
        def _save_pretrained(self, save_directory: Path) -> None:
            save(Path(save_directory))
            card = model_card(config, record, repo_id)
            write_bytes(Path(save_directory, CARD_FILE), card.encode())

    return str(Shared().push_to_hub(repo_id, **options))


def read_record(run: Path) -> dict[str, Any]:
    """Read the record of a training from its folder, or from the folder ``upsampler`` in it.

    Raises:
        FileNotFoundError: neither folder contains a record.
        ValueError: the record is damaged.
    """
    places = (run / RECORD_FILE, run / "upsampler" / RECORD_FILE)
    path = next((one for one in places if one.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{run}: holds no {RECORD_FILE}; give the folder of a training")
    return read_object(path)


def model_card(config: Mapping[str, Any], record: Mapping[str, Any], name: str) -> str:
    """Compose the model card of an upsampler, in Markdown.

    Args:
        config: configuration of the upsampler, with its name under "upsampler".
        record: record of its training; empty if there is none.
        name: name in the repository or folder from which the upsampler is loaded.
    """
    channels = config.get("embed_dim")
    fits = "features of any backbone" if channels is None else f"features of {channels} channels"
    lines = ["---", "library_name: upfeat", "license: apache-2.0", "tags:"]
    lines += [f"- {tag}" for tag in _TAGS]
    lines += ["---", "", f"# {name}", ""]
    lines += [f"A `{config['upsampler']}` upsampler of upfeat {__version__}, for {fits}.", ""]
    lines += ["```python", "import upfeat", ""]
    lines += [f'upsampler = upfeat.load_upsampler("{name}")']
    lines += ["fine = upsampler(features, image)  # (B, C, h, w), (B, 3, H, W) -> (B, C, H, W)"]
    lines += ["```", "", "## Configuration", "", *_table(config)]
    if record:
        lines += ["", "## Training", "", *_table(record)]
    return "\n".join(lines) + "\n"


def _table(values: Mapping[str, Any]) -> list[str]:
    """Format settings as rows of a table; nested names are joined, and paths cut to file names."""
    rows = ["| setting | value |", "| --- | --- |"]
    for name, value in _flat(values):
        if isinstance(value, str):
            shown = Path(value).name if Path(value).is_absolute() else value
        else:
            shown = json.dumps(value, ensure_ascii=False)
        shown = shown.replace("|", "\\|").replace("\n", " ")
        rows.append(f"| {name} | {shown if len(shown) <= 200 else shown[:200] + ' …'} |")
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found
