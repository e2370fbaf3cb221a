"""Answers to the page's events, without a browser."""

import base64
import os
import socket
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason='pip install "upfeat[demo]"')

from upfeat.demo.answers import PHOTOGRAPHS, Answers, bundled
from upfeat.demo.models import Models, offered
from upfeat.demo.page import serve
from upfeat.demo.visits import Visits

MODES = ("features", "similarity", "segment")
CHOSEN = ("efficientnet_lite0", "bilinear", 224)


@pytest.fixture(scope="module")
def answers():
    return Answers(Models(upsamplers=["bilinear"]), Visits())


def event(**data):
    return SimpleNamespace(_data=data)


def test_a_visit(answers):
    token, opened = answers.greet(None, *CHOSEN)
    assert (opened["kind"], opened["sample"]) == ("photo", "cat")
    assert opened["photo"].startswith("data:image/jpeg;base64,")
    heat = answers.pick(token, event(y=20, x=30))
    assert (heat["kind"], heat["mode"]) == ("maps", "similarity")
    assert heat["status"].endswith("(row 20, column 30)")
    file = answers.fetch(token, event(what="picture", mode="similarity"))
    assert (file["name"], file["type"]) == ("cat.similarity.png", "image/png")
    assert base64.b64decode(file["data"]).startswith(b"\x89PNG")
    own = base64.b64encode(bundled("coffee")).decode()
    again, opened = answers.upload(token, *CHOSEN, event(name="mine.jpg", data=own))
    assert (again, opened["sample"]) == (token, None)


def test_what_a_visitor_can_mend_is_a_message(answers):
    token, unknown = answers.choose(None, *CHOSEN, event(photo="../page"))
    assert unknown["error"] == "there is no bundled photograph '../page'"
    _, damaged = answers.upload(token, *CHOSEN, event(name="x", data="%"))
    assert (damaged["kind"], damaged["error"]) == ("error", "the upload is damaged; try again")
    assert unknown["number"] != damaged["number"], "the viewer skips repeated numbers"


def test_pictures_are_of_the_result_that_is_shown(answers):
    token, _ = answers.greet(None, *CHOSEN)
    wanted = event(what="picture", mode="similarity")
    assert "no similarity" in answers.fetch(token, wanted)["error"]
    answers.pick(token, event(y=20, x=30))
    similarity = answers.fetch(token, wanted)["data"]
    strokes = [(0, 1, x) for x in range(9)] + [(1, 99, x) for x in range(9)]
    answers.strokes(token, event(strokes=strokes))
    assert answers.fetch(token, wanted)["data"] == similarity
    kinds = {answers.fetch(token, event(what="picture", mode=one))["data"] for one in MODES}
    assert len(kinds) == len(MODES)


def test_a_fault_of_the_program_is_an_answer_too(answers, monkeypatch, capsys):
    monkeypatch.setattr(answers, "models", None)
    _, opened = answers.greet(None, *CHOSEN)
    assert "error of the program" in opened["error"]
    assert "TypeError" in capsys.readouterr().err


def test_every_bundled_photograph_is_there():
    assert all(bundled(name).startswith(b"\xff\xd8") for name in PHOTOGRAPHS)


def test_a_port_or_host_that_cannot_be_bound_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port} is in use"):
            serve(None, "127.0.0.1", port, say=print)
    with pytest.raises(ValueError, match=r"host='192\.0\.2\.1'"):
        serve(None, "192.0.2.1", 0, say=print)


def test_an_address_of_ipv6_is_served():
    asked = []

    def launch(**options):
        asked.append(options["server_name"])
        return None, "http://[::1]:1/", None

    try:
        serve(SimpleNamespace(launch=launch), "::1", 0, block=False, say=print)
    except ValueError:
        pytest.skip("this machine has no IPv6")
    assert asked == ["[::1]"]


def test_gradio_reports_nothing():
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_a_menu_shows_paths_without_their_folders_unless_two_are_alike():
    names = [
        "hf:/models/dinov2",
        "hf:facebook/dinov2-small",
        "/runs/a/best",
        "/runs/b/best",
        "detail",
    ]
    labels = [label for label, _ in offered(names)]
    assert labels == [
        "hf:dinov2",
        "hf:facebook/dinov2-small",
        "/runs/a/best",
        "/runs/b/best",
        "detail",
    ]
    assert [name for _, name in offered(names)] == names
