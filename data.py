"""fill50k: pairs of hint (a ring) and target (the disc filled), drawn here or read from a folder."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

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
COLOURS = {
    name: np.array(ImageColor.getrgb(name.replace(" ", "")), dtype=np.float32)
    for name in COLOUR_NAMES.replace("\n", " ").split(", ")
}
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


def draw_scene(rng: np.random.Generator, size: int, shapes=("circle",)) -> tuple[Image.Image, Image.Image, str]:
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
