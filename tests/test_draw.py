"""The page: what it samples with, and the page itself in a real browser, where there is one."""

import base64
import importlib.util
import io
import json
import shutil
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import draw
from controlnet import ControlNet
from data import draw_fill50k
from metrics import circle_iou
from stable_diffusion import StableDiffusion
from support.checkpoints import find_snapshots
from support.errors import UserError
from support.pictures import fit_image, open_image, to_picture
from support.threads import as_it_happens
from tools.capture_page import BROWSER, address_of, draw_ring, go_to, served, settled
from weights import save_controlnet

PLAYWRIGHT = importlib.util.find_spec("playwright")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as the page needs it: a snapshot before the first step, one after the last, a log."""
    folder, sd = tmp_path_factory.mktemp("run"), StableDiffusion.load("tiny")
    (folder / "config.json").write_text('{"base": "tiny", "resolution": 128}')
    untrained = ControlNet.from_unet(sd.unet, sd.preset.hint_channels)
    save_controlnet(untrained, folder / "snapshots" / "step-0.safetensors", dtype=torch.float16)
    shutil.copy(draw.SHIPPED, folder / "snapshots" / "step-800.safetensors")
    entry = {"hint_sensitivity": 1e-6, "followed": 0.0, "base_followed": 0.0}
    entries = [{"step": 10} | entry, {"step": 800, "hint_sensitivity": 0.1, "followed": 1.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.fixture(scope="module")
def painter(run):
    sd = StableDiffusion.load("tiny")
    return draw.Painter(sd, find_snapshots(run)[1], sd.preset.resolution, lambda hint: hint)


SETTINGS = {"prompt": "coral circle with navy background", "seed": 0, "guidance_scale": 4.0, "steps": 10}


def test_as_it_happens():
    """What is shown comes before the work is done; its error comes too."""
    seen = []

    def work(show):
        for i in range(2):
            show(i)
        return "done"

    for value in as_it_happens(work):
        seen.append(value)
    assert seen == [0, 1, "done"]
    shown = as_it_happens(lambda show: show(1) or 1 / 0)
    assert next(shown) == 1
    with pytest.raises(ZeroDivisionError):
        next(shown)


def test_a_placed_ring_is_a_hint_of_the_task(painter):
    """The same outline as draw_fill50k's, for the numbers that it drew."""
    random = np.random.default_rng([0, 5])
    random.integers(1)
    radius, (x, y) = random.uniform(1 / 8, 1 / 2), random.uniform(0.19, 0.80, 2)
    assert torch.equal(painter.ring(x, y, radius), fit_image(draw_fill50k(5, 128)[0], 128))


def test_each_step_is_shown_and_step_zero_is_the_base(painter):
    """Equation (3): before the first step the hint changes nothing, bit for bit, with the snapshot's half precision."""
    hint = painter.ring(0.4, 0.6, 0.25)
    alone = painter.alone((128, 128), **SETTINGS)
    pictures = list(painter.paint(hint, step=0, strength=1.0, mode="uniform", **SETTINGS))
    assert len(pictures) == 10 + 1
    assert pictures[-1].tobytes() == alone.tobytes() != pictures[0].tobytes()
    last = list(painter.paint(hint, step=790, strength=1.0, mode="uniform", **SETTINGS))[-1]  # the nearest: 800
    assert last.tobytes() != alone.tobytes()


