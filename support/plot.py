"""Plots of a training, from its log."""

from pathlib import Path

import numpy as np

from support.files import write_atomically

PANELS = {  # field of the log -> title
    "loss": "training loss, equation (5): mean of 25 steps",
    "heldout_loss": "loss on held-out pairs, fixed times and noise",
    "hint_sensitivity": "hint sensitivity: how far another hint moves ε",
    "hint_gap": "hint gap: what another hint adds to the loss",
    "iou": "IoU of the sampled disc with the hint's: mean, and thin, each hint",
    "followed": "share of hints that samples follow (IoU at least 0.7)",
}


def curve(history: list[dict], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a log's field, ready to plot; both empty if it was never measured.

    Of a list, one value for each held-out hint, the values are [steps, hints]: a line each.
    """
    points = [(entry["step"], entry[field]) for entry in history if field in entry]
    if base := [(0, entry[f"base_{field}"]) for entry in history if f"base_{field}" in entry]:
        points = base[:1] + points  # the base's own samples
    steps, values = (np.array([point[i] for point in points], dtype=float) for i in range(2))
    if field == "loss" and len(values) >= 25:  # a single batch says next to nothing
        steps, values = steps[24:], np.convolve(values, np.full(25, 1 / 25), "valid")
    return steps, values


def plot_logs(histories: dict[str, list[dict]], marks: dict[str, dict[str, int | None]], path: Path) -> None:
    """A panel for each field that was logged, over the steps, as a PNG. `marks`: line style -> step, for each log."""
    from matplotlib.figure import Figure

    measured = {name for history in histories.values() for entry in history for name in entry}
    panels = {field: title for field, title in PANELS.items() if field in measured}
    figure = Figure(figsize=(7, 1.9 * len(panels) + 0.6), layout="constrained")
    axes = figure.subplots(max(len(panels), 1), 1, sharex=True, squeeze=False)[:, 0]
    for axis, title in zip(axes, panels.values()):
        axis.set_title(title, loc="left", fontsize=9)
        axis.grid(alpha=0.3)
    for i, (name, history) in enumerate(histories.items()):
        label = name.replace("$", r"\$")  # else it begins a formula
        for axis, field in zip(axes, panels):
            steps, values = curve(history, field)
            axis.plot(steps, values, f"C{i}", linewidth=1, marker="." if len(values) < 60 else "", label=label)
            if field == "hint_sensitivity" and values.any():
                axis.set_yscale("log")
            if field == "iou":
                axis.plot(*curve(history, "ious"), f"C{i}", linewidth=0.4, alpha=0.5)
            for style, step in marks[name].items():
                if step is not None:
                    axis.axvline(step, color=f"C{i}", linestyle=style, linewidth=0.8)
    axes[-1].set_xlabel("optimizer step")
    if len(histories) > 1:
        axes[0].legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
