def read_log(path: Path) -> list[dict]:
    """A log's lines, one JSON object each; none if there is no log. A line cut short by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def append_line(file: TextIO, line: str) -> None:
    """Add a line to an open log. Raises UserError when the disk is full."""
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        raise UserError(f"can't write {file.name} ({error}): make room, then resume") from None


