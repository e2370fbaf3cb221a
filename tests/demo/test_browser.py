"""The page in a real browser. Screenshots go to the folder that UPFEAT_SCREENSHOTS names."""

import http.client
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from safetensors import safe_open

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytest.importorskip("gradio", reason='pip install "upfeat[demo]"')

CHROMIUM = shutil.which("chromium")
PHOTOS = Path(__file__).parents[2] / "examples" / "photos"
PATIENCE = 60_000
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """One visitor, in a context of their own."""

    def __init__(self, browser, address, width=1280, height=900, **options):
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.faults, self.outside, self.chosen, self.used = [], [], {}, False
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, address))
        self.page.goto(address)
        self.loaded(1)

    def _note(self, url, address):
        if not url.startswith((address, "data:", "blob:")):
            self.outside.append(url)

    def viewer(self, state):
        self.page.wait_for_selector(f".uf-viewer{state}")

    def loaded(self, count):
        self.viewer(f"[data-loaded='{count}']:not(.uf-working)")

    def loading(self, act):
        """Do something that opens a photograph; wait until it is shown."""
        count = int(self.page.get_attribute(".uf-viewer", "data-loaded"))
        act()
        self.loaded(count + 1)

    def asking(self, act):
        """Do something that asks the server; wait for the answer."""
        answered = int(self.page.get_attribute(".uf-viewer", "data-answered"))
        act()
        self.viewer(f"[data-answered='{answered + 1}']")

    def start_over(self):
        """Go back to what a new visitor sees, without loading the page again."""
        if not self.used:
            self.used = True
            return
        for label, option in self.chosen.items():
            self.loading(partial(self.choose, label, option))
        self.chosen = {}
        self.loading(self.page.get_by_role("button", name="A cat").click)
        for name in ("Features", "Side by side"):
            self.page.get_by_role("radio", name=name).click()
        self.page.get_by_role("button", name="Reset").click()

    def source(self, query):
        return self.page.get_attribute(query, "src")

    def says(self, query, words):
        playwright.expect(self.page.locator(query)).to_contain_text(words, timeout=PATIENCE)

    def maps(self):
        return self.source(".uf-blocks"), self.source(".uf-fine .uf-layer")

    def click(self, x, y, panel="photo"):
        frame = self.page.locator(f".uf-{panel} .uf-frame")
        box = frame.bounding_box()
        frame.click(position={"x": x * box["width"], "y": y * box["height"]})

    def stroke(self, label, *points):
        self.page.locator(f".uf-classes [data-class='{label}']").click()
        box = self.page.locator(".uf-photo .uf-frame").bounding_box()
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=5)
        self.page.mouse.up()

    def choose(self, label, option):
        self.chosen.setdefault(label, self.page.get_by_label(label).input_value())
        self.page.get_by_label(label).click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def download(self, name):
        with self.page.expect_download() as waiting:
            self.page.get_by_role("button", name=name).click()
        return waiting.value

    def shot(self, name):
        if folder := os.environ.get("UPFEAT_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(400)  # transitions
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def leave(self):
        assert self.faults == []
        assert self.outside == []
        self.context.close()


@pytest.fixture(scope="module")
def one(browser, address):
    """The same visitor for all tests: loading the page takes longer than most of them."""
    visitor = Visitor(browser, address)
    yield visitor
    visitor.leave()


@pytest.fixture
def visitor(one):
    one.start_over()
    return one


def test_click_paint_compare_and_download(visitor, tmp_path):
    page, features = visitor.page, visitor.maps()
    visitor.shot("features-1280")
    visitor.asking(lambda: visitor.click(0.38, 0.38))
    first = visitor.maps()
    assert first != features
    assert page.get_by_role("radio", name="Similarity").get_attribute("aria-checked") == "true"
    visitor.shot("similarity-1280")
    visitor.asking(lambda: visitor.click(0.1, 0.9, "fine"))
    assert visitor.maps() != first

    page.get_by_role("radio", name="Segment").click()
    visitor.stroke(0, (0.2, 0.3), (0.5, 0.6))
    assert "another class" in page.inner_text(".uf-status")
    visitor.asking(lambda: visitor.stroke(1, (0.9, 0.3), (0.97, 0.6)))
    two = visitor.maps()
    visitor.asking(lambda: visitor.stroke(2, (0.6, 0.95), (0.9, 0.95)))
    assert visitor.maps() != two
    visitor.shot("segment-1280")
    visitor.asking(lambda: page.get_by_role("button", name="Undo stroke").click())
    assert visitor.maps() == two

    for name in ("Features .safetensors", "Head .safetensors"):
        path = tmp_path / "file.safetensors"
        visitor.download(name).save_as(path)
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"]
    picture = visitor.download("Picture .png")
    assert picture.suggested_filename == "cat.segment.png"

    page.get_by_role("radio", name="Slider").click()
    page.get_by_role("radio", name="Features").click()
    assert visitor.source(".uf-over .uf-layer") == features[1]
    before = page.get_attribute(".uf-over", "style")
    page.get_by_label("Boundary between").fill("20")
    assert page.get_attribute(".uf-over", "style") != before
    for _ in range(2):
        page.get_by_role("button", name="Zoom in").click()
    planes = page.locator(".uf-plane").evaluate_all("all => all.map((one) => one.style.transform)")
    assert len(set(planes)) == 1
    assert "scale(2.25)" in planes[0]
    visitor.shot("slider-1280")


def test_what_is_downloaded_is_what_is_shown(visitor, tmp_path):
    page, pictures = visitor.page, {}

    def picture(name):
        visitor.download("Picture .png").save_as(tmp_path / "picture.png")
        pictures[name] = (tmp_path / "picture.png").read_bytes()

    picture("features")
    visitor.asking(lambda: visitor.click(0.4, 0.4))
    picture("similarity")
    page.get_by_role("radio", name="Segment").click()
    visitor.stroke(0, (0.2, 0.3), (0.5, 0.6))
    visitor.asking(lambda: visitor.stroke(1, (0.9, 0.3), (0.97, 0.6)))
    page.get_by_role("radio", name="Similarity").click()
    similarity = pictures["similarity"]
    picture("similarity")
    assert pictures["similarity"] == similarity != pictures["features"]

    page.get_by_role("radio", name="Segment").click()
    visitor.stroke(1, (0.9, 0.7), (0.97, 0.9))
    visitor.stroke(2, (0.5, 0.9), (0.6, 0.95))  # learnt, though a download is asked for meanwhile
    path = tmp_path / "head.safetensors"
    visitor.download("Head").save_as(path)
    with safe_open(path, "pt") as file:
        assert len(file.get_tensor("bias")) == 3

    page.get_by_role("button", name="Clear").click()
    visitor.says(".uf-status", "Nothing has been painted yet")
    assert page.get_by_role("button", name="Head").is_disabled()


def test_everything_asked_while_the_server_works_is_answered(visitor):
    page = visitor.page
    page.get_by_role("radio", name="Segment").click()
    visitor.stroke(0, (0.2, 0.3), (0.5, 0.6))
    for place in range(8):  # each stroke but the first is asked for during an answer
        visitor.stroke(1, (0.6 + 0.04 * place, 0.3), (0.6 + 0.04 * place, 0.6))
        page.wait_for_timeout(40 * place)
    visitor.viewer(":not(.uf-working)")


def test_late_answers_disturb_nobody(visitor):
    page = visitor.page
    page.get_by_role("radio", name="Segment").click()
    visitor.stroke(0, (0.2, 0.3), (0.5, 0.6))

    def painted_and_cleared():
        visitor.stroke(1, (0.9, 0.3), (0.97, 0.6))
        page.get_by_role("button", name="Clear").click()

    visitor.asking(painted_and_cleared)
    assert not page.locator(".uf-fine .uf-layer").is_visible()
    visitor.says(".uf-status", "Nothing has been painted yet")

    def clicked_and_left():
        page.get_by_role("radio", name="Features").click()
        visitor.click(0.4, 0.4)
        page.get_by_role("radio", name="Segment").click()

    visitor.asking(clicked_and_left)
    assert page.get_attribute(".uf-viewer", "data-mode") == "segment"

    page.get_by_role("radio", name="Features").click()
    asked = page.get_attribute(".uf-viewer", "data-asked")

    def chosen_and_clicked():
        page.get_by_role("button", name="A cup of coffee").click()
        visitor.click(0.4, 0.4)

    visitor.loading(chosen_and_clicked)
    assert page.get_attribute(".uf-viewer", "data-asked") == asked
    assert page.get_attribute(".uf-viewer", "data-mode") == "features"


def test_bad_uploads_are_one_line_and_change_nothing(visitor, tmp_path):
    page, before = visitor.page, visitor.maps()
    bad = tmp_path / "bad.jpg"
    bad.write_bytes((PHOTOS / "cat.jpg").read_bytes()[:900])
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes((16 << 20) + 1))
    for path, words in ((bad, "bad.jpg"), (large, "save it smaller")):
        page.set_input_files("input[type=file]", path)
        page.wait_for_function(
            f"document.querySelector('.uf-error').textContent.includes('{words}')"
        )
        assert page.get_by_role("alert").is_visible()
        assert visitor.maps() == before
    visitor.shot("error-1280")
    assert "Traceback" not in page.content()
    upload = partial(page.set_input_files, "input[type=file]", PHOTOS / "coffee.jpg")
    visitor.loading(upload)
    assert not page.locator(".uf-error").is_visible()


