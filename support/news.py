"""What a training tells its user on the console: growth, forecast and jump, as they come."""

from convergence import forecast, growth_step, jump_step


def news(history: list[dict]) -> list[str]:
    """What the last entry of a log tells the user, a line each."""
    entry, lines = history[-1] if history else {}, []
    if "hint_gap" in entry:
        if growth_step(history) == entry["step"]:
            lines.append(f"the hint sensitivity is growing: {entry['hint_sensitivity']:.1e}")
        if (expected := forecast(history)) and expected[0] == entry["step"] and jump_step(history) is None:
            lines.append(f"samples begin to follow their hints at about step {expected[1]}, give or take a third")
        if jump_step(history) == entry["step"]:
            lines.append(
                "the jump: another pair's hint raises the held-out loss by half, samples begin to follow their hints"
            )
    if "iou" in entry:
        lines.append(f"IoU of samples and hints {entry['iou']:.2f} (the base's: {entry['base_iou']:.2f}), "
                     f"{entry['followed']:.0%} of hints followed")  # fmt: skip
    return [f"step {entry['step']}: {line}" for line in lines]
