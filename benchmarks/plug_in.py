"""Collect the figures that the scripts of examples/plug_in print, for docs/guides/plug_in.md.

python benchmarks/plug_in.py
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).with_suffix(".json")
EXAMPLES = Path(__file__).parents[1] / "examples" / "plug_in"
SCRIPTS = ["segmentation_head", "decoder", "depth_head", "matching", "activation_map"]


def printed(script: str) -> dict[str, float]:
    """Run a script and return its last line of output, a dictionary."""
    command = [sys.executable, str(EXAMPLES / f"{script}.py")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return ast.literal_eval(output.strip().splitlines()[-1])


if __name__ == "__main__":
    found = {script: printed(script) for script in SCRIPTS}
    TARGET.write_text(json.dumps(found, indent=1) + "\n")