def test_a_phone_beside_it_sees_its_own_photographs_in_dark_and_light(browser, address, visitor):
    other = Visitor(browser, address, width=400, height=850, color_scheme="dark")
    page = other.page
    page.eval_on_selector("[data-mode=text]", "button => { button.hidden = false; }")
    for width in (320, 400):
        page.set_viewport_size({"width": width, "height": 850})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.eval_on_selector("[data-mode=text]", "button => { button.hidden = true; }")
    page.get_by_role("button", name="A cup of coffee").click()
    other.loaded(2)
    coffee = page.get_by_role("button", name="A cup of coffee")
    playwright.expect(coffee).to_have_attribute("aria-pressed", "true")
    assert page.locator(".uf-samples [aria-pressed=true]").count() == 1
    cat = visitor.source(".uf-photo .uf-base")
    assert other.source(".uf-photo .uf-base") != cat
    visitor.choose("Output size", "224 pixels")  # from what the server keeps of the first
    visitor.says(".uf-photo figcaption", "224 × ")
    assert visitor.download("Features").suggested_filename.startswith("cat")
    assert other.download("Features").suggested_filename.startswith("coffee")

    other.shot("features-400-dark")
    keyboard_alone(other)
    other.shot("similarity-400-dark")
    page.emulate_media(color_scheme="light")
    other.shot("similarity-400-light")
    other.leave()


