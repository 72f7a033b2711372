"""The page: what it paints with, its server, and the page itself in a real browser, where there is one."""

import base64
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from itertools import combinations
from pathlib import Path

import pytest
import torch
from capture_page import BROWSER, draw_ring, served
from PIL import Image

import draw
from controlnet import ControlNet
from data import draw_fill50k
from metrics import circle_iou
from stable_diffusion import StableDiffusion
from support.checkpoints import find_snapshots
from support.errors import UserError
from support.page import NUMBERS, Page, next_snapshot
from support.pictures import as_srgb, fit_image, open_image
from weights import save_controlnet

STEPS = range(0, 50, 10)
JUMP = 20  # the snapshots from this step on are the trained ControlNet, those before it the untrained one
SETTINGS = {"prompt": "coral circle with navy background", "mode": "uniform"}
QUICK = {"strength": 1.0, "seed": 0, "guidance_scale": 4.0, "steps": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as the page needs it: snapshots that jump, and a log."""
    folder, sd = tmp_path_factory.mktemp("run"), StableDiffusion.load("tiny")
    (folder / "config.json").write_text('{"base": "tiny", "resolution": 128}')
    untrained = ControlNet.from_unet(sd.unet, sd.preset.hint_channels)
    for step in STEPS:
        path = folder / "snapshots" / f"step-{step}.safetensors"
        save_controlnet(untrained, path, dtype=torch.float16)
        if step >= JUMP:
            shutil.copy(draw.SHIPPED, path)
    entries = [{"step": step, "hint_sensitivity": 1e-6 * (step + 1), "followed": step / 40} for step in STEPS]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.fixture(scope="module")
def painter(run):
    sd = StableDiffusion.load("tiny")
    return draw.Painter(sd, find_snapshots(run)[1], sd.preset.resolution, lambda picture: 1 - picture)


def ring_picture(size: int = 128) -> Image.Image:
    return draw_fill50k(0, size)[0]


def test_all_snapshots_are_painted_the_jump_first(painter):
    """The base's own picture; DDIM's predictions of the last snapshot alone; step 0 is the base's own, bit for bit."""
    predicted = []
    hint, alone, *snapshots = painter.paint(predicted.append, ring_picture(), True, False, **SETTINGS, **QUICK)
    assert torch.equal(fit_image(hint["hint"], 128), fit_image(ring_picture(), 128)) and not hint["notes"]
    assert len(predicted) == 3 and all(list(event) == ["predicted"] for event in predicted)
    assert [event["step"] for event in snapshots] == [40, 0, 20, 10, 30]
    for event in snapshots:  # equation (3): before the first step the hint changes nothing
        same = event["picture"].tobytes() == alone["alone"].tobytes()
        assert same == (event["distance"] == 0) == (event["distance"] < 0.05) == (event["step"] < JUMP)


def test_half_of_the_strip_lies_around_the_jump():
    steps = list(range(0, 1010, 10))
    distance = {step: 1 / (1 + 2.0 ** ((300 - step) / 15)) for step in steps}
    painted = {}
    while len(painted) < len(steps):
        step = next_snapshot(steps, painted)
        painted[step] = distance[step]
    assert next_snapshot(steps, painted) is None
    assert sum(0.1 <= value <= 0.9 for value in [*painted.values()][:12]) >= 6
    assert next_snapshot([5], {}) == 5 and next_snapshot([5], {5: 0.1}) is None


def test_what_the_hint_is(painter, tmp_path):
    """--detect is for pictures: the edges of a drawn stroke would be two lines. Dark ink on transparency is a line."""
    ring = ring_picture()
    expected = fit_image(ring, 128)
    assert torch.equal(painter.hint(ring, drawn=True, invert=False), expected)
    assert torch.equal(painter.hint(ring, drawn=False, invert=False), 1 - expected)  # as this painter "detects"
    assert torch.equal(painter.hint(ring, drawn=False, invert=True), expected)
    ink = Image.new("RGBA", ring.size)
    ink.paste("black", mask=ring.convert("L"))
    assert torch.equal(painter.hint(as_srgb(ink, Path("ink.png")), drawn=True, invert=False), expected)
    with pytest.raises(UserError, match="the hint is empty"):
        next(painter.paint(print, Image.new("RGB", (9, 9)), True, False, **SETTINGS, **QUICK))
    prompt = "coral circle " * 60
    inverted, cut = next(painter.paint(print, ring, False, False, prompt, mode="uniform", **QUICK))["notes"]
    assert "Invert" in inverted and cut.endswith(painter.sd.tokenizer.cut(prompt)) and "cut from: c" in cut


def test_a_picture_that_nobody_waits_for_ends_at_the_next_ddim_step(painter):
    page, steps = Page(0), []
    page.waiting, browser = socket.socketpair()
    hook = painter.sd.unet.register_forward_pre_hook(lambda *_: page.check() or steps.append(1))
    asked = SETTINGS | QUICK | {"steps": 2}
    with hook, page, pytest.raises(ConnectionError):
        list(painter.paint(lambda event: browser.close(), ring_picture(), True, False, **asked))
    assert len(steps) == 2 + 1  # the base's own picture, and what DDIM predicts first of the snapshot's


def test_mistakes_on_the_command_line(tmp_path, monkeypatch, run):
    def error(*options):
        monkeypatch.setattr(sys, "argv", ["draw.py", *map(str, options)])
        with pytest.raises(UserError) as raised:
            draw.main()
        return str(raised.value)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} can't be used (address already in use)" in error("--port", port, "--base", "./nosuch")
    monkeypatch.setattr(draw, "Page", lambda port: None)
    assert "leave out --controlnet" in error("--run", run, "--controlnet", "nosuch")
    assert "must be a whole number from 1 to 65535" in error("--port", "70000")
    assert "config.json" in error("--run", tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')  # not a run's
    assert "has no snapshots: train with --snapshot-steps" in error("--run", tmp_path)
    (tmp_path / "config.json").write_text('{"base": "tiny", "resolution": 128}')
    assert "nosuch" in error("--run", run, "--base", "./nosuch")  # a base that has moved
    sd = StableDiffusion.load("tiny")
    path = tmp_path / "snapshots" / "step-5.safetensors"
    save_controlnet(ControlNet.from_unet(sd.unet, (8, 16, 24, 32)), path, metadata={"unlock_decoder": "true"})
    assert "changed the base's decoder" in error("--run", tmp_path)


# The server


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """The page's address: behind a proxy that is not there, and with a folder for temporary files that stays empty."""
    folder = tmp_path_factory.mktemp("temporary")
    variables = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "socks5://127.0.0.1:9") | {
        "TMPDIR": str(folder)
    }
    with open(folder.with_suffix(".log"), "w") as log, served(run, log, **variables) as (address, process):
        yield address
        process.send_signal(signal.SIGHUP)
        assert process.wait(120) == -signal.SIGHUP
    assert "Traceback" not in folder.with_suffix(".log").read_text() and not [*folder.iterdir()]


