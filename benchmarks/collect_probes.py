"""Collect results of ``upfeat eval`` in one file, from which docs/generate.py makes tables.

    upfeat eval seg data/clothing --backbone efficientnet_lite0 -o out/lite0_clothing …
    python benchmarks/collect_probes.py --title "EfficientNet-Lite0: clothing" out/lite0_clothing

Adds the folder's results to benchmarks/probes.json under the title. Earlier results
of that title are replaced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("probes.json")
_KEPT = ("miou", "boundary_f", "rmse", "abs_rel")


def collected(content: dict[str, Any]) -> dict[str, Any]:
    """Reduce the content of a results.json to means and spreads by protocol and upsampler."""
    data, settings = content["data"], content["settings"]
    protocols: dict[str, dict[str, Any]] = {}
    for row in content["rows"]:
        scores = {
            name: [value["mean"], value["spread"]]
            for name, value in row["scores"].items()
            if name in _KEPT
        }
        rounded = {
            name: [None if one is None else round(one, 5) for one in pair]
            for name, pair in scores.items()
        }
        protocols.setdefault(row["protocol"], {})[row["upsampler"]] = rounded
    return {
        "task": content["task"],
        "images": [data[part]["images"] for part in ("train", "test")],
        "seeds": settings["seeds"],
        "size": settings["size"],
        "source": content["versions"]["source"][:12],
        "protocols": protocols,
    }


def add(title: str, folder: Path) -> None:
    """Write a folder's results to probes.json under a title.

    Rows from an earlier run on equal images, seeds and size are kept unless this run replaces them.
    """
    known = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    found, before = collected(json.loads((folder / "results.json").read_text())), known.get(title)
    if before is not None and all(before[key] == found[key] for key in ("images", "seeds", "size")):
        for protocol, rows in before["protocols"].items():
            found["protocols"][protocol] = rows | found["protocols"].get(protocol, {})
    known[title] = found
    TARGET.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Add the results of the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--title", required=True)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    add(options.title, options.folder)


if __name__ == "__main__":
    main()
