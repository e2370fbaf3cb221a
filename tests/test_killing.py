"""Nothing is lost or left behind by a command that is killed at any moment."""

import os
import subprocess
import sys
from pathlib import Path

import killing
import pytest


@pytest.mark.slow
@pytest.mark.kills
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process with PyTorch")
@pytest.mark.parametrize("command", killing.COMMANDS)
def test_a_killed_command_is_as_good_as_an_undisturbed_one(command, tmp_path):
    if command.endswith("_ray"):
        pytest.importorskip("ray")
    script = Path(killing.__file__)
    arguments = [command, "--times", "20", "--folder", str(tmp_path / "work")]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
