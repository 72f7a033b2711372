"""fill50k: pairs of hint (a ring) and target (the disc filled), drawn here or read from a folder."""

import contextlib
import json
import math
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from files import ArgumentParser, UserError, fetch, fit_image, open_image, read_image, run, save_json

# The 139 distinct CSS colours, their names split into words as in fill50k's prompts.
COLOUR_NAMES = """\
alice blue, antique white, aqua, aquamarine, azure, beige, bisque, black, blanched almond, blue, blue violet, brown,
burly wood, cadet blue, chartreuse, chocolate, coral, cornflower blue, cornsilk, crimson, dark blue, dark cyan,
dark golden rod, dark gray, dark green, dark khaki, dark magenta, dark olive green, dark orange, dark orchid, dark red,
dark salmon, dark sea green, dark slate blue, dark slate gray, dark turquoise, dark violet, deep pink, deep sky blue,
dim gray, dodger blue, fire brick, floral white, forest green, fuchsia, gainsboro, ghost white, gold, golden rod, gray,
green, green yellow, honey dew, hot pink, indian red, indigo, ivory, khaki, lavender, lavender blush, lawn green,
lemon chiffon, light blue, light coral, light cyan, light golden rod yellow, light gray, light green, light pink,
light salmon, light sea green, light sky blue, light slate gray, light steel blue, light yellow, lime, lime green,
linen, maroon, medium aqua marine, medium blue, medium orchid, medium purple, medium sea green, medium slate blue,
medium spring green, medium turquoise, medium violet red, midnight blue, mint cream, misty rose, moccasin,
navajo white, navy, old lace, olive, olive drab, orange, orange red, orchid, pale golden rod, pale green,
pale turquoise, pale violet red, papaya whip, peach puff, peru, pink, plum, powder blue, purple, rebecca purple, red,
rosy brown, royal blue, saddle brown, salmon, sandy brown, sea green, sea shell, sienna, silver, sky blue, slate blue,
slate gray, snow, spring green, steel blue, tan, teal, thistle, tomato, turquoise, violet, wheat, white, white smoke,
yellow, yellow green"""


def css_colour(name: str) -> np.ndarray:
    """A CSS colour by its name, split into words or not: float32 [3], 0 to 255. Raises ValueError for another name."""
    return np.array(ImageColor.getrgb(name.replace(" ", ""))[:3], dtype=np.float32)


COLOURS = {name: css_colour(name) for name in COLOUR_NAMES.replace("\n", " ").split(", ")}
SHAPES = ("circle", "square", "triangle")  # fill50k has circles; the miniature knows all
MIN_COLOUR_DISTANCE = 0.25 * 255  # so that disc and background can be told apart


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels of the points (x, y) from the shape's outline, negative inside; its centre is (0, 0)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.8 * radius
    if shape == "triangle":  # equilateral, pointing up; y grows downwards
        return np.maximum(y, abs(x) * np.sqrt(3) / 2 - y / 2) - 0.6 * radius
    raise ValueError(f"no such shape: {shape}")


def draw_scene(
    rng: np.random.Generator, size: int, shapes: tuple[str, ...] = ("circle",)
) -> tuple[Image.Image, Image.Image, str]:
    """One random (hint, target, prompt) of `size` x `size` pixels, distributed as measured on the real fill50k.

    Radius 1/8 to 1/2 of the side, centre 0.19 to 0.80, clipped by the border; the hint is a pure 0/255 outline
    about 1 % of the side wide, the target the filled shape on a background of another CSS colour.
    """
    shape = shapes[rng.integers(len(shapes))]
    radius = rng.uniform(1 / 8, 1 / 2) * size
    centre_x, centre_y = rng.uniform(0.19, 0.80, 2) * size
    while True:
        name, background_name = rng.choice(list(COLOURS), 2, replace=False)
        colour, background = COLOURS[name], COLOURS[background_name]
        if np.linalg.norm(colour - background) >= MIN_COLOUR_DISTANCE:
            break

    y, x = np.mgrid[:size, :size] + 0.5
    distance = signed_distance(shape, x - centre_x, y - centre_y, radius)
    outline = abs(distance) <= max(0.005 * size, 0.5)
    hint = np.repeat(np.uint8(outline)[..., None] * 255, 3, axis=2)
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # of each pixel by the shape: a smooth edge
    target = np.uint8(np.round(background + coverage * (colour - background)))
    return Image.fromarray(hint), Image.fromarray(target), f"{name} {shape} with {background_name} background"


