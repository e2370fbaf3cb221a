"""Triton's interpreter, where there is no GPU: tests of kernels run in a process of their own.

The interpreter has to be chosen before Triton is imported, and would make every CPU tensor look
runnable to dispatch.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = INTERPRETED or DEVICE.type == "cuda"
# Relative error of a whole tensor. The interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def interpret(file):
    """Run the tests of ``TestOnDevice`` of a file in the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
         f"{file}::TestOnDevice"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
