"""Pairs of your own pictures and the hints detected in them: python data.py --from-pictures FOLDER --detect canny."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from support.detect import add_options, detector
from support.errors import UserError
from support.files import read_json, save_json, write_atomically
from support.listing import IMAGE_FOLDER, collect, find_listing, read_caption, read_entries
from support.options import ArgumentParser, side
from support.pictures import FORMATS, contact_sheet, fit_image, is_picture, open_image, save_picture, to_picture

SHEET, SHOWN, SHEET_SIDE = "contact-sheet.png", 8, 256


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and the folders in it, those that are linked too, by name; not what is hidden."""
    found, entered = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        if os.path.realpath(parent) in entered:  # a link led back
            folders.clear()
        else:
            entered.add(os.path.realpath(parent))
            found += [Path(parent, name) for name in names if name[0] != "." and is_picture(Path(name))]
    if not found:
        raise UserError(f"{folder} has no pictures: pass a folder of {', '.join(FORMATS)}")
    return sorted(found)


def parse_arguments():
    parser = ArgumentParser(description="Make a folder of pairs for train.py from your own pictures.")
    told = "pictures, each with its caption in NAME.txt beside it or in the folder's metadata.jsonl or .csv"
    parser.add_argument("--from-pictures", type=Path, required=True, metavar="FOLDER", help=told)
    add_options(parser)  # --detect, --canny-low, --canny-high
    parser.add_argument("--resolution", type=side, default=512, help="pixels a side, a multiple of 64 (default: 512)")
    parser.add_argument("--output", type=Path, required=True, decides=False, help="for prompt.json, source/, target/")
    args = parser.parse_args()
    if args.detect == "none":
        raise UserError("--from-pictures needs --detect canny or scribble: else each hint would be its own target")
    if args.output.resolve().is_relative_to(args.from_pictures.resolve()):  # its pictures would be read the next time
        raise UserError(f"{args.output} lies in {args.from_pictures}: choose an --output outside it")
    return args


def make_pairs() -> None:
    """The command line of data.py. A pair that is newer than its picture stays as it is."""
    args = parse_arguments()
    folder, output, detect = args.from_pictures, args.output, detector(args.detect, args.canny_low, args.canny_high)
    pictures = find_pictures(folder)
    listing = find_listing(folder, ("metadata.jsonl", "metadata.csv"))
    listed = {path: text for _, path, text in read_entries(listing, *IMAGE_FOLDER[1:])} if listing else {}
    captions = collect(pictures, lambda path: listed[path] if path in listed else read_caption(path), folder)
    made_with = {name: str(getattr(args, name)) for name in args.deciding} | {"from_pictures": str(folder.resolve())}
    note = output / "pictures.json"
    known = read_json(note, "choose another --output") if note.is_file() else None
    if known != made_with and output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} holds other files, or pairs made with other options: choose another --output")
    save_json(made_with, note)

    def make(picture: Path) -> str:
        name = f"{picture.relative_to(folder).as_posix()}.png"  # with its ending: a.jpg and a.png are two pictures
        hint, target = output / "source" / name, output / "target" / name
        if not hint.is_file() or hint.stat().st_mtime <= picture.stat().st_mtime:
            pixels = fit_image(open_image(picture), args.resolution)
            save_picture(to_picture(pixels * 2 - 1), target)
            save_picture(to_picture(detect(pixels) * 2 - 1), hint)  # last: the pair is made
        return name

    names = collect(tqdm(pictures, desc="detecting"), make, folder)
    lines = [
        json.dumps({"source": f"source/{name}", "target": f"target/{name}", "prompt": caption}) + "\n"
        for name, caption in zip(names, captions)
    ]
    write_atomically(output / "prompt.json", lambda path: path.write_text("".join(lines)))

    def row(part: str) -> Tensor:
        shown = [open_image(output / part / name) for name in names[:SHOWN]]
        return torch.stack([fit_image(picture, min(args.resolution, SHEET_SIDE)) * 2 - 1 for picture in shown])

    sheet = contact_sheet({"hint": row("source"), "target": row("target")}, captions[:SHOWN])
    save_picture(sheet, output / SHEET)
    print(f"wrote {output} ({len(names)} pairs); look at {output / SHEET}")
