"""The server of the page: what it answers, and that it writes nothing."""

import io
import json
import urllib.error
import urllib.request
from base64 import b64encode

import pytest
from PIL import Image

pytest.importorskip("gradio", reason='pip install "upfeat[demo]"')
pytestmark = pytest.mark.slow

CHOSEN = (None, "efficientnet_lite0", "bilinear", 224)


def request(address, path, content=None, method=None, **headers):
    """Status and content of an answer."""
    made = urllib.request.Request(address.rstrip("/") + path, content, headers, method=method)
    try:
        with urllib.request.urlopen(made, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def upload(address, session):
    """Send a photograph, as the page does; return the answer of the server."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "png")
    event = {"name": "mine.png", "data": b64encode(file.getvalue()).decode()}
    content = {"data": CHOSEN, "fn_index": 2, "session_hash": session, "event_data": event}
    sent = json.dumps(content).encode()
    kind = {"Content-Type": "application/json"}
    assert request(address, "/gradio_api/queue/join", sent, **kind)[0] == 200
    return request(address, f"/gradio_api/queue/data?session_hash={session}")[1]


def test_nothing_of_a_visitor_is_stored(address, stored):
    """Gradio writes all that a session shows to a file that everybody may read, if asked to."""
    before = sorted(stored.rglob("*"))
    assert b'"kind":"photo"' in upload(address, "mine")
    assert request(address, "/gradio_api/deep_link?session_hash=mine") == (403, b"refused")
    assert sorted(stored.rglob("*")) == before


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/", 200),
        ("HEAD", "/", 200),
        ("GET", "/config", 200),
        ("GET", "/theme.css", 200),
        ("GET", "/gradio_api/deep_link?session_hash=x", 403),
        ("GET", "/gradio_api/file=/etc/passwd", 403),
        ("GET", "/gradio_api/file/etc/passwd", 403),
        ("GET", "/gradio_api/file=/etc/gradio_api/app_id", 403),
        ("HEAD", "/gradio_api/file=/etc/passwd", 403),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/", 403),
        ("GET", "/gradio_api/stream/x/0/1/playlist.m3u8", 403),
        ("GET", "/gradio_api/vibe-code/", 403),
        ("GET", "/gradio_api/info", 403),
        ("GET", "/below/gradio_api/upload_progress", 403),
        ("POST", "/gradio_api/upload", 403),
        ("POST", "/gradio_api/%75pload", 403),
        ("POST", "/gradio_api/process_recording", 403),
        ("POST", "/gradio_api/component_server", 403),
        ("POST", "/gradio_api/stream/x", 403),
        ("POST", "/gradio_api/vibe-edit/", 403),
        ("POST", "/gradio_api/run/predict", 403),
        ("POST", "/gradio_api/call/greet", 403),
        ("POST", "/login", 403),
        ("PUT", "/gradio_api/queue/join", 403),
        ("DELETE", "/", 403),
    ],
)
def test_only_what_the_page_uses_is_answered(address, method, path, code):
    assert request(address, path, b"" if method == "POST" else None, method)[0] == code


@pytest.mark.parametrize("origin", ["http://evil.example", "null"])
def test_other_sites_may_read_nothing(address, origin):
    """Browsers hide answers without leave from pages of other sites."""
    made = urllib.request.Request(f"{address}config", headers={"Origin": origin})
    with urllib.request.urlopen(made, timeout=60) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] is None
