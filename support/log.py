"""A run's log.jsonl, one JSON object a line."""

import contextlib
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from support.errors import writing
from support.files import write_atomically


def is_measured(value) -> bool:
    """Whether it is a number, or a list of numbers, one for each held-out hint."""
    return all(isinstance(number, int | float) for number in (value if isinstance(value, list) else [value]))


def read_log(path: Path) -> list[dict]:
    """A log's entries; none if there is no log. Other lines are left out, such as one that a crash cut short."""
    lines, entries = path.read_bytes().splitlines() if path.exists() else [], []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
            entry = json.loads(line)
            if "step" in entry and all(is_measured(value) for value in entry.values()):
                entries.append(entry)
    if len(entries) < len(lines):
        print(f"{path}: {len(lines) - len(entries)} of {len(lines)} lines are no entries and left out")
    return entries


def write_log(path: Path, entries: list[dict]) -> None:
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    write_atomically(path, lambda temporary: temporary.write_text(text))


class Log:
    """The log of a run that goes on after `last_step`, trimmed to it, and TensorBoard's files beside it if asked for.

    `history` holds all entries. The last one can still grow until `write` is called.
    """

    def __init__(self, folder: Path, last_step: int, tensorboard: bool):
        self.folder, self.path, self.writer = folder, folder / "log.jsonl", None
        self.history = [entry for entry in read_log(self.path) if entry["step"] <= last_step]
        write_log(self.path, self.history)
        self.began = time.monotonic() - max((entry.get("seconds", 0) for entry in self.history), default=0)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with writing(folder, "another --output-dir"):
                self.writer = SummaryWriter(folder / "tensorboard", purge_step=last_step + 1)

    def write(self) -> None:
        """Append the last entry to the file."""
        entry = self.history[-1]
        entry["seconds"] = round(time.monotonic() - self.began, 2)
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        if self.writer:
            for name, value in entry.items():
                if not isinstance(value, list):
                    self.writer.add_scalar(name, value, entry["step"])
            preview = self.folder / "previews" / f"step-{entry['step']}.png"
            if preview.exists():
                with Image.open(preview) as picture:
                    self.writer.add_image("preview", np.asarray(picture), entry["step"], dataformats="HWC")
            self.writer.flush()
