"""Capture draw.py's page in Chromium as docs/draw.png and docs/draw.webp: python tests/capture_page.py RUN FOLDER."""

import contextlib
import io
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def served(run: Path, log=None, **variables: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`python draw.py --run` at a free port: its address, and the process. What it complains about goes to `log`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "draw.py", "--run", str(run.absolute()), "--port", str(port)]
    server = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, stderr=log, text=True
    )
    try:
        next(line for line in server.stdout if "Ctrl-C ends it" in line)
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.terminate()
        server.wait(120)


def draw_ring(page, x: float, y: float, radius: float) -> Iterator[None]:
    """Draw a circle with the mouse, pausing at each move; centre and radius are shares of the side."""
    box = page.locator("canvas").bounding_box()
    for i in range(41):
        angle = 2 * math.pi * i / 40
        place = x + radius * math.cos(angle), y + radius * math.sin(angle)
        page.mouse.move(box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"])
        if i == 0:
            page.mouse.down()
        yield
    page.mouse.up()


def main(run: Path, folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    frames, durations = [], []
    with served(run) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1024, "height": 1000})

        def take(milliseconds: int) -> None:
            frames.append(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB"))
            durations.append(milliseconds)

        page.goto(address)
        for _ in draw_ring(page, 0.42, 0.55, 0.27):
            take(40)
        page.locator("#status", has_text="ump").wait_for(timeout=600_000)
        take(2000)
        for step in page.evaluate("() => fetch('facts').then(answer => answer.json()).then(facts => facts.snapshots)"):
            page.locator("#step").fill(str(step))
            take(250)
        durations[-1] = 2000
        page.set_viewport_size({"width": 1280, "height": 1000})
        page.screenshot(path=folder / "draw.png", full_page=True)
    frames[0].save(
        folder / "draw.webp", save_all=True, append_images=frames[1:], duration=durations, quality=80, loop=0
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
