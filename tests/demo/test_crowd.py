"""Fifty visitors at once: some are turned away, none fails, and memory stays bounded."""

import http.client
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

pytest.importorskip("gradio", reason='pip install "upfeat[demo]"')
psutil = pytest.importorskip("psutil")
pytestmark = [pytest.mark.slow, pytest.mark.kills]  # a minute of two cores; run apart
VISITORS = 50
MIB = 1 << 20


@pytest.fixture
def served():
    command = [sys.executable, "-m", "upfeat", "demo", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as p:
        shown = ""
        while not (found := re.search(r"http://(127\.0\.0\.1:\d+)/", shown)):
            line = p.stdout.readline()
            assert line, shown
            shown += line
        yield found[1], psutil.Process(p.pid)
        p.terminate()


def ask(host, method, path, body=None):
    connection = http.client.HTTPConnection(host, timeout=300)
    headers = {"Content-Type": "application/json"} if body else {}
    connection.request(method, path, json.dumps(body) if body else None, headers)
    return connection, connection.getresponse()


def visit(host, event, number):
    """Open the page's first photograph as a browser does; say what became of it."""
    session = f"visitor{number}"
    data = ["", "efficientnet_lite0", "detail", 336]
    body = {"data": data, "fn_index": event, "session_hash": session, "event_data": None}
    connection, answer = ask(host, "POST", "/gradio_api/queue/join", body)
    answer.read()
    connection.close()
    if answer.status != 200:
        return "turned away"
    connection, answer = ask(host, "GET", f"/gradio_api/queue/data?session_hash={session}")
    for line in answer:
        if line.startswith(b"data: "):
            message = json.loads(line[6:])
            if message["msg"] == "process_completed":
                found = "shown" if message["success"] else str(message["output"])[:200]
                break
    else:
        found = "cut off"
    connection.close()
    return found


def test_fifty_visitors_at_once(served):
    host, process = served
    connection, answer = ask(host, "GET", "/config")
    event = json.loads(answer.read())["dependencies"][0]["id"]
    connection.close()
    assert visit(host, event, 1000) == "shown"
    before, peaks = process.memory_info().rss, []
    for start in (0, VISITORS):
        numbers = range(start, start + VISITORS)
        with ThreadPoolExecutor(VISITORS) as pool:
            found = list(pool.map(partial(visit, host, event), numbers))
        assert set(found) <= {"shown", "turned away"}, set(found)
        assert found.count("shown") >= 24
        peaks.append(process.memory_info().rss)
        print(f"{found.count('shown')} shown, {(peaks[-1] - before) / MIB:.0f} MiB more")
    assert peaks[1] - before < 900 * MIB
    assert peaks[1] - peaks[0] < 300 * MIB  # who comes later takes the place of others