def asking(address: str, headers: dict | None = None, **changes):
    """The answer of the page's server to a ring, line by line."""
    data = io.BytesIO()
    ring_picture().save(data, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    body = {"picture": picture, "name": "ring.png", "tab": "draw"} | SETTINGS | QUICK | changes
    request = urllib.request.Request(f"{address}/paint", json.dumps(body).encode(), headers or {})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600)


def ask(address: str, headers: dict | None = None, **changes) -> dict:
    """The last line."""
    with asking(address, headers, **changes) as answer:
        return json.loads(answer.readlines()[-1])


def test_what_is_sent_to_the_server(server):
    assert ask(server) == {"done": True}
    for name, text in (("steps", "2.5"), ("seed", ""), ("seed", str(2**32)), ("strength", "nan"), ("strength", "1e30")):
        label, smallest, largest, _ = NUMBERS[name]
        error = ask(server, **{name: text})["error"]
        assert error.startswith(label) and error.endswith(f"number from {smallest} to {largest}")
    for broken in ({"picture": "x"}, {"picture": 5}, {"mode": "nosuch"}, {"strength": None}):
        assert "\n" not in ask(server, **broken)["error"]
    assert ask(server, {"Origin": server, "Host": server.removeprefix("http://")}, steps="x")["error"]
    for header in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            ask(server, header)


def test_ctrl_c_amid_a_picture(run):
    with served(run, subprocess.PIPE) as (address, process), asking(address, steps="50") as answer:
        assert "hint" in json.loads(answer.readline())
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130 and process.stderr.read().startswith("interrupted\n")