def test_a_drawing_is_a_hint_already(run, tmp_path):
    """--detect is for pictures: the edges of a drawn stroke would be two lines."""
    page, sd = pytest.importorskip("support.page"), StableDiffusion.load("tiny")
    painter = draw.Painter(sd, find_snapshots(run)[1], 128, lambda hint: 1 - hint)
    ring, data = to_picture(painter.ring(0.5, 0.5, 0.3) * 2 - 1), io.BytesIO()
    ring.save(data, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    (tmp_path / "ring.png").write_bytes(data.getvalue())
    drawn, sent = (page.read_hint(painter, tab, (), url, str(tmp_path / "ring.png")) for tab in ("draw", "picture"))
    assert torch.equal(drawn, painter.ring(0.5, 0.5, 0.3)) and torch.equal(sent, 1 - drawn)


def test_mistakes_on_the_command_line(tmp_path, monkeypatch, run):
    def error(*options):
        monkeypatch.setattr(sys, "argv", ["draw.py", *map(str, options)])
        with pytest.raises(UserError) as raised:
            draw.main()
        return str(raised.value)

    assert "leave out --base and --controlnet" in error("--run", run, "--base", "sd15")
    assert "must be a whole number from 1 to 65535" in error("--port", "70000")
    assert "config.json" in error("--run", tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')  # not a run's
    assert "has no snapshots: train with --snapshot-steps" in error("--run", tmp_path)
    (tmp_path / "config.json").write_text('{"base": "tiny", "resolution": 128}')
    assert "has no snapshots: train with --snapshot-steps" in error("--run", tmp_path)
    sd = StableDiffusion.load("tiny")
    path = tmp_path / "snapshots" / "step-5.safetensors"
    save_controlnet(ControlNet.from_unet(sd.unet, (8, 16, 24, 32)), path, metadata={"unlock_decoder": "true"})
    assert "changed the base's decoder" in error("--run", tmp_path)
    monkeypatch.setattr(draw, "find_spec", lambda name: None)
    assert error() == "the page needs gradio: pip install -r requirements-app.txt"


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("1", (300, 200)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", 60_000).size == (300, 200)
    with pytest.raises(UserError, match="a.png has 0 megapixels"):
        open_image(tmp_path / "a.png", 59_999)


def test_what_the_page_says_when_memory_runs_out():
    gradio, page = pytest.importorskip("gradio"), pytest.importorskip("support.page")

    @page.in_one_sentence
    def listener():
        yield 1
        raise MemoryError("can't allocate 9 GB")

    values = listener()
    assert next(values) == 1
    with pytest.raises(gradio.Error, match="out of memory .can't allocate 9 GB.: try fewer programs, or a lower --res"):
        next(values)


def test_nothing_is_kept_when_it_ends_amid_a_picture(run, tmp_path):
    pytest.importorskip("gradio")
    with served(run, tmp_path) as address:
        values = [800, "ring", 0.5, 0.5, 0.3, None, None, "coral circle with navy background", 0, 1, 3, 50, "uniform"]
        body = {"data": values, "fn_index": 0, "session_hash": "user"}
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(
            urllib.request.Request(f"{address}/gradio_api/queue/join", json.dumps(body).encode(), headers)
        ).close()
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("temporary/draw-*/*/image.png"))) < 3:  # the hint and two of the fifty
            assert time.monotonic() < until
            time.sleep(0.05)
    assert not list(tmp_path.glob("temporary/draw-*"))


# In the browser


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    """The page of `python draw.py --run`, with all that Gradio keeps in a folder of the test's."""
    if not PLAYWRIGHT:
        pytest.skip("playwright is not installed")
    if not BROWSER:
        pytest.skip("no Chromium or Chrome is installed")
    folder = tmp_path_factory.mktemp("page")
    with served(run, folder) as address:
        yield address
    log = (folder / "page.log").read_text()
    assert "Traceback" not in log, log
    assert not list((folder / "temporary").glob("draw-*"))  # nothing that was sent or shown is kept


@pytest.fixture
def page(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        elsewhere, complaints = [], []
        page.on("request", lambda request: elsewhere.append(request.url) if not request.url.startswith(
            (address, "data:", "blob:")) else None)  # fmt: skip
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(address)
        page.wait_for_selector("#alone img")
        settled(page)
        yield page
        browser.close()
        assert not elsewhere and not complaints


def shown(page, name: str) -> torch.Tensor:
    """A picture on the page, [1, 3, H, W] in [-1, 1]."""
    data = page.request.get(address_of(page, name)).body()
    return fit_image(Image.open(io.BytesIO(data)), 128)[None] * 2 - 1


def message(page) -> str:
    """The sentence that the page shows, and that it then closes."""
    text = page.get_by_test_id("toast-text").first.inner_text()
    page.get_by_test_id("toast-close").first.click()
    page.get_by_test_id("toast-text").wait_for(state="detached")
    return text


def test_the_picture_follows_the_ring_that_is_drawn(page):
    """With the trained snapshot; before the first step it is the base's picture, bit for bit."""
    draw_ring(page, 0.4, 0.55, 0.25)
    settled(page)
    hint = (shown(page, "hint") + 1) / 2
    assert circle_iou(shown(page, "sample"), hint).item() > 0.7 > circle_iou(shown(page, "alone"), hint).item()
    rows, columns = torch.nonzero(hint[0, 0] > 0.5).double().T / 128
    assert abs(rows.mean() - 0.55) < 0.01 and abs(columns.mean() - 0.4) < 0.01
    go_to(page, 0)
    settled(page)
    assert torch.equal(shown(page, "sample"), shown(page, "alone"))


def test_what_is_no_picture_is_refused_in_one_sentence(page, tmp_path):
    """An empty drawing, a text, too many pixels: a sentence each, and what was shown stays."""
    before = address_of(page, "sample")
    page.get_by_role("tab", name="Draw").click()
    page.get_by_role("button", name="Paint").click()
    assert message(page) == "the drawing is empty: draw a line in the black square"
    (tmp_path / "text.png").write_text("this is no picture")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    page.get_by_role("tab", name="Picture").click()
    for name, sentence in (("text", "is damaged or no picture"), ("large", "has 100 megapixels: at most 50 are read")):
        page.locator("input[type=file]").set_input_files(tmp_path / f"{name}.png")
        text = message(page)
        assert text.startswith(f"{name}.png ") and sentence in text and "/" not in text and "\n" not in text
        page.locator("#upload").get_by_role("button", name="Clear").click()
    assert address_of(page, "sample") == before


def test_a_hint_is_sent(page, tmp_path):
    draw_fill50k(0, 200)[0].save(tmp_path / "hint.png")
    page.get_by_role("tab", name="Picture").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "hint.png")
    settled(page)
    hint = (shown(page, "hint") + 1) / 2
    expected = fit_image(open_image(tmp_path / "hint.png"), 128)
    assert torch.equal((hint[0] * 255).round(), (expected * 255).round())
    assert circle_iou(shown(page, "sample"), hint).item() > 0.7


def test_twenty_quick_presses(page):
    """Only the newest waits: the server does not paint twenty pictures."""
    button, began = page.get_by_role("button", name="Paint"), time.monotonic()
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "/queue/join" in request.url else None)
    for _ in range(20):
        button.click()
    pressed = time.monotonic() - began
    settled(page)
    assert len(asked) <= 2 + pressed  # each takes about a second: the first, one for each that was finished, the last


