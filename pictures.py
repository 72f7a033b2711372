"""Pictures: samples as PNGs, previews of a training, and the plot of its convergence.

`python pictures.py LOG.jsonl ... --output convergence.png` plots one training, or several over each other.
"""

import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin
from torch import Tensor

from files import ArgumentParser, UserError, read_log, run, write_atomically
from metrics import growth_step, jump_step

MARGIN = 60  # pixels left of a contact sheet's pictures, for the labels


def to_picture(image: Tensor) -> Image.Image:
    """One image [3, H, W] in [-1, 1] as a Pillow picture."""
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def save_picture(picture: Image.Image, path: Path, settings: dict | None = None) -> None:
    """Write a PNG; `settings` go into its text chunk "settings" as JSON."""
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_text("settings", json.dumps(settings))
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info))


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one height as one row."""
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))


def contact_sheet(rows: dict[str, Tensor], captions: list[str]) -> Image.Image:
    """Rows of images [N, 3, H, W] in [-1, 1] by their labels, one column a pair, with the captions below."""
    side = next(iter(rows.values())).shape[-1]
    sheet = Image.new("RGB", (MARGIN + side * len(captions), side * len(rows) + 64), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (label, images) in enumerate(rows.items()):
        draw.text((4, side * y + side // 2), label, fill="black")
        for x, image in enumerate(images):
            sheet.paste(to_picture(image), (MARGIN + side * x, side * y))
    for x, caption in enumerate(captions):
        lines = textwrap.wrap(caption, max(side // 7, 8))[:4]
        draw.text((MARGIN + side * x + 2, side * len(rows) + 2), "\n".join(lines), fill="black", font_size=10)
    return sheet


def plot_convergence(histories: dict[str, list[dict]], path: Path) -> None:
    """Training loss, held-out loss, hint sensitivity, hint gap and IoU over the steps of one or more logs, as a PNG.

    Dotted: the step at which the sensitivity was seen to grow; dashed: the jump.
    """
    from matplotlib.figure import Figure

    panels = {  # field of the log -> title
        "loss": "training loss, equation (5): mean of 25 steps",
        "heldout_loss": "loss on held-out pairs, fixed times and noise",
        "hint_sensitivity": "hint sensitivity: how far another hint moves ε",
        "hint_gap": "hint gap: what another hint adds to the loss",
        "iou": "IoU of the sampled disc with the hint's",
    }
    panels = {field: title for field, title in panels.items() if any(field in e for h in histories.values() for e in h)}
    marks = [((":", growth_step(history)), ("--", jump_step(history))) for history in histories.values()]
    figure = Figure(figsize=(7, 1.9 * len(panels) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (field, title) in zip(axes, panels.items()):
        axis.set_title(title, loc="left", fontsize=9)
        axis.grid(alpha=0.3)
        for i, (label, history) in enumerate(histories.items()):
            steps, values = np.array([(e["step"], e[field]) for e in history if field in e]).reshape(-1, 2).T
            if field == "loss" and len(values) >= 25:  # a single batch says next to nothing
                steps, values = steps[24:], np.convolve(values, np.full(25, 1 / 25), "valid")
            if field == "iou":  # at step 0 the samples are the base's
                steps, values = np.append(0, steps), np.append(history[steps[0].astype(int) - 1]["base_iou"], values)
            marker = "." if len(values) < 60 else ""
            axis.plot(steps, values, color=f"C{i}", linewidth=1, marker=marker, label=label)
            for style, step in marks[i]:
                if step is not None:
                    axis.axvline(step, color=f"C{i}", linestyle=style, linewidth=0.8)
        if field == "hint_sensitivity":
            axis.set_yscale("log")
    axes[-1].set_xlabel("optimizer step")
    if len(histories) > 1:
        axes[0].legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def main() -> None:
    parser = ArgumentParser(description="Plot the logs of trainings.")
    parser.add_argument("log", nargs="+", type=Path, help="log.jsonl of a run; several are drawn over each other")
    parser.add_argument("--output", type=Path, default=Path("convergence.png"), help="default: convergence.png")
    args = parser.parse_args()
    histories = {}
    for path in args.log:
        if not path.is_file():
            raise UserError(f"{path}: no such file; pass a run's log.jsonl")
        histories[path.parent.name if path.stem == "log" else path.stem] = read_log(path)
    plot_convergence(histories, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
