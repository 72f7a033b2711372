"""A run's log.jsonl, one JSON object a line."""

import contextlib
import json
import time
from pathlib import Path

from support.errors import writing

import numpy as np
from PIL import Image

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


def trim_log(path: Path, last_step: int) -> list[dict]:
    """Drop what a log says of steps after `last_step`, and a line cut short; returns the entries that stay."""
    kept = [entry for entry in read_log(path) if entry["step"] <= last_step]
    write_log(path, kept)
    return kept


class Log:
    """log.jsonl of a run that goes on after `last_step`, and TensorBoard's files beside it if asked for.

    `history` holds all entries. Raises UserError when the folder can't be written.
    """

    def __init__(self, folder: Path, last_step: int, tensorboard: bool):
        self.folder, self.history = folder, trim_log(folder / "log.jsonl", last_step)
        self.began = time.monotonic() - (self.history[-1].get("seconds", 0) if self.history else 0)
        self.writer = None
        with writing(folder, "another --output-dir"):
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(folder / "tensorboard", purge_step=last_step + 1)
            self.file = open(folder / "log.jsonl", "a")  # noqa: SIM115

    def write(self, entry: dict) -> None:
        """Add a finished step. Raises UserError when the disk is full."""
        self.add(entry)
        with writing(self.file.name):
            self.file.write(json.dumps(self.history[-1]) + "\n")
            self.file.flush()
        if self.writer:
            for name, value in entry.items():
                if not isinstance(value, list):
                    self.writer.add_scalar(name, value, entry["step"])
            preview = self.folder / "previews" / f"step-{entry['step']}.png"
            if preview.exists():
                with Image.open(preview) as picture:
                    self.writer.add_image("preview", np.asarray(picture), entry["step"], dataformats="HWC")

    def add(self, entry: dict) -> None:
        self.history.append(entry | {"seconds": round(time.monotonic() - self.began, 2)})

    def repair(self, entry: dict) -> None:
        """After an error, write the whole log again, with the last step's entry. Raises UserError."""
        if not self.history or self.history[-1]["step"] < entry["step"]:
            self.add(entry)
        write_log(self.folder / "log.jsonl", self.history)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, already reported
            self.file.close()
        if self.writer:
            self.writer.close()
