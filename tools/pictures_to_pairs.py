"""Pairs of your own pictures and the hints detected in them: python data.py --from-pictures FOLDER --detect canny."""

import json
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from data import PairedImages
from support.detect import add_options, detector
from support.errors import UserError, reading
from support.files import PARTIAL, clear, fingerprint, read_json, save_json, write_atomically
from support.listing import LAYOUTS, listing_line, read_entries, refuse_broken
from support.options import ArgumentParser, side
from support.pictures import FORMATS, contact_sheet, fit_image, open_image, save_picture, to_picture

ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
NOTE = "pictures.json"  # what the pairs are made from; a folder with files but without it belongs to somebody else
SHEET, SHOWN, SHEET_SIDE = "contact-sheet.png", 8, 256


def read_captions(folder: Path) -> dict[Path, str]:
    """The pictures in a folder and the folders in it, by name, with their captions: from metadata.jsonl or NAME.txt.

    Raises UserError that shows the pictures without one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; correct --from-pictures")
    listing = folder / "metadata.jsonl"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "/." not in f"/{path.relative_to(folder)}")
    pictures = [path for path in files if path.suffix.lower() in ENDINGS]
    others = [path for path in files if path.suffix.lower() not in ENDINGS | {".txt"} and path != listing]
    if others:
        kinds = ", ".join(sorted({path.suffix or path.name for path in others}))
        print(f"left out: {len(others)} files that are no pictures or of a kind that is not read ({kinds})")
    if not pictures:
        raise UserError(f"{folder} has no pictures: pass a folder of {', '.join(FORMATS)}")
    listed = read_entries(listing, *LAYOUTS[listing.name][1:]) if listing.is_file() else []
    captions, broken = {path: text for _, path, text in listed}, []
    for picture in [picture for picture in pictures if picture not in captions]:
        text = picture.with_suffix(".txt")
        try:
            if not text.exists():
                raise UserError(f"{picture} has no caption: write it into {text.name} beside it, or {listing}")
            with reading(text, "caption", "save it again as UTF-8"):
                captions[picture] = " ".join(text.read_text(encoding="utf-8-sig").split())
        except UserError as error:
            broken.append(str(error))
    refuse_broken(broken, len(pictures), folder, "pictures have no caption")
    return {picture: captions[picture] for picture in pictures}


def claim(output: Path, settings: dict) -> None:
    """Begin a folder of pairs, or go on with one. Raises UserError if it is something else, or of other settings."""
    note = output / NOTE
    if note.is_file():
        begun = read_json(note, "choose another --output")
        for name, value in settings.items():
            if begun.get(name) != value:
                made = f"--{name.replace('_', '-')} {begun.get(name)}"
                raise UserError(f"{output} was made with {made}, not {value}: choose another --output")
    elif output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} holds files already: choose another --output")
    save_json(settings, note)
    clear(output, f"**/{PARTIAL}")


def made_from(hint: Path) -> dict | None:
    """What save_picture was told about a hint's picture; None if there is no hint yet."""
    if not hint.is_file():
        return None
    with reading(hint, "hint", "delete it"), Image.open(hint, formats=["PNG"]) as image:
        return json.loads(image.info["settings"])


def main() -> None:
    parser = ArgumentParser(prog="data.py", description="Make a folder of pairs for train.py from your own pictures.")
    parser.add_argument(
        "--from-pictures", type=Path, required=True, metavar="FOLDER",
        help="pictures, each with its caption in NAME.txt beside it or in the folder's metadata.jsonl",
    )  # fmt: skip
    add_options(parser)
    parser.add_argument("--resolution", type=side, default=512, help="pixels a side, a multiple of 64 (default: 512)")
    parser.add_argument("--output", type=Path, required=True, decides=False, help="for prompt.json, source/, target/")
    args = parser.parse_args()
    folder, output = args.from_pictures, args.output
    if args.detect == "none":
        raise UserError("--from-pictures needs --detect canny or scribble: else each hint would be its own target")
    detect = detector(args.detect, args.canny_low, args.canny_high)
    if output.resolve().is_relative_to(folder.resolve()):  # its pictures would be read the next time
        raise UserError(f"{output} lies in {folder}: choose an --output outside it")
    captions = read_captions(folder)
    settings = {name: getattr(args, name) for name in args.deciding}
    claim(output, settings | {"from_pictures": str(folder.resolve())})

    lines, broken, kept = [], [], 0
    for picture, caption in tqdm(captions.items(), desc="detecting"):
        name = f"{picture.relative_to(folder).as_posix()}.png"  # with its ending: a.jpg and a.png are two pictures
        lines.append(listing_line(name, caption))
        try:
            with reading(picture, "picture"):
                content = {"picture": fingerprint(picture)}
            if (output / "target" / name).is_file() and made_from(output / "source" / name) == content:
                kept += 1
                continue
            image = open_image(picture)
        except UserError as error:
            broken.append(str(error))
            continue
        target = fit_image(image, args.resolution)
        save_picture(to_picture(target * 2 - 1), output / "target" / name)
        save_picture(to_picture(detect(target) * 2 - 1), output / "source" / name, content)  # last: the pair is made
    refuse_broken(broken, len(captions), folder, "pictures can't be read")
    write_atomically(output / "prompt.json", lambda path: path.write_text("".join(lines)))

    pairs = PairedImages(output, min(args.resolution, SHEET_SIDE))
    shown = range(min(SHOWN, len(pairs)))
    rows = {"hint": [pairs.hint(i) * 2 - 1 for i in shown], "target": [pairs.image(i) for i in shown]}
    sheet = contact_sheet({label: torch.stack(row) for label, row in rows.items()}, pairs.prompts[:SHOWN])
    save_picture(sheet, output / SHEET)
    print(f"wrote {output} ({len(pairs)} pairs, {kept} of them made before); look at {output / SHEET}")
