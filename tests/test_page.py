"""The page in a real browser, where there is one."""

import base64
import io
import json
from itertools import combinations

import pytest
import torch
from capture_page import BROWSER, draw_ring
from PIL import Image
from standin import JUMP, STEPS, ring_picture

from metrics import circle_iou
from support.pictures import fit_image, open_image


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no Chromium or Chrome is installed")
    with playwright.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """Nothing on it may ask another host, or complain."""
    page, elsewhere, complaints = browser.new_page(viewport={"width": 1280, "height": 900}, has_touch=True), [], []
    page.set_default_timeout(300_000)
    page.on("request", lambda request: request.url.startswith((server, "data:")) or elsewhere.append(request.url))
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(error))
    page.goto(server)
    page.get_by_text("Settings").click()
    page.get_by_label("DDIM steps").fill("3")
    yield page
    page.close()
    assert not elsewhere and not complaints


def status(page, text: str) -> None:
    page.locator("#status", has_text=text).wait_for()


def painted(page) -> None:
    """Wait until all snapshots are, for what is asked now."""
    status(page, "the jump")
    assert not page.locator(".old").count()


def decoded(url: str) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1]"""
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return fit_image(picture, picture.width)[None] * 2 - 1


def shown(page, name: str) -> torch.Tensor:
    """A picture on the page."""
    return decoded(page.locator(f"#{name}").get_attribute("src"))


def strokes(page) -> tuple[int, list[float]]:
    """White pixels of the drawing, and their centre in shares of the side."""
    drawing = decoded(page.evaluate("() => document.querySelector('canvas').toDataURL()"))
    places = torch.nonzero(drawing[0, 0] > 0).double()
    return len(places), (places.mean(dim=0).flip(0) / 512).tolist()


def test_one_drawing_through_the_training(page):
    """Once it is painted, slider, strip and Play swap pictures that are there."""
    requests, caption, slider = [], page.locator("#caption"), page.locator("#step")
    painted(page)
    page.on("request", lambda request: requests.append(request.url) if request.url.startswith("http") else None)
    status(page, f"Between steps {JUMP - 10} and {JUMP} the picture turns to your drawing: the jump.")
    slider.fill("0")
    assert caption.inner_text() == "With the hint, step 0" and torch.equal(shown(page, "sample"), shown(page, "alone"))
    slider.press("ArrowRight")
    assert caption.inner_text() == "With the hint, step 10"
    page.get_by_role("button", name="step 30").click()
    assert slider.input_value() == "30" and caption.inner_text() == "With the hint, step 30"
    page.get_by_role("button", name="Play the training").click()
    page.get_by_role("button", name="Play the training").wait_for()
    assert slider.input_value() == "40" and caption.inner_text() == "With the hint, step 40" and not requests
    assert page.locator("#strip button").all_inner_texts() == [f"step {step}" for step in STEPS]


def test_the_jump_is_marked_once_its_neighbours_are_painted(page):
    """Of fewer snapshots the middle of the gap would be marked, far from the jump."""
    painted(page)
    picture = page.locator("#sample").get_attribute("src")
    distances = {40: 0.5, 0: 0.0, 20: 0.4, 10: 0.1, 30: 0.5}
    lines = [json.dumps({"step": step, "distance": distances[step], "picture": picture}) for step in distances]
    answer = [json.dumps({"hint": picture, "notes": []})]
    page.route("**/paint", lambda route: route.fulfill(body="\n".join([*answer, ""])))
    for count, line in enumerate(lines, 1):
        answer.append(line)
        page.get_by_label("Seed").fill(str(count))
        status(page, f"Painted: {count} of 5 snapshots.")
        assert page.locator("#marks b").count() == (count > 3)
    assert "left: 37.5%" in page.locator("#marks b").get_attribute("style")


def test_drawing(page):
    """The first stroke takes the example's place; old results are dimmed at once; a ring that is drawn is followed."""
    painted(page)
    canvas, box = page.locator("canvas"), page.locator("canvas").bounding_box()
    for _ in draw_ring(page, 0.4, 0.55, 0.25):
        pass
    assert page.locator(".result.old").count() == 3
    painted(page)
    hint = (shown(page, "outline") + 1) / 2
    assert circle_iou(shown(page, "sample"), hint).item() > 0.7 > circle_iou(shown(page, "alone"), hint).item()
    ring, centre = strokes(page)
    assert centre == pytest.approx((0.4, 0.55), abs=0.01)
    canvas.click(button="right")
    canvas.click(position={"x": 9, "y": 9})
    assert ring < strokes(page)[0] < ring + 60  # a dot of 5 pixels across
    fingers = [{"x": box["x"] + 50, "y": box["y"] + 50, "id": 0}, {"x": box["x"] + 90, "y": box["y"] + 90, "id": 1}]
    dotted, touch = strokes(page)[0], page.context.new_cdp_session(page)
    for kind, count in (("touchStart", 1), ("touchStart", 2), ("touchMove", 2), ("touchEnd", 0)):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers[:count]})
    assert strokes(page)[0] == dotted  # a pinch draws nothing
    page.get_by_role("button", name="Undo").click()
    assert strokes(page)[0] == ring
    page.get_by_role("radio", name="Place a ring").check()
    page.get_by_label("Left–right").fill("0.7")
    assert strokes(page)[1] == pytest.approx((0.7, 0.5), abs=0.01)


