"""The page: what it paints with, and its server. test_page.py opens it in a browser."""

import base64
import io
import json
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from functools import partial
from threading import Thread

import pytest
import torch
from capture_page import served
from PIL import Image
from standin import JUMP, refusal, ring_picture, run_main

import draw
from convergence import find_checkpoints
from support.errors import UserError
from support.page import NUMBERS, Page
from support.pictures import fit_image
from weights import save_controlnet

SETTINGS = {"prompt": "coral circle with navy background", "mode": "uniform"}
QUICK = {"strength": 1.0, "seed": 0, "guidance_scale": 4.0, "steps": 3}


@pytest.fixture(scope="module")
def painter(snapshots, tiny):
    return draw.Painter(tiny, find_checkpoints(snapshots)[0], tiny.preset.resolution, lambda picture: 1 - picture)


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


def test_what_the_hint_is(painter):
    """--detect is for pictures: the edges of a drawn stroke would be two lines."""
    ring = ring_picture()
    expected = fit_image(ring, 128)
    assert torch.equal(painter.hint(ring, drawn=True, invert=False), expected)
    assert torch.equal(painter.hint(ring, drawn=False, invert=False), 1 - expected)  # as this painter "detects"
    assert torch.equal(painter.hint(ring, drawn=False, invert=True), expected)
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


def test_mistakes_on_the_command_line(controlnet, tmp_path, monkeypatch, snapshots):
    error = partial(refusal, run_main, monkeypatch, draw)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} can't be used (address already in use)" in error("--port", port, "--base", "./nosuch")
    monkeypatch.setattr(draw, "Page", lambda port: None)
    (tmp_path / "config.json").write_text('{"base": "tiny", "resolution": 128}')
    assert f"{tmp_path}: no " in error("--run", tmp_path)
    assert "nosuch" in error("--run", snapshots, "--base", "./nosuch")  # a base that has moved
    save_controlnet(controlnet, tmp_path / "snapshots" / "step-5.safetensors", metadata={"unlock_decoder": "true"})
    assert "changed the base's decoder" in error("--run", tmp_path)


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


def test_two_pages_take_turns(server):
    """The second one gets its picture while the first one's snapshots are still being painted."""
    rest = []
    with asking(server, steps="8") as first:
        assert "hint" in json.loads(first.readline())
        reader = Thread(target=lambda: rest.extend(first.readlines()))
        reader.start()
        with asking(server, steps="1") as second:
            next(line for line in second if b'"step"' in line)
            assert not rest
        reader.join()
    assert json.loads(rest[-1]) == {"done": True}


def test_ctrl_c_amid_a_picture(snapshots):
    with served(snapshots, subprocess.PIPE) as (address, process), asking(address, steps="50") as answer:
        assert "hint" in json.loads(answer.readline())
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130 and process.stderr.read().startswith("interrupted\n")
