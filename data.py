"""fill50k: pairs of hint (a ring) and target (the disc filled), drawn here or read from a folder; and palettes."""

from copy import copy
from pathlib import Path

from support.command import run_command_line

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from support.colours import COLOURS
from support.hub import fetch_folder
from support.listing import content_of_pair, open_pair, read_listing
from support.pictures import fit_image, open_image
from support.pictures_to_pairs import make_pairs

DRAWN_PAIRS = {"drawn": 1000, "drawn-palette": 8000}  # --data: the hint is a ring, or the two colours
STRIPES = 16  # of a palette
DRAWN_HELD_OUT = 2**32 - 1  # seed of the drawn pairs that are never trained on
SHAPES = ("circle", "square", "triangle")  # fill50k has circles; the miniature knows all
MIN_COLOUR_DISTANCE = 0.25 * 255  # so that disc and background can be told apart
Scene = tuple[Image.Image, Image.Image, str]  # hint, target, prompt


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels of the points (x, y) from the shape's outline, negative inside; its centre is (0, 0)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.8 * radius
    return np.maximum(y, abs(x) * np.sqrt(3) / 2 - y / 2) - 0.6 * radius  # an equilateral triangle; y grows downwards


def draw_outline(distance: np.ndarray) -> Image.Image:
    """A hint: white where the signed distance [size, size] from a shape is near 0, a line 1 % of the side wide."""
    outline = abs(distance) <= max(0.005 * len(distance), 0.5)
    return Image.fromarray(np.repeat(np.uint8(outline)[..., None] * 255, 3, axis=2))


def fill(distance: np.ndarray, colour: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The shape of this signed distance [size, size] in a colour, on another: [size, size, 3], with a smooth edge."""
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # of each pixel by the shape
    return background + coverage * (colour - background)


def draw_palette(colour: np.ndarray, background: np.ndarray, size: int) -> Image.Image:
    """A hint that says what colours to paint and not where: stripes of the shape's and the background's in turn."""
    row = np.where(np.arange(size)[:, None] * STRIPES // size % 2 == 0, colour, background)  # [size, 3]
    return Image.fromarray(np.repeat(np.uint8(row)[None], size, axis=0))


def draw_scene(
    rng: np.random.Generator, size: int, shapes: tuple[str, ...] = ("circle",), palette: bool = False
) -> Scene:
    """One random scene of `size` x `size` pixels, in the ranges measured on 48 pictures of the real fill50k.

    Radius 1/8 to 1/2 of the side, centre 0.19 to 0.80, clipped by the border. The hint is the outline, or else the
    palette; the target is the filled shape on a background of another CSS colour.
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
    hint = draw_palette(colour, background, size) if palette else draw_outline(distance)
    target = np.uint8(np.round(fill(distance, colour, background)))
    return hint, Image.fromarray(target), f"{name} {shape} with {background_name} background"


def draw_fill50k(index: int, size: int = 512, seed: int = 0, palette: bool = False) -> Scene:
    """Pair `index` of an endless set like fill50k, the same for the same (index, size, seed), whatever its hint."""
    return draw_scene(np.random.default_rng([seed, index]), size, palette=palette)


class Pairs:
    """Pairs of hint and target by index, squares of `resolution` pixels, with their `prompts`.

    A set of pairs has `pictures(index)`, hint and target as they are; `name(index)`, what a message calls the pair;
    `files(index)`, those that it is read from; and `content(index)`, a text that changes when the pair does and is the
    same on another machine.
    """

    def files(self, index: int) -> list[Path]:
        return []

    def hint(self, index: int) -> Tensor:
        """[3, H, W] in [0, 1], 0 = background."""
        return fit_image(self.pictures(index)[0], self.resolution)

    def image(self, index: int) -> Tensor:
        """The target, [3, H, W] in [-1, 1]."""
        return fit_image(self.pictures(index)[1], self.resolution) * 2 - 1

    def other_hint(self, index: int) -> Tensor:
        """The next pair's hint, or the first after it that differs, as pairs may share one; its own if none does."""
        own = self.hint(index)
        others = (self.hint((index + i) % len(self)) for i in range(1, len(self)))
        return next((hint for hint in others if not torch.equal(hint, own)), own)

    def __len__(self) -> int:
        return len(self.prompts)


class PairedImages(Pairs):
    """A folder of pairs, in one of the layouts of support/listing.py; pictures are opened when they are asked for."""

    def __init__(self, root: str | Path, resolution: int):
        self.resolution, self.entries = resolution, read_listing(Path(root))
        self.prompts = [entry.prompt for entry in self.entries]

    def select(self, indices: slice) -> "PairedImages":
        some = copy(self)
        some.entries, some.prompts = self.entries[indices], self.prompts[indices]
        return some

    def pictures(self, index: int) -> tuple[Image.Image, Image.Image]:
        return open_pair(self.entries[index])

    def hint(self, index: int) -> Tensor:  # without its target, which is encoded once and not read again
        return fit_image(open_image(self.entries[index].hint), self.resolution)

    def name(self, index: int) -> str:
        return self.entries[index].place

    def files(self, index: int) -> list[Path]:
        return [self.entries[index].hint, self.entries[index].target]

    def content(self, index: int) -> str:
        """Raises UserError when the pair is seen to be broken, without decoding it whole."""
        return content_of_pair(self.entries[index])


class DrawnImages(Pairs):
    """`count` pairs of draw_fill50k, drawn when they are asked for."""

    def __init__(self, count: int, resolution: int, seed: int = 0, palette: bool = False):
        self.resolution, self.seed, self.palette = resolution, seed, palette
        # A scene is the same at any size, and the smallest picture is the fastest to draw.
        self.prompts = [draw_fill50k(i, 1, seed)[2] for i in range(count)]

    def pictures(self, index: int) -> tuple[Image.Image, Image.Image]:
        return draw_fill50k(index, self.resolution, self.seed, self.palette)[:2]

    def name(self, index: int) -> str:
        return f"drawn pair {index}"

    def content(self, index: int) -> str:
        return f"{self.seed} {index}{' palette' * self.palette}"


def open_pairs(source: str, resolution: int, seed: int, held_out: int) -> tuple[Pairs, Pairs]:
    """The pairs to train on, and `held_out` others that are never trained on, but at most a tenth of a folder's.

    `source` is one of DRAWN_PAIRS, "fill50k" (fetched once: lllyasviel/ControlNet's training/fill50k.zip, 200 MB), or a
    folder. A folder of fewer than ten pairs has none to spare; its first pairs then serve as both.
    """
    if source in DRAWN_PAIRS:
        sets = ((DRAWN_PAIRS[source], seed), (held_out, DRAWN_HELD_OUT))
        return tuple(DrawnImages(count, resolution, s, palette=source == "drawn-palette") for count, s in sets)
    if source == "fill50k":
        advice = "unpack a copy and pass its folder with --data"
        source = fetch_folder("lllyasviel/ControlNet", "training/fill50k.zip", Path("fill50k"), "prompt.json", advice)
    pairs = PairedImages(source, resolution)
    spared = min(held_out, len(pairs) // 10)
    if spared < held_out:
        told = f"{spared}, a tenth, are held out" if spared else "none is held out, the previews show training pairs"
        print(f"{source} has only {len(pairs)} pairs: {told}")
    if spared == 0:
        return pairs, pairs.select(slice(held_out))
    return pairs.select(slice(-spared)), pairs.select(slice(-spared, None))


if __name__ == "__main__":
    run_command_line(make_pairs)  # a folder of pairs from your own pictures
