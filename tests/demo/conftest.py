"""A page that is served."""

import os
import queue
import re
import subprocess
import sys
import threading

import pytest


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The folder in which Gradio would store files."""
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module")
def address(stored):
    """Address of a page that a process of its own serves."""
    command = [sys.executable, "-m", "upfeat", "demo", "--port", "0"]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(stored)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        shown = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", shown)):
            line = lines.get(timeout=120)
            assert line is not None, shown
            shown += line
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)
        reader.join(30)
        process.stdout.close()
