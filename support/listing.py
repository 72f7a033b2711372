"""Folders of pairs: a listing and the pictures that it names, or pictures of equal names beside their captions."""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from support.errors import UserError, reading
from support.pictures import is_picture, open_image, sound_size

# Listing -> its keys for hint, target and prompt: fill50k's, and those of Hugging Face's folders of images.
IMAGE_FOLDER = (
    ("conditioning_image", "conditioning_image_file_name"), ("file_name", "image", "image_file_name"),
    ("text", "caption"),
)  # fmt: skip
LAYOUTS = {"prompt.json": (("source",), ("target",), ("prompt",))}
LAYOUTS |= dict.fromkeys(("metadata.jsonl", "metadata.csv"), IMAGE_FOLDER)
UNPACK = (  # the rows of a data set with the usual columns, as pair_by_name reads them
    "import datasets; [(r['conditioning_image'].save(f'source/{i}.png'), r['image'].save(f'target/{i}.png'), "
    "open(f'target/{i}.txt', 'w').write(r['text'])) for i, r in enumerate(datasets.load_dataset('%s')['train'])]"
)
BROKEN_SHOWN = 20


class Entry(NamedTuple):
    """A pair: where it is listed, and what there."""

    place: str
    hint: Path
    target: Path
    prompt: str


def read_listing(root: Path) -> list[Entry]:
    """The pairs of a folder. Their files exist; they are not opened yet."""
    if listing := find_listing(root, LAYOUTS):
        return [Entry(*entry) for entry in read_entries(listing, *LAYOUTS[listing.name])]
    return pair_by_name(root)


