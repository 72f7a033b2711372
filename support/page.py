"""draw.py's page: a small server for this computer's browsers alone. What is sent to it stays in memory."""

import base64
import contextlib
import io
import json
import os
import re
import select
import signal
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path
from socketserver import ThreadingTCPServer

import numpy as np
from PIL import Image

from support.colours import COLOURS
from support.devices import small
from support.errors import UserError, known_cause, reading
from support.pictures import open_image
from support.plot import curve

FILES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
LARGEST_FILE = 20 * 2**20  # that is read, in bytes
NUMBERS = {  # name -> label, smallest, largest, step
    "seed": ("Seed", 0, 2**32 - 2, 1),
    "strength": ("Strength of the ControlNet", 0, 2, 0.05),
    "guidance_scale": ("Guidance scale", 1, 15, 0.5),
    "steps": ("DDIM steps", 1, 50, 1),
}
FIRST = ("coral", "red", "orange", "gold", "green", "teal", "aqua", "blue", "navy", "purple", "white", "black")


class Page(ThreadingTCPServer):
    """Listens at 127.0.0.1:`port`. One picture is painted at a time; of several pages that want one, each in turn."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, port: int):
        self.painting = ThreadPoolExecutor(1)
        try:
            super().__init__(("127.0.0.1", port), Request)
        except OSError as error:
            raise UserError(f"port {port} can't be used ({error.strerror.lower()}): choose another --port") from None

    def serve(self, painter, modes: Sequence[str], detect: str, log: list[dict]) -> None:
        """Answer until Ctrl-C, with a Painter's pictures."""
        preset, live = painter.sd.preset, small(painter.sd.unet)  # live: fast enough to paint at each change
        few = 10 if live else preset.sampling_steps  # rougher than sample.py paints, and twice as fast
        values = {"seed": 0, "strength": 1, "guidance_scale": preset.guidance_scale, "steps": few}
        self.paint, self.facts = painter.paint, {
            "snapshots": list(painter.paths), "curves": curves(log), "live": live, "modes": list(modes),
            "numbers": {name: (*NUMBERS[name], value) for name, value in values.items()}, "detect": detect,
            "colours": [*FIRST, *(name for name in COLOURS if name not in FIRST)], "largest": LARGEST_FILE,
        }  # fmt: skip
        signal.signal(signal.SIGINT, end_at_once)
        print(f"the page is at http://127.0.0.1:{self.server_address[1]}; Ctrl-C ends it", flush=True)
        self.serve_forever()

    def next_event(self, events: Iterator[dict], waiting: socket.socket) -> dict | None:
        self.waiting = waiting
        return next(events, None)

    def check(self) -> None:
        """Raise ConnectionError if nobody waits for the picture in hand: a newer request, a closed page."""
        if select.select([self.waiting], [], [], 0)[0] and not self.waiting.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError


class Request(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        """Say nothing in the terminal."""

    def parse_request(self) -> bool:
        """Refuse what doesn't come from this page: a name that somebody points here, or another page."""
        if not super().parse_request():
            return False
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if re.fullmatch(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", host) and origin in (None, f"http://{host}"):
            return True
        self.send_error(403)
        return False

    def begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", "default-src 'self' data:")  # nothing is fetched from elsewhere
        self.end_headers()

    def send(self, event: dict) -> None:
        self.wfile.write(json.dumps(event, default=data_url).encode() + b"\n")

    def do_GET(self) -> None:
        name = self.path.removeprefix("/") or "page.html"
        if name == "facts":
            self.begin("application/json")
            self.send(self.server.facts)
        elif name in FILES:
            self.begin(f"{FILES[name]}; charset=utf-8")
            self.wfile.write(Path(__file__).with_name(name).read_bytes())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        """Paint: the answer is a line of JSON for each thing that is to be shown, sent as soon as it is there."""
        self.begin("application/x-ndjson")
        try:
            events = self.server.paint(self.send, **self.read())
            while event := self.server.painting.submit(self.server.next_event, events, self.connection).result():
                self.send(event)
            self.send({"done": True})
        except ConnectionError:
            return  # nobody waits any more
        except Exception as error:
            sentence = str(error) if isinstance(error, UserError) else known_cause(error, "a lower --resolution")
            self.send({"error": sentence or "draw.py has a bug: its terminal says more"})
            if not sentence:
                raise

    def read(self) -> dict:
        """What is asked for, as Painter.paint takes it. Raises UserError."""
        with reading("what was sent", "request of this page", "load the page again", damage=Exception):
            asked = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), 2 * LARGEST_FILE)))
            data = base64.b64decode(asked["picture"].partition(",")[2], validate=True)
            mode = self.server.facts["modes"][self.server.facts["modes"].index(asked["mode"])]
            name, prompt, numbers = asked["name"], str(asked["prompt"]), {name: str(asked[name]) for name in NUMBERS}
        numbers = {name: read_number(text, *NUMBERS[name]) for name, text in numbers.items()}
        drawn, picture = asked["tab"] != "picture", open_image(Path(str(name)), data)
        hint = {"picture": picture, "drawn": drawn, "invert": "invert" in asked}
        return hint | {"prompt": prompt, "mode": mode} | numbers


def end_at_once(*_) -> None:
    """On Ctrl-C: Python's own end would wait for the picture in hand, and nothing here is to be saved."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def next_snapshot(steps: list[int], distances: dict[int, float]) -> int | None:
    """Which of a training's snapshots to paint next: None when all have their distance from the base's own picture.

    The last, the first, then always one in the middle of the gap across which the distance changes most: the jump.
    """
    painted = [i for i, step in enumerate(steps) if step in distances]
    if not painted or painted[0] > 0:
        return steps[0] if painted else steps[-1]
    changes = {(a, b): abs(distances[steps[b]] - distances[steps[a]]) for a, b in pairwise(painted) if b - a > 1}
    return steps[sum(max(changes, key=changes.get)) // 2] if changes else None


def curves(log: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """What the log has of a training, as points (step, height from 0 to 1): the sensitivity's logarithm, scaled."""
    steps, sensitivity = curve([entry for entry in log if entry.get("hint_sensitivity")], "hint_sensitivity")
    logarithm = np.log(sensitivity)
    heights = np.interp(logarithm, np.quantile(logarithm, (0, 1)), (0, 1)) if len(steps) else []
    return {"followed": [*zip(*curve(log, "followed"))], "sensitivity": [*zip(steps, heights)]}


def read_number(text: str, label: str, smallest: float, largest: float, step: float) -> float:
    with contextlib.suppress(ValueError):
        number = int(text) if step == 1 else float(text)
        if smallest <= number <= largest:
            return number
    raise UserError(f"{label} must be a {'whole ' * (step == 1)}number from {smallest} to {largest}")


def data_url(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