def test_a_full_queue(page, address):
    """One long job runs, and as many wait as may: a further user is told in one sentence, the others are served."""
    from support.page import WAITING

    further = page.context.browser.new_page()
    further.set_default_timeout(120_000)
    further.goto(address)
    settled(further)
    before = address_of(page, "sample")
    page.get_by_role("button", name="Settings").click()
    number = page.get_by_label("number input for DDIM steps")
    with page.expect_request("**/queue/join*") as asked:
        number.fill("50")
        number.press("Enter")
    page.wait_for_function("before => document.querySelector('#sample img').src !== before", arg=before)  # it runs
    request, users, answer = asked.value, [], None
    *values, _, mode = request.post_data_json["data"]
    while len(users) < 2 * WAITING:  # other users, as their browsers would ask, for one DDIM step each
        body = request.post_data_json | {"session_hash": f"user{len(users)}", "data": [*values, 1, mode]}
        answer = page.request.post(request.url, data=body)
        if not answer.ok:
            break
        users.append(body["session_hash"])
    further.get_by_role("button", name="Paint").click()
    assert message(further) == "This application is currently busy. Please try again."
    assert answer.status == 503 and len(users) == WAITING
    long = address_of(page, "sample")
    settled(page)
    assert address_of(page, "sample") != long
    for user in users:
        said = page.request.get(f"{address}/gradio_api/queue/data?session_hash={user}").text()
        events = [json.loads(line.removeprefix("data: ")) for line in said.splitlines() if line]
        done = next(event for event in events if event["msg"] == "process_completed")
        assert done["success"] and page.request.get(done["output"]["data"][-1]["url"]).ok


def test_all_steps_at_once(page):
    page.get_by_role("button", name="All steps at once").click()
    page.wait_for_selector("#strip img[alt='step 800'], #strip >> text=step 800")
    assert page.locator("#strip .thumbnail-item").count() == 2


def test_everything_has_its_place_and_its_name(page):
    """Nothing is wider than the window, no two parts lie over each other, and every control has a name."""
    page.get_by_role("button", name="Settings").click()
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [page.locator(f"#{name}").bounding_box() for name in ("hint", "sample", "alone", "step")]
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                beside = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
                assert beside or a["y"] + a["height"] <= b["y"] or b["y"] + b["height"] <= a["y"]
    nameless = page.evaluate("""
        [...document.querySelectorAll("input, textarea, button, canvas")].filter(part => part.offsetParent && !(
            part.labels?.length || part.ariaLabel || part.title || part.innerText.trim() ||
            part.ariaLabelledByElements || part.querySelector("img[alt]:not([alt=''])")
        )).map(part => part.outerHTML.slice(0, 300))
    """)
    assert not nameless