def find_listing(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def pair_by_name(root: Path) -> list[Entry]:
    """source/NAME, target/NAME, and the prompt in target/NAME.txt, as kohya's trainer has them; endings may differ."""
    hints, targets = ({path.stem: path for path in sorted((root / part).glob("*")) if is_picture(path)}
                      for part in ("source", "target"))  # fmt: skip
    if not targets:
        raise UserError(why_nothing_is_listed(root))

    def read(target: Path) -> Entry:
        if target.stem not in hints:
            raise UserError(f"{target}: no picture of that name in {root / 'source'}")
        return Entry(str(target), hints[target.stem], target, read_caption(target))

    return collect(targets.values(), read, root)


def why_nothing_is_listed(root: Path) -> str:
    if below := find_listing(root / "train", LAYOUTS):
        return f"{root} has no listing, but {below.parent} has one: pass that folder"
    if next(root.glob("*.parquet"), None) or next(root.glob("*/*.parquet"), None):
        return f'{root} has parquet files: unpack them with mkdir source target; python -c "{UNPACK % root.resolve()}"'
    return (f"{root / 'prompt.json'}: no such file; the data folder needs it, as fill50k has, or a metadata.jsonl, or "
            "source/ and target/ with pictures of equal names")  # fmt: skip


def read_entries(listing: Path, *names: tuple[str, ...]) -> list[tuple]:
    """(where it is listed, path, …, text) of each entry; `names` are the keys of each path and of the text."""
    if not (entries := find_entries(listing)):
        raise UserError(f"{listing} has no entries: add one line each")
    return collect(entries, lambda entry: read_entry(*entry, listing.parent, names), listing)


def find_entries(listing: Path) -> list[tuple[str, object]]:
    """The place and the content of each entry: a row of a table, an element of a JSON array, or the text of a line."""
    text = read_text(listing)
    if listing.suffix == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""))
        with reading(listing, "table", "save it again as CSV", damage=csv.Error):
            return [(f"{listing} line {table.line_num}", row) for row in table]
    with contextlib.suppress(ValueError, RecursionError):
        whole = json.loads(text)
        entries = whole.get("data") if isinstance(whole, dict) else whole
        if isinstance(entries, list):
            return [(f"{listing} entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    if text.lstrip().startswith("["):
        raise UserError(f"{listing} begins as a JSON array, but is none: correct it")
    lines = enumerate(io.StringIO(text, newline=None), start=1)
    return [(f"{listing} line {number}", line) for number, line in lines if line.strip()]


def read_entry(place: str, entry: object, root: Path, names: tuple[tuple[str, ...], ...]) -> tuple:
    """An entry of a listing, or its JSON text -> (place, path, …, text)."""
    expected = "{" + ", ".join(f'"{keys[0]}": …' for keys in names) + "}"
    try:
        entry = json.loads(entry) if isinstance(entry, str) else entry
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: no JSON ({error}); expected {expected}") from None
    values = []
    for keys in names:
        value = next((entry[key] for key in keys if key in entry), None) if isinstance(entry, dict) else None
        value = value[0] if isinstance(value, list) and value else value  # several captions: the first
        if not isinstance(value, str):
            raise UserError(f'{place}: no text under "{keys[0]}"; expected {expected}')
        values.append(value)
    *pictures, prompt = values
    for name in pictures:
        if Path(name).is_absolute() or ".." in Path(name).parts:  # where links lead is the user's business
            raise UserError(f"{place}: {name!r} lies outside the folder; move the picture into it, or a link to it")
        if not os.path.isfile(root / name):
            raise UserError(f"{place}: {root / name}: no such file; correct the path")
    return place, *(root / name for name in pictures), prompt


def read_text(path: Path) -> str:
    """UTF-8, or UTF-16 as Windows' programs write it."""
    with reading(path, "text", "save it again as UTF-8"):
        content = path.read_bytes()
        utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if utf_16 else "utf-8-sig")


def read_caption(picture: Path) -> str:
    text = picture.with_suffix(".txt")
    if not text.is_file():
        raise UserError(f"{picture}: no caption: write it into {text.name} beside it")
    return " ".join(read_text(text).split())


def collect(items: Iterable, read: Callable, source: str | Path) -> list:
    """read(item) of each. A UserError shows those that can't be read."""
    done, broken = [], []
    for item in items:
        try:
            done.append(read(item))
        except UserError as error:
            broken.append(str(error))
    refuse_broken(broken, len(done) + len(broken), source)
    return done


def refuse_broken(broken: list[str], count: int, source: str | Path) -> None:
    """Raise UserError that shows what is wrong with some of `count` entries, if there are any."""
    if len(broken) == 1:
        raise UserError(broken[0])
    if broken:
        told = f"{source}: {len(broken)} of {count} entries are broken; correct or remove them"
        raise UserError(told, *broken[:BROKEN_SHOWN])


def open_pair(pair: Entry) -> tuple[Image.Image, Image.Image]:
    """Hint and target, which have the same proportions; their sizes may differ. An error names the pair's place."""
    try:
        hint, target = open_image(pair.hint), open_image(pair.target)
    except UserError as error:
        raise UserError(f"{pair.place}: {error}") from None
    if not alike(hint.size, target.size):
        sizes = "{}x{}, target {} {}x{}".format(*hint.size, pair.target.name, *target.size)
        raise UserError(f"{pair.place}: hint {pair.hint.name} is {sizes}; crop them alike")
    return hint, target


def alike(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two pictures have the same proportions."""
    (width, height), (other_width, other_height) = size, other
    return abs(width * other_height - height * other_width) <= 0.01 * width * other_height


def content_of_pair(pair: Entry) -> str:
    """The contents of both files as checksums. Raises UserError that names the pair when a picture is of no use.

    Thousands are looked at before a training, so only what looks odd is decoded whole; that is then the last word.
    """
    contents = []
    for path in (pair.hint, pair.target):
        with reading(path, "picture"):
            contents.append(path.read_bytes())
    sizes = [sound_size(content) for content in contents]
    if None in sizes or not alike(*sizes):
        open_pair(pair)
    return " ".join(hashlib.sha256(content).hexdigest() for content in contents)
