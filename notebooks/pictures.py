"""Pictures of what trainings learn, with words in matplotlib's font: samples, curves, and README's animation."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch import Tensor

from convergence import jump_step
from support.pictures import save_animation, save_picture, to_picture
from support.plot import curve

COLUMNS = 6  # pictures in a row of the animation
PANELS = {"hint_sensitivity": ("hint sensitivity", "#0072b2"), "followed": ("hints followed", "#d55e00")}
FRAME, PAUSE = 120, 4000  # milliseconds: of each frame, and of the first and the last


def label_row(axis: Axes, label: str) -> None:
    axis.set_ylabel(label.replace("-", "\n"), rotation=0, ha="right", va="center", labelpad=8)


def draw_row(axes: Sequence[Axes], label: str, images: Iterable[Tensor]) -> list:
    """Images [3, H, W] in [-1, 1] side by side, the label at their left; returns what can show other images later."""
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    label_row(axes[0], label)
    return [axis.imshow(to_picture(image)) for axis, image in zip(axes, images)]


def rendered(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def draw_sheet(
    rows: dict[str, Sequence[Tensor]], path: Path, titles: Sequence[str] = (), below: Sequence[Sequence[str]] = ()
) -> None:
    """Write rows of images by their labels as a PNG: `titles` above the columns, words of `below` under pictures."""
    columns = max(map(len, rows.values()))
    height = len(rows) * (7.2 / columns + (0.25 if below else 0.04)) + 0.4
    figure = Figure(figsize=(8.4, height), dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, images) in zip(axes, rows.items()):
        draw_row(row, label, images)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=10)
    for row, words in zip(axes, below):
        for axis, text in zip(row, words):
            axis.set_xlabel(text, labelpad=2)
    save_picture(rendered(figure), path)


def draw_curves(logs: dict[str, list[dict]], path: Path) -> None:
    """A panel for each log, nine of them: hint sensitivity and hint gap over the steps, and the jump, as a PNG."""
    figure = Figure(figsize=(8.4, 6.2), dpi=90, layout="constrained")
    axes = figure.subplots(3, 3, sharex=True, sharey=True).flat
    for axis, (name, log) in zip(axes, logs.items()):
        (steps, sensitivity), (_, gap) = (curve(log, field) for field in ("hint_sensitivity", "hint_gap"))
        axis.plot(steps, sensitivity, color="#0072b2", label="hint sensitivity (of the noise, whose size is 1)")
        axis.plot(steps, abs(gap), "--", color="#d55e00", label="hint gap (of the loss)")
        axis.plot(steps[gap < 0], -gap[gap < 0], "v", color="#d55e00", markerfacecolor="white", label="gap below 0")
        jump = jump_step(log)
        if jump:
            axis.axvline(jump, color="black", linestyle=":")
        else:
            axis.plot(steps[-1:], sensitivity[-1:], ">", color="#0072b2", markerfacecolor="white", markersize=9)
        if not sensitivity.any():
            axis.text(0.5, 0.5, "both exactly 0", transform=axis.transAxes, ha="center", va="center")
        axis.set_title(f"{name}: {f'jump at step {jump}' if jump else 'no jump'}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.set(yscale="log", ylim=(1e-7, None))  # below is chance
    figure.supxlabel("optimizer step", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    save_picture(rendered(figure), path)


def animate(log: list[dict], samples: dict[int, Tensor], hints: Tensor, targets: Tensor, path: Path) -> None:
    """Write an animated WebP with a frame for each step of `samples`; the log's curves follow below.

    Hints, targets and samples are [COLUMNS, 3, H, W] in [-1, 1].
    """
    steps, jump = sorted(samples), jump_step(log)
    log = [entry for entry in log if entry["step"] <= steps[-1]]
    # White, with a border, so that it looks the same on a dark page as on a light one.
    figure = Figure(figsize=(8.4, 6.5), dpi=150, facecolor="white", edgecolor="#b0b0b0", linewidth=3)
    rows = figure.subplots(3, COLUMNS, gridspec_kw={
        "left": 0.09, "right": 0.99, "bottom": 0.395, "top": 0.985, "wspace": 0.04, "hspace": 0.04,
    })  # fmt: skip
    draw_row(rows[0], "hint", hints)
    changing = draw_row(rows[1], "", samples[steps[0]])
    draw_row(rows[2], "target", targets)
    axes = figure.subplots(
        1, 2, gridspec_kw={"left": 0.09, "right": 0.99, "bottom": 0.085, "top": 0.35, "wspace": 0.24}
    )
    axes[0].set_yscale("log")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    lines = []
    for axis, (field, (label, colour)) in zip(axes, PANELS.items()):
        when, values = curve(log, field)
        lines += [(line, when, values, slice(None)) for line in axis.plot(when, values, color=colour, linewidth=2)]
        lines += [(line, when, values, slice(-1, None)) for line in axis.plot(when, values, "o", color=colour)]
        axis.set(xlim=(-0.02 * steps[-1], 1.02 * steps[-1]), xlabel="optimizer step", ylabel=label, autoscale_on=False)
        axis.grid(alpha=0.3)
    frames = []
    for step in steps:
        label_row(rows[1][0], f"step\n{step}")
        for picture, sample in zip(changing, samples[step]):
            picture.set_data(to_picture(sample))
        for line, when, values, part in lines:
            line.set_data(when[when <= step][part], values[when <= step][part])
        if step == jump:
            for axis in axes:
                axis.axvline(jump, color="black", linestyle="--", linewidth=1)
                axis.annotate("jump", (jump, 0.05), (4, 0), ("data", "axes fraction"), "offset points")
        frames.append(rendered(figure))
    save_animation(frames, [PAUSE, *[FRAME] * (len(steps) - 2), PAUSE], path, quality=75)
