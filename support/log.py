"""A run's log.jsonl, one JSON object a line."""

import contextlib
import json
from pathlib import Path

from support.errors import writing
from support.files import write_atomically


def read_log(path: Path) -> list[dict]:
    """A log's entries; none if there is no log. A line that a crash cut short is left out."""
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def write_log(path: Path, entries: list[dict]) -> None:
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def append_entry(path: Path, entry: dict) -> None:
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")