# In the browser


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
    """A page that has painted its example; nothing on it may ask another host, or complain."""
    page, elsewhere, complaints = browser.new_page(viewport={"width": 1280, "height": 900}, has_touch=True), [], []
    page.set_default_timeout(300_000)
    page.on("request", lambda request: request.url.startswith((server, "data:")) or elsewhere.append(request.url))
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(error))
    page.goto(server)
    page.get_by_text("Settings").click()
    page.get_by_label("DDIM steps").fill("6")
    painted(page)
    yield page
    page.close()
    assert not elsewhere and not complaints


def painted(page) -> None:
    """Wait until all snapshots are, for what is asked now."""
    page.locator("#status", has_text="the jump").wait_for()
    assert not page.locator(".old").count()


def decoded(url: str) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1]"""
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return fit_image(picture, picture.width)[None] * 2 - 1


def shown(page, name: str) -> torch.Tensor:
    """A picture on the page."""
    return decoded(page.locator(f"#{name}").get_attribute("src"))


def status(page, text: str) -> None:
    page.locator("#status", has_text=text).wait_for()


def strokes(page) -> tuple[int, list[float]]:
    """White pixels of the drawing, and their centre in shares of the side."""
    drawing = decoded(page.evaluate("() => document.querySelector('canvas').toDataURL()"))
    places = torch.nonzero(drawing[0, 0] > 0).double()
    return len(places), (places.mean(dim=0).flip(0) / 512).tolist()


def test_one_drawing_through_the_training(page):
    """Once it is painted, slider, strip and Play swap pictures that are there; the dots lie under the thumb."""
    requests, caption, slider = [], page.locator("#caption"), page.locator("#step")
    page.on("request", lambda request: requests.append(request.url) if request.url.startswith("http") else None)
    status(page, f"Between steps {JUMP - 10} and {JUMP} the picture turns to your drawing: the jump.")
    assert circle_iou(shown(page, "sample"), (shown(page, "outline") + 1) / 2).item() > 0.7
    slider.fill("0")
    assert caption.inner_text() == "With the hint, step 0" and torch.equal(shown(page, "sample"), shown(page, "alone"))
    slider.press("ArrowRight")
    assert caption.inner_text() == "With the hint, step 10"
    page.get_by_role("button", name="step 30").click()
    assert slider.input_value() == "30" and caption.inner_text() == "With the hint, step 30"
    page.get_by_role("button", name="Play the training").click()
    assert slider.input_value() == "0"
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="Play the training").wait_for()
    assert slider.input_value() == "40" and caption.inner_text() == "With the hint, step 40" and not requests
    box, thumb = slider.bounding_box(), 16
    dots = [dot.bounding_box() for dot in page.locator("#marks i").all()]
    for step, dot in zip(STEPS, dots, strict=True):
        under = box["x"] + thumb / 2 + (box["width"] - thumb) * step / 40
        assert abs(dot["x"] + dot["width"] / 2 - under) < 1
    assert "% at step 20" in page.locator("#plot").get_attribute("aria-label")
    assert page.locator("#strip button").all_inner_texts() == [f"step {step}" for step in STEPS]


def test_the_jump_is_marked_once_its_neighbours_are_painted(page):
    """Of fewer snapshots the middle of the gap would be marked, far from the jump."""
    picture = page.locator("#sample").get_attribute("src")
    distances = {40: 0.5, 0: 0.0, 20: 0.4, 10: 0.1, 30: 0.5}
    lines = [json.dumps({"step": step, "distance": distances[step], "picture": picture}) for step in distances]
    answer = [json.dumps({"hint": picture, "notes": []})]
    page.route("**/paint", lambda route: route.fulfill(body="\n".join([*answer, ""])))
    for painted, line in enumerate(lines, 1):
        answer.append(line)
        page.get_by_label("Seed").fill(str(painted))
        status(page, f"Painted: {painted} of 5 snapshots.")
        assert page.locator("#marks b").count() == (painted > 3)
    assert "left: 37.5%" in page.locator("#marks b").get_attribute("style")


def test_drawing(page):
    """The first stroke takes the example's place; old results are dimmed at once; a ring that is drawn is followed."""
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
    assert ring < (dotted := strokes(page)[0]) < ring + 60  # a dot of 5 pixels across
    touch = page.context.new_cdp_session(page)
    fingers = [{"x": box["x"] + 50, "y": box["y"] + 50, "id": 0}, {"x": box["x"] + 90, "y": box["y"] + 90, "id": 1}]
    for kind, count in (("touchStart", 1), ("touchStart", 2), ("touchMove", 2), ("touchEnd", 0)):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers[:count]})
    assert strokes(page)[0] == dotted  # a pinch draws nothing
    page.get_by_role("button", name="Undo").click()
    assert strokes(page)[0] == ring
    page.get_by_role("radio", name="Place a ring").check()
    page.get_by_label("Left–right").fill("0.7")
    assert strokes(page)[1] == pytest.approx((0.7, 0.5), abs=0.01)