def draw_fill50k(index: int, size: int = 512, seed: int = 0) -> tuple[Image.Image, Image.Image, str]:
    """Pair `index` of an endless set like fill50k, the same for the same (index, size, seed)."""
    return draw_scene(np.random.default_rng([seed, index]), size)


def check_resolution(resolution: int | None) -> None:
    """Raise UserError for a --resolution that the UNet can't halve three times after the VAE did."""
    if resolution is not None and (resolution < 64 or resolution % 64):
        raise UserError(f"--resolution {resolution}: must be a multiple of 64")


class Pairs(Dataset):
    """What a set of pairs has: `prompts`, and hints and images by index, squares of `resolution` pixels."""

    prompts: list[str]
    resolution: int

    def hint(self, index: int) -> torch.Tensor:
        """[3, H, W] in [0, 1], 0 = background."""
        raise NotImplementedError

    def image(self, index: int) -> torch.Tensor:
        """The target, [3, H, W] in [-1, 1]."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What a message calls the pair."""
        raise NotImplementedError

    def stamp(self) -> list:
        """What changes when a picture does: sizes and times of the files."""
        return []

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict:
        return {"hint": self.hint(index), "image": self.image(index), "prompt": self.prompts[index]}


# Listings of pairs that are read, one JSON object a line, with their names for hint, target and prompt: fill50k's, and
# the Hugging Face one for folders of images.
LAYOUTS = {
    "prompt.json": (("source",), ("target",), ("prompt",)),
    "metadata.jsonl": (("conditioning_image", "conditioning_image_file_name"), ("file_name", "image"), ("text",)),
}
BROKEN_SHOWN = 20


class PairedImages(Pairs):
    """A folder of pairs with prompt.json or metadata.jsonl (LAYOUTS) in it, paths inside the folder.

    Every line is read and every picture opened at once, so that nothing breaks in the middle of a training. Raises
    UserError that lists the broken entries, the first 20 of them and their number.
    """

    def __init__(self, root: str | Path, resolution: int):
        self.root, self.resolution = Path(root), resolution
        listing = next((self.root / name for name in LAYOUTS if (self.root / name).is_file()), None)
        if listing is None:
            raise UserError(f"{self.root / 'prompt.json'}: no such file; the data folder needs it, as fill50k has, "
                            "or a metadata.jsonl")  # fmt: skip

        def read(numbered: tuple[int, bytes]) -> tuple[Path, Path, str] | str:
            number, line = numbered
            try:
                return self.read_line(line, *LAYOUTS[listing.name])
            except UserError as error:
                return f"{listing} line {number}: {error}"

        lines = [(n, line) for n, line in enumerate(listing.read_bytes().split(b"\n"), start=1) if line.strip()]
        with ThreadPool() as pool:  # Pillow decodes outside Python's lock
            entries = list(tqdm(pool.imap(read, lines, 16), f"checking {self.root}", len(lines), unit="pair", delay=2))
        broken = [entry for entry in entries if isinstance(entry, str)]
        if len(broken) == 1:
            raise UserError(broken[0])
        if broken:
            raise UserError(f"{listing}: {len(broken)} of {len(entries)} entries are broken; mend or remove them",
                            details=broken[:BROKEN_SHOWN])  # fmt: skip
        if not entries:
            raise UserError(f"{listing} has no pairs: add one line a pair")
        self.hints, self.targets, self.prompts = map(list, zip(*entries))

    def read_line(self, line: bytes, *names: tuple[str, ...]) -> tuple[Path, Path, str]:
        """One line of a listing -> (hint, target, prompt), both pictures opened. Raises UserError without the place."""
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
        paths = [self.root / name for name in pictures]
        sizes = []
        for name, path in zip(pictures, paths):
            if "\0" in name or not path.resolve().is_relative_to(self.root.resolve()):
                raise UserError(f"{name!r} lies outside the folder; move the picture into it")
            sizes.append(open_image(path).size)
        (width, height), (target_width, target_height) = sizes  # of any size, but alike
        if abs(width * target_height - height * target_width) > 0.01 * width * target_height:
            shapes = f"{width}x{height}, target {pictures[1]} {target_width}x{target_height}"
            raise UserError(f"hint {pictures[0]} is {shapes}; crop them alike")
        return *paths, prompt

    def hint(self, index: int) -> torch.Tensor:
        return read_image(self.hints[index], self.resolution)

    def image(self, index: int) -> torch.Tensor:
        return read_image(self.targets[index], self.resolution) * 2 - 1

    def name(self, index: int) -> str:
        return str(self.targets[index])

    def stamp(self) -> list:
        return [(path.stat().st_size, path.stat().st_mtime_ns) for path in self.targets]