def test_what_can_not_be_painted(page):
    """An empty drawing is no error until Paint; a number that can't be is one sentence."""
    page.get_by_label("DDIM steps").fill("2.5")
    status(page, "DDIM steps must be a whole number from 1 to 50")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.get_by_role("button", name="Clear").click()
    assert page.get_by_text("draw here").is_visible() and page.locator("#status").inner_text() == ""
    page.get_by_role("button", name="Paint").click()
    status(page, "Nothing is drawn: draw a line in the black square.")
    assert not asked


def test_the_prompt(page):
    """One's own stays until a colour changes; a long one is cut."""
    prompt = page.get_by_label("Prompt")
    prompt.fill("my own words " * 40)
    page.locator("#disc [value=coral]").click()
    assert prompt.input_value() == "my own words " * 40
    status(page, "the prompt is too long and is cut from:")
    page.locator("#background [value=teal]").click()
    assert prompt.input_value() == "coral circle with teal background"


def test_pictures_that_are_sent(page, tmp_path):
    """A hint is one; dark lines on white are named, and inverted; what is no picture is refused in one sentence."""
    ring_picture(200).save(tmp_path / "ring.png")
    Image.eval(ring_picture(200), lambda value: 255 - value).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("this is no picture")
    expected = fit_image(open_image(tmp_path / "ring.png"), 128)[None] * 2 - 1
    page.get_by_label("DDIM steps").fill("1")
    page.get_by_role("radio", name="Picture").check()
    page.locator("#file").set_input_files(tmp_path / "white.png")
    status(page, "try Invert")
    page.get_by_label("Invert").check()
    page.locator("#status:not(:text('Invert'))", has_text="Painted").wait_for()
    assert (shown(page, "outline") - expected).abs().max() <= 2 / 255 + 1e-6  # rounded to 8 bits twice
    page.locator("#file").set_input_files(tmp_path / "text.png")
    status(page, "text.png is damaged or no picture")
    assert page.locator("#with.old").count() == 1


def test_everything_has_its_place_and_its_name(page):
    """Nothing is wider than the window, no two parts overlap, each control has a name; the arrows move between tabs."""
    painted(page)
    page.get_by_label("All 139 colours").check()
    for width, scheme in ((1366, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        parts = ("canvas", "#sample", "#alone", "#step", "#plot", "#strip", "#paint")
        for a, b in combinations([page.locator(part).bounding_box() for part in parts], 2):
            beside = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
            assert beside or a["y"] + a["height"] <= b["y"] or b["y"] + b["height"] <= a["y"]
    nameless = "part => part.offsetParent && !(part.labels?.length || part.ariaLabel || part.innerText?.trim())"
    parts = "[...document.querySelectorAll('input, select, button, canvas, [role=img]')]"
    assert not page.evaluate(f"() => {parts}.filter({nameless}).map(part => part.outerHTML)")
    page.get_by_role("radio", name="Draw").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="Place a ring").is_checked() and page.get_by_label("Size").is_visible()