def test_an_empty_drawing_is_no_error_until_paint(page):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.get_by_role("button", name="Clear").click()
    page.locator("#step").fill("20")
    assert page.get_by_text("draw here").is_visible() and page.locator("#status").inner_text() == ""
    page.get_by_role("button", name="Paint").click()
    status(page, "Nothing is drawn: draw a line in the black square.")
    page.get_by_role("radio", name="Picture").check()
    assert page.locator("#status").inner_text() == "" and page.get_by_text("White lines on black").is_visible()
    page.get_by_role("button", name="Paint").click()
    status(page, "There is no picture yet: choose one.")
    assert not asked


def test_what_is_typed(page):
    """A number that can't be is one sentence; one's own prompt stays until a colour changes; a long one is cut."""
    for text in ("2.5", "", "-20", "55"):
        page.get_by_label("DDIM steps").fill(text)
        status(page, "DDIM steps must be a whole number from 1 to 50")
    prompt, coral = page.get_by_label("Prompt"), page.locator("#disc [value=coral]")
    prompt.fill("my own words " * 40)
    coral.focus()
    page.keyboard.press("Tab")
    coral.click()
    page.get_by_label("DDIM steps").fill("1")
    assert prompt.input_value() == "my own words " * 40
    status(page, "the prompt is too long and is cut from:")
    page.get_by_label("All 139 colours").check()
    page.locator("#background [value=tomato]").check()
    assert prompt.input_value() == "coral circle with tomato background"


def test_pictures_that_are_sent(page, tmp_path):
    """A hint is one; dark lines on white are named, and inverted; what is no picture is refused in one sentence."""
    ring_picture(200).save(tmp_path / "ring.png")
    Image.eval(ring_picture(200), lambda value: 255 - value).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("this is no picture")
    expected = fit_image(open_image(tmp_path / "ring.png"), 128)[None] * 2 - 1
    page.get_by_role("radio", name="Picture").check()
    page.locator("#file").set_input_files(tmp_path / "ring.png")
    painted(page)
    assert (shown(page, "outline") - expected).abs().max() <= 1 / 255 + 1e-6  # rounded to 8 bits
    page.locator("#file").set_input_files(tmp_path / "white.png")
    status(page, "try Invert")
    page.get_by_label("Invert").check()
    painted(page)
    assert (shown(page, "outline") - expected).abs().max() <= 2 / 255 + 1e-6
    page.locator("#file").set_input_files(tmp_path / "text.png")
    status(page, "text.png is damaged or no picture")
    assert page.locator("#with.old").count() == 1


def test_two_tabs_take_turns(page, server):
    """The second one gets its picture while the first one's snapshots are still being painted."""
    second, held = page.context.browser.new_page(), []
    second.route("**/paint", lambda route: held.append(route))
    page.get_by_label("DDIM steps").fill("50")
    page.locator("#caption", has_text="of 50").wait_for()
    with second.expect_request("**/paint"):
        second.goto(server)
    status(second, "Waiting for its turn")
    held[0].continue_()
    second.locator("#sample[src]").wait_for(timeout=300_000)
    assert page.locator("#through.old, #strip :disabled").count()
    second.close()


def test_everything_has_its_place_and_its_name(page):
    """Nothing is wider than the window, no two parts overlap, each control has a name; the arrows move between tabs."""
    page.get_by_label("All 139 colours").check()
    for width, scheme in ((1366, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
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
    assert not page.evaluate("() => [...document.images].filter((image) => image.tabIndex >= 0).length")
    assert not page.get_by_text("share", exact=False).filter(has_not_text="hints").count()
    page.get_by_role("radio", name="Draw").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="Place a ring").is_checked() and page.get_by_label("Size").is_visible()
    page.evaluate("() => (document.body.className = 'single')")  # as without --run
    assert page.get_by_text("python train.py").is_visible() and not page.locator("#through").is_visible()
