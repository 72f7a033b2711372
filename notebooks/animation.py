"""The animation that opens README: a training's samples and curves, step by step.

`python notebooks/animation.py runs/seed-0 --output docs/jump.webp` draws it from a run's previews and log. White all
over, with a border, so that it looks the same on a dark page as on a light one.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from convergence import jump_step
from support.checkpoints import steps_in
from support.errors import run_command_line
from support.log import read_log
from support.pictures import MARGIN, save_animation
from support.plot import curve

SIDE, COLUMNS, LABELS = 128, 6, 58  # of a sample; hints shown; pixels left of them: 826 in all, and the border
ROWS = {"hint": 0, "step 0": 1, "sample": 2}  # of a preview
BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart by the colour-blind
FRAME, PAUSE = 350, 4000  # milliseconds: each step, and the last one before it starts again


def cut(folder: Path, step: int, row: str) -> list[Image.Image]:
    """The first COLUMNS pictures in a row of a run's preview."""
    with Image.open(folder / "previews" / f"step-{step}.png") as sheet:
        corners = [(MARGIN + SIDE * column, SIDE * ROWS[row]) for column in range(COLUMNS)]
        return [sheet.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]


def draw_curves(history: list[dict], step: int, last: int) -> Image.Image:
    """Hint sensitivity and share of hints followed up to `step`, on axes that reach to `last`."""
    figure = Figure(figsize=((LABELS + SIDE * COLUMNS) / 100, 2.3), dpi=100, layout="constrained")
    panels = {"hint_sensitivity": (BLUE, "o", "hint sensitivity"), "followed": (ORANGE, "s", "hints followed, %")}
    jump = jump_step(history)
    for axis, (field, (colour, marker, label)) in zip(figure.subplots(1, 2), panels.items()):
        steps, values = curve(history, field)
        values = values * 100 if field == "followed" else values
        drawn = steps <= step
        axis.plot(steps[drawn], values[drawn], color=colour, linewidth=2)
        axis.plot(steps[drawn][-1:], values[drawn][-1:], marker, color=colour, markersize=9)
        if jump and step >= jump:
            axis.axvline(jump, color="black", linestyle="--", linewidth=1)
            axis.annotate("jump", (jump, 0.06), (4, 0), ("data", "axes fraction"), "offset points")
        if field == "followed":
            axis.set_ylim(-4, 104)
        else:
            axis.set(yscale="log", ylim=(values.min() / 1.5, values.max() * 1.5))
        axis.set(xlim=(-0.02 * last, 1.02 * last), xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def draw_frame(hints: list[Image.Image], samples: list[Image.Image], curves: Image.Image, step: int) -> Image.Image:
    frame = Image.new("RGB", (curves.width, 2 * SIDE + 6 + curves.height), "white")
    draw = ImageDraw.Draw(frame)
    for y, (label, row) in zip((0, SIDE + 2), (("hint", hints), (f"step\n{step}", samples))):
        draw.multiline_text((8, y + SIDE // 2), label, "black", font_size=17, anchor="lm", align="left")
        for column, image in enumerate(row):
            frame.paste(image.crop((1, 0, SIDE - 1, SIDE)), (LABELS + SIDE * column, y))
    frame.paste(curves, (0, 2 * SIDE + 6))
    return ImageOps.expand(frame, 2, "#b0b0b0")


def animate(folder: Path, output: Path) -> None:
    """Write the animated WebP of a run that has previews and their scores."""
    history, previews = read_log(folder / "log.jsonl"), sorted(steps_in(folder / "previews", ".png"))
    steps = [step for step in previews if step > 0]
    last, hints = steps[-1], cut(folder, steps[0], "hint")
    frames = [draw_frame(hints, cut(folder, steps[0], "step 0"), draw_curves(history, 0, last), 0)]
    for step in steps:
        frames.append(draw_frame(hints, cut(folder, step, "sample"), draw_curves(history, step, last), step))
    durations = [3 * FRAME] + [FRAME] * (len(frames) - 2) + [PAUSE]
    save_animation(frames, durations, output, quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a training's samples and curves as an animated WebP.")
    parser.add_argument("run", type=Path, help="a run of train.py with previews")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "jump.webp", help="default: docs/jump.webp")
    args = parser.parse_args()
    animate(args.run, args.output)


if __name__ == "__main__":
    run_command_line(main)