class DrawnImages(Pairs):
    """`count` pairs of draw_fill50k, drawn when they are asked for."""

    def __init__(self, count: int, resolution: int, seed: int = 0):
        self.resolution, self.seed = resolution, seed
        # A picture's size does not change what is on it, so the smallest one tells the prompt.
        self.prompts = [draw_fill50k(i, 1, seed)[2] for i in range(count)]

    def hint(self, index: int) -> torch.Tensor:
        return fit_image(draw_fill50k(index, self.resolution, self.seed)[0], self.resolution)

    def image(self, index: int) -> torch.Tensor:
        return fit_image(draw_fill50k(index, self.resolution, self.seed)[1], self.resolution) * 2 - 1

    def name(self, index: int) -> str:
        return f"drawn pair {index}"


class Selected(Pairs):
    """Some pairs of another set."""

    def __init__(self, pairs: Pairs, indices: range):
        self.pairs, self.indices, self.resolution = pairs, indices, pairs.resolution
        self.prompts = [pairs.prompts[i] for i in indices]

    def hint(self, index: int) -> torch.Tensor:
        return self.pairs.hint(self.indices[index])

    def image(self, index: int) -> torch.Tensor:
        return self.pairs.image(self.indices[index])

    def name(self, index: int) -> str:
        return self.pairs.name(self.indices[index])

    def stamp(self) -> list:
        return self.pairs.stamp()


def generator_for(*key: int) -> torch.Generator:
    """A generator of its own for each use, so that a resumed run goes on as if it had not stopped.

    Uses are a batch's noise (seed, 0, batch), an epoch's order (seed, 1, epoch), the held-out pairs (seed, 2).
    The key is hashed, since torch's CPU generator keeps only the lower 32 bits of a seed.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def fetch_fill50k(folder: Path = Path("fill50k")) -> Path:
    """The published set: training/fill50k.zip of lllyasviel/ControlNet (200 MB), unpacked once into `folder`.

    Raises UserError when it can't be had or is damaged.
    """
    if (folder / "prompt.json").is_file():
        return folder
    archive = fetch("lllyasviel/ControlNet", "training/fill50k.zip", "unpack a copy and pass its folder with --data")
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent) as temporary:
        unpack(archive, Path(temporary))
        listing = next(Path(temporary).rglob("prompt.json"), None)
        if listing is None:
            raise UserError(f"{archive} has no prompt.json in it: delete it, so that it is fetched again")
        os.replace(listing.parent, folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file whose every entry lies inside `folder`; raises UserError otherwise, or when it is damaged."""
    try:
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"{archive}: {name} would be written outside the folder, so nothing was unpacked")
            for name in tqdm(file.namelist(), desc=f"unpacking {archive.name}", unit="file"):
                file.extract(name, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}): delete it, so that it is fetched again") from None


