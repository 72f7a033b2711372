"""Capture draw.py's page in Chromium, as docs/draw.png and docs/draw.webp: python -m tools.capture_page.

A ring is drawn with the mouse and its sample appears; then the slider goes through the training's snapshots.
"""

import contextlib
import io
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from support.command import run_command_line

from PIL import Image

from support.checkpoints import find_snapshots
from support.errors import UserError
from support.files import write_atomically
from support.options import ArgumentParser
from support.pictures import save_animation

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDE, NARROW = 1280, 1024  # pixels: the still's width, the animation's
RING = 0.42, 0.55, 0.27  # centre and radius, shares of the side
QUIET = 3.0  # seconds without a change after which nothing is being painted
SHOWN_STEPS = 20  # snapshots in the animation
DRAWING, PAINTING, SCRUBBING, HELD = 40, 150, 150, 1200  # milliseconds of each frame; of the last one of a part


@contextlib.contextmanager
def served(run: Path, folder: Path) -> Iterator[str]:
    """The address of `python draw.py --run`, which keeps all its files in `folder`, and page.log beside them.

    Raises UserError if it ends by itself.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "temporary").mkdir()
    command = [sys.executable, "draw.py", "--run", str(run.absolute()), "--port", str(port)]
    kept = {"TMPDIR": str(folder / "temporary"), "HOME": str(folder / "temporary"), "GOMP_SPINCOUNT": "10000"}
    with open(folder / "page.log", "w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=os.environ | kept, stdout=log, stderr=log)
    try:
        while not answers(port):
            if server.poll() is not None:
                raise UserError(f"draw.py has ended: {(folder / 'page.log').read_text().strip()}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def address_of(page, name: str) -> str | None:
    """That of one of the page's pictures, "hint", "sample" or "alone"; None before it is there."""
    image = page.locator(f"#{name} img")
    return image.get_attribute("src") if image.count() else None


def settled(page, watch: Callable[[], object] = lambda: None) -> None:
    """Wait until none of the three pictures has changed for QUIET seconds; call `watch` again and again."""
    seen, since = None, time.monotonic()
    while time.monotonic() - since < QUIET:
        now = [address_of(page, name) for name in ("hint", "sample", "alone")]
        if now != seen:
            seen, since = now, time.monotonic()
        watch()
        page.wait_for_timeout(50)


def draw_ring(page, x: float, y: float, radius: float, watch: Callable[[], object] = lambda: None) -> None:
    """Draw a circle with the mouse; centre and radius are shares of the side. Call `watch` before each move."""
    page.get_by_role("tab", name="Draw").click()
    canvas = page.locator("#canvas canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for i in range(41):
        angle = 2 * math.pi * i / 40
        place = x + radius * math.cos(angle), y + radius * math.sin(angle)
        watch()
        page.mouse.move(box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"])
        if i == 0:
            page.mouse.down()
    page.mouse.up()


def go_to(page, step: int) -> None:
    """Set the slider to a step of the training."""
    number = page.locator("#step input[type=number]")
    number.fill(str(step))
    number.press("Enter")


def fit_height(page, width: int) -> None:
    """Make the window so wide, and as high as all that is on the page."""
    page.set_viewport_size({"width": width, "height": 600})
    page.wait_for_timeout(500)  # for the curves, which are drawn to their width
    page.set_viewport_size({"width": width, "height": page.evaluate("document.documentElement.scrollHeight")})
    page.wait_for_timeout(500)


def film(page, steps: list[int]) -> list[tuple[Image.Image, int]]:
    """The animation's frames, and how many milliseconds each stays. The page is left at the last step."""
    frames: list[tuple[Image.Image, int]] = []

    def take(milliseconds: int) -> None:
        frame = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        if not frames or frame != frames[-1][0]:
            frames.append((frame, milliseconds))

    def hold() -> None:
        frames[-1] = frames[-1][0], HELD

    page.get_by_role("tab", name="Draw").click()
    fit_height(page, NARROW)
    draw_ring(page, *RING, watch=lambda: take(DRAWING))
    settled(page, watch=lambda: take(PAINTING))
    hold()
    for step in sorted({steps[i * (len(steps) - 1) // (SHOWN_STEPS - 1)] for i in range(SHOWN_STEPS)}):
        go_to(page, step)
        settled(page)
        take(SCRUBBING)
    hold()
    return frames


def main() -> None:
    parser = ArgumentParser(prog="python -m tools.capture_page", description="Capture draw.py's page in Chromium.")
    parser.add_argument("--run", type=Path, default=Path("runs/controlnet"), help="default: runs/controlnet")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of both pictures (default: docs)")
    args = parser.parse_args()
    if find_spec("playwright") is None or not BROWSER:
        raise UserError("this needs playwright (pip install -r requirements-dev.txt) and Chromium (your system's)")
    from playwright.sync_api import sync_playwright

    steps = list(find_snapshots(args.run)[1])
    if len(steps) < 2:
        raise UserError(f"{args.run} has one snapshot only: train with a smaller --snapshot-steps")
    with (
        tempfile.TemporaryDirectory() as folder, served(args.run, Path(folder)) as address,
        sync_playwright() as playwright,
    ):  # fmt: skip
        page = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"]).new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        page.wait_for_selector("#alone img")
        settled(page)
        frames = film(page, steps)
        page.get_by_role("button", name="All steps at once").click()
        page.wait_for_selector(f"#strip >> text=step {steps[-1]}")
        fit_height(page, WIDE)
        still = page.screenshot()
    pictures, durations = zip(*frames)
    write_atomically(args.output / "draw.png", lambda temporary: temporary.write_bytes(still))
    save_animation(pictures, durations, args.output / "draw.webp", quality=80)
    for name in ("draw.png", "draw.webp"):
        print(f"wrote {args.output / name}, {(args.output / name).stat().st_size / 1e6:.2f} MB")
    print(f"{len(frames)} frames, {sum(durations) / 1000:.1f} s")


if __name__ == "__main__":
    run_command_line(main)
