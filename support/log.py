"""A run's log.jsonl, one JSON object a line."""

import contextlib
import json
from pathlib import Path

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


def append_entry(path: Path, entry: dict) -> None:
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")