class CachedPairs(Dataset):
    """Pairs whose targets and prompts are encoded already: hint, moments and context of each, as tensors."""

    def __init__(self, pairs: Pairs, folder: Path):
        self.pairs, self.folder = pairs, folder
        distinct = distinct_prompts(pairs.prompts)
        self.context_index = [distinct[prompt] for prompt in pairs.prompts]
        self.empty_context = self.row("contexts.npy", 0)

    def row(self, name: str, index: int) -> torch.Tensor:
        # Mapped anew each time: a kept map would be copied whole into every process that loads pictures.
        return torch.from_numpy(np.load(self.folder / name, mmap_mode="r")[index].copy())

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "index": index,
            "hint": self.pairs.hint(index),
            "moments": self.row("moments.npy", index),  # [8, H/8, W/8]
            "context": self.row("contexts.npy", self.context_index[index]),  # [77, D]
        }


def distinct_prompts(prompts: list[str]) -> dict[str, int]:
    """Each prompt's row among the encoded ones, the empty prompt's first."""
    return {prompt: i for i, prompt in enumerate(dict.fromkeys(["", *prompts]))}


@torch.no_grad()
def cache_latents(sd, pairs: Pairs, folder: Path, key: dict, batch_size: int = 4, num_workers: int = 0) -> CachedPairs:
    """Encode all targets and prompts once, since a locked encoder gives the same at each step.

    Keeps the latent distributions (moments), not samples of them, in half precision; a step then samples afresh, as
    the released code does. `folder` is used again when its `key`, which names base and data, is the same. Every hint
    is opened once on the way, so that a broken one shows before training. Raises UserError for that, and when the
    disk is too small.
    """
    stamp = folder / "key.json"
    with contextlib.suppress(OSError, ValueError):  # no stamp or a broken one: encode
        if json.loads(stamp.read_text()) == key:
            return CachedPairs(pairs, folder)
    prompts = list(distinct_prompts(pairs.prompts))

    def save(name: str, label: str, count: int, batches: Iterable[torch.Tensor]) -> None:
        rows, done = None, 0
        for encoded in tqdm(batches, desc=label, total=-(-count // batch_size), unit="batch"):
            encoded = encoded.half().cpu().numpy()
            if rows is None:
                shape = (count, *encoded.shape[1:])
                if shutil.disk_usage(folder).free < 2 * math.prod(shape):
                    raise UserError(f"{folder} needs {2 * math.prod(shape) / 1e9:.1f} GB for {name}: make room")
                rows = np.lib.format.open_memmap(folder / name, "w+", np.float16, shape)
            rows[done : done + len(encoded)] = encoded
            done += len(encoded)
        rows.flush()

    try:
        folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        texts = (sd.encode_prompts(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size))
        save("contexts.npy", "encoding prompts", len(prompts), texts)
        loader = DataLoader(pairs, batch_size, num_workers=num_workers)
        with torch.autocast(sd.device.type, torch.bfloat16, enabled=sd.device.type == "cuda"):
            moments = (sd.vae.encode(batch["image"].to(sd.device)) for batch in loader)
            save("moments.npy", "encoding images", len(pairs), moments)
        save_json(key, stamp)  # last: a cache without it is begun again
    except OSError as error:
        raise UserError(f"can't write {folder} ({error}): choose another --output-dir") from None
    return CachedPairs(pairs, folder)


def main() -> None:
    parser = ArgumentParser(description="Draw pairs like fill50k's into a folder of its layout.")
    parser.add_argument("--count", type=int, default=100, help="pairs (default: 100)")
    parser.add_argument("--output", type=Path, required=True, help="folder for prompt.json, source/ and target/")
    parser.add_argument("--size", type=int, default=512, help="pixels a side (default: 512)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.count, args.size) < 1 or args.seed < 0:
        raise UserError("--count and --size must be 1 or more, --seed 0 or more")
    if (args.output / "prompt.json").exists():
        raise UserError(f"{args.output} holds pairs already: choose another --output")
    try:
        for part in ("source", "target"):
            (args.output / part).mkdir(parents=True, exist_ok=True)
        with open(args.output / "prompt.json", "w", encoding="utf-8") as listing:
            for i in tqdm(range(args.count), desc="drawing"):
                hint, target, prompt = draw_fill50k(i, args.size, args.seed)
                hint.save(args.output / f"source/{i}.png")
                target.save(args.output / f"target/{i}.png")
                entry = {"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": prompt}
                listing.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise UserError(f"can't write {args.output} ({error}): make room or choose another --output") from None


if __name__ == "__main__":
    run(main)
