"""Folders of pairs: a listing with one JSON object a line, and the pictures that it names."""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from support.errors import UserError, reading, writing
from support.files import whole_folder
from support.pictures import MOST_OBLONG, open_image

# Listing -> its keys for hint, target and prompt: fill50k's, and the one of Hugging Face's folders of images.
LAYOUTS = {
    "prompt.json": (("source",), ("target",), ("prompt",)),
    "metadata.jsonl": (("conditioning_image", "conditioning_image_file_name"), ("file_name", "image"), ("text",)),
}
BROKEN_SHOWN = 20


def read_listing(root: Path) -> tuple[list[str], list[Path], list[Path], list[str]]:
    """Where each pair is listed, its hint, its target, its prompt. Both files exist; they are not opened yet.

    Raises UserError that shows the broken entries, the first 20 of them and their number.
    """
    listing = next((root / name for name in LAYOUTS if (root / name).is_file()), None)
    if listing is None:
        raise UserError(f"{root / 'prompt.json'}: no such file; the data folder needs it, as fill50k has, or a "
                        "metadata.jsonl")  # fmt: skip
    places, hints, targets, prompts = map(list, zip(*read_entries(listing, *LAYOUTS[listing.name])))
    return places, hints, targets, prompts


def read_entries(listing: Path, *names: tuple[str, ...]) -> list[tuple]:
    """(where it is listed, path, …, text) of each entry; `names` are the keys of each path and of the text.

    Raises UserError that shows the broken entries.
    """
    entries, broken = [], []
    with reading(listing, "listing"):
        lines = listing.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{listing} line {number}"
            try:
                entries.append((place, *read_entry(line, listing.parent, *names)))
            except UserError as error:
                broken.append(f"{place}: {error}")
    refuse_broken(broken, len(entries) + len(broken), listing)
    if not entries:
        raise UserError(f"{listing} has no entries: add one line each")
    return entries


def read_entry(line: bytes, root: Path, *names: tuple[str, ...]) -> tuple:
    """One line of a listing -> (path, …, text). Raises UserError."""
    expected = "{" + ", ".join(f'"{keys[0]}": …' for keys in names) + "}"
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"no JSON ({error}); expected {expected}") from None
    values = []
    for keys in names:
        key = next((key for key in keys if isinstance(entry, dict) and key in entry), None)
        if key is None or not isinstance(entry[key], str):
            raise UserError(f'no text under "{keys[0]}"; expected {expected}')
        values.append(entry[key])
    *pictures, prompt = values
    for name in pictures:
        try:
            inside, there = (root / name).resolve().is_relative_to(root.resolve()), (root / name).is_file()
        except (OSError, ValueError) as error:
            raise UserError(f"{name!r} is no path ({error}); correct it") from None
        if not inside:
            raise UserError(f"{name!r} lies outside the folder; move the picture into it")
        if not there:
            raise UserError(f"{root / name}: no such file; correct the path")
    return *(root / name for name in pictures), prompt


def refuse_broken(broken: list[str], count: int, listing: str | Path, what: str = "entries are broken") -> None:
    """Raise UserError if any of `count` entries is broken, or `what` else is wrong with it."""
    if len(broken) == 1:
        raise UserError(broken[0])
    if broken:
        raise UserError(f"{listing}: {len(broken)} of {count} {what}; correct or remove them",
                        details=broken[:BROKEN_SHOWN])  # fmt: skip


def open_pair(place: str, hint_path: Path, target_path: Path) -> tuple[Image.Image, Image.Image]:
    """Hint and target, which have the same proportions; their sizes may differ. Raises UserError that names `place`."""
    try:
        hint, target = open_image(hint_path), open_image(target_path)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    if not alike(hint.size, target.size):
        sizes = "{}x{}, target {} {}x{}".format(*hint.size, target_path.name, *target.size)
        raise UserError(f"{place}: hint {hint_path.name} is {sizes}; crop them alike")
    return hint, target


def alike(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two pictures have the same proportions."""
    (width, height), (other_width, other_height) = size, other
    return abs(width * other_height - height * other_width) <= 0.01 * width * other_height


def content_of_pair(place: str, hint_path: Path, target_path: Path) -> str:
    """The contents of both files as checksums. Raises UserError that names `place` when a picture is of no use.

    Thousands are looked at before a training, so only what looks odd is decoded whole; that is then the last word.
    """
    contents = []
    for path in (hint_path, target_path):
        with reading(path, "picture"):
            contents.append(path.read_bytes())
    sizes = [sound_size(content) for content in contents]
    if None in sizes or not alike(*sizes):
        open_pair(place, hint_path, target_path)
    return " ".join(hashlib.sha256(content).hexdigest() for content in contents)


def sound_size(content: bytes) -> tuple[int, int] | None:
    """The size of a PNG or JPEG that seems whole: its checksums fit, or its last scan has an end. None for others."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
        usual = image.mode not in ("I", "F") and max(image.size) <= MOST_OBLONG * min(image.size)
        if image.format == "PNG":
            image.verify()  # which raises what differs from a checksum
        elif content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):  # end of image, start of scan
            return None
        return image.size if usual else None


def write_folder(folder: Path, scenes: Iterable[tuple[Image.Image, Image.Image, str]]) -> None:
    """Make a folder of pairs (hint, target, prompt) in fill50k's layout; it has its name when it is complete.

    Raises UserError when it can't be written, or if there is something in it already.
    """
    with writing(folder, "another --output"), whole_folder(folder) as temporary:
        for part in ("source", "target"):
            (temporary / part).mkdir()
        with open(temporary / "prompt.json", "w", encoding="utf-8") as listing:
            for i, (hint, target, prompt) in enumerate(scenes):
                hint.save(temporary / f"source/{i}.png")
                target.save(temporary / f"target/{i}.png")
                listing.write(listing_line(f"{i}.png", prompt))


def listing_line(name: str, prompt: str) -> str:
    """The line of fill50k's prompt.json for the pair source/`name`, target/`name`."""
    return json.dumps({"source": f"source/{name}", "target": f"target/{name}", "prompt": prompt}) + "\n"
