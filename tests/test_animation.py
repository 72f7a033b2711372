"""The animation of README: a frame for each preview, looping, with a pause at the end."""

import sys

import torch
from PIL import Image
from standin import ROOT

from support.log import write_log
from support.pictures import contact_sheet, save_picture

sys.path.insert(0, str(ROOT / "notebooks"))
try:
    from animation import COLUMNS, FRAME, PAUSE, SIDE, animate, cut
finally:
    sys.path.pop(0)

ROWS = ("hint", "step 0", "sample", "target")


def test_animation(tmp_path):
    """A run with three previews; each row of them has a grey of its own."""
    log = []
    for step in (10, 20, 30):
        log.append({"step": step, "hint_sensitivity": 1e-5 * step, "hint_gap": 0.0, "heldout_loss": 0.02})
        log[-1] |= {"followed": step / 40, "base_followed": 0.0}
        rows = {label: torch.full((8, 3, SIDE, SIDE), i / 4) for i, label in enumerate(ROWS)}
        save_picture(contact_sheet(rows, ["prompt"] * 8), tmp_path / "previews" / f"step-{step}.png")
    save_picture(Image.new("RGB", (8 * SIDE, SIDE)), tmp_path / "previews" / "step-0.png")
    write_log(tmp_path / "log.jsonl", log)

    for i, row in enumerate(ROWS[:3]):
        pictures = cut(tmp_path, 20, row)
        assert len(pictures) == COLUMNS
        assert all(picture.getcolors() == [(SIDE**2, (round((i / 4 + 1) * 127.5),) * 3)] for picture in pictures)

    animate(tmp_path, tmp_path / "jump.webp")
    with Image.open(tmp_path / "jump.webp") as animation:
        assert animation.n_frames == 4 and animation.info["loop"] == 0
        assert animation.width == 830
        durations = []
        for frame in range(4):
            animation.seek(frame)
            animation.load()
            durations.append(animation.info["duration"])
            assert animation.convert("RGB").getpixel((20, 10)) == (255, 255, 255)  # on a dark page too
    assert durations == [3 * FRAME, FRAME, FRAME, PAUSE]