def keyboard_alone(visitor):
    """Choose a pixel and a mode by keys; every button has a name for those who cannot see it."""
    page = visitor.page
    page.locator(".uf-photo .uf-frame").focus()
    page.keyboard.press("ArrowLeft")
    visitor.asking(lambda: page.keyboard.press("Enter"))
    page.get_by_role("radio", name="Similarity").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_attribute(".uf-viewer", "data-mode") == "segment"
    page.keyboard.press("ArrowLeft")
    unnamed = "all => all.filter((one) => !one.innerText.trim() && !one.ariaLabel && !one.title)"
    assert page.locator("button:visible").evaluate_all(f"{unnamed[:-1]}).length") == 0


def test_who_is_turned_away_may_ask_again(visitor):
    page = visitor.page
    full = {"status": 503, "json": {"detail": "Queue is full."}}
    page.route("**/queue/join*", lambda route: route.fulfill(**full))
    visitor.asking(lambda: visitor.click(0.3, 0.3))
    visitor.says(".uf-error", "try again")
    visitor.shot("busy-1280")
    page.unroute("**/queue/join*")
    visitor.asking(lambda: visitor.click(0.4, 0.4))
    visitor.says(".uf-status", "Similarity with pixel")
    assert not page.locator(".uf-error").is_visible()


def test_models_and_sizes(visitor):
    page = visitor.page
    visitor.choose("Output size", "224 pixels")
    visitor.says(".uf-photo figcaption", "224 × ")
    detail = visitor.maps()[1]
    visitor.choose("Upsampler", "bilinear")
    visitor.says(".uf-fine figcaption", "(bilinear)")
    assert visitor.maps()[1] != detail
    visitor.choose("Backbone", "efficientnet_lite0.stride32")
    visitor.says(".uf-coarse figcaption", "(efficientnet_lite0.stride32) 7 × ")
    assert not page.get_by_role("radio", name="Text").is_visible()
    cat = visitor.source(".uf-photo .uf-base")
    page.get_by_role("button", name="A cup of coffee").click()
    visitor.says(".uf-status", "backbone")
    page.wait_for_function(
        "was => document.querySelector('.uf-photo .uf-base').src !== was", arg=cat
    )


def test_large_requests_and_stored_uploads_are_refused(address):
    host = address.removeprefix("http://").strip("/")
    for path, length, code in (
        ("/gradio_api/queue/join", 24 << 20, 413),
        ("/gradio_api/upload", 1, 403),
    ):
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        assert connection.getresponse().status == code
        connection.close()
