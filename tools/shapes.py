"""Does a picture show what its caption says, the shape and both colours? This is how the miniature is judged."""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from contourpy import contour_generator
from torch import Tensor

from data import SHAPES, signed_distance
from metrics import prompt_colours, segment

GRID, SIZES = 64, 25  # pixels a side that best_shape works with, and the sizes of each shape that it tries
RADII = np.linspace(1 / 8, 1 / 2, SIZES) * GRID


@cache
def shape_masks() -> tuple[Tensor, Tensor]:
    """Each of data.SHAPES at 25 radii from 1/8 to 1/2 of the side: spectra [75, 128, 65], and areas [75, 64, 64].

    An area is the number of a shape's pixels that lie inside the picture when its centre is at that place.
    """
    y, x = np.mgrid[-GRID:GRID, -GRID:GRID]
    masks = np.stack([signed_distance(shape, x, y, radius) <= 0 for shape in SHAPES for radius in RADII])
    spectra = torch.fft.rfft2(torch.from_numpy(np.fft.ifftshift(masks, (1, 2))).float()).conj()
    return spectra, shared_pixels(torch.ones(GRID, GRID), spectra)


def shared_pixels(picture: Tensor, spectra: Tensor) -> Tensor:
    """How many pixels a picture [64, 64] shares with each shape at each place: [75, 64, 64], a correlation."""
    padded = torch.fft.rfft2(picture, s=(2 * GRID, 2 * GRID))
    return torch.fft.irfft2(padded * spectra)[:, :GRID, :GRID]


def best_shape(mask: Tensor) -> tuple[str, np.ndarray]:
    """Which of data.SHAPES a segmented picture, bool [H, W], shows, and its centre and radius (x, y, r) in pixels.

    Every shape is tried in every size at every place of a 64x64 grid, clipped by the border; the best has the highest
    intersection over union.
    """
    spectra, areas = shape_masks()
    pixels = mask.shape[-1] / GRID
    mask = (F.adaptive_avg_pool2d(mask[None].float(), GRID)[0] > 0.5).float()
    both = shared_pixels(mask, spectra)
    iou = both / (areas + mask.sum() - both).clamp(min=1)
    number, y, x = np.unravel_index(iou.argmax().item(), iou.shape)
    kind, size = divmod(number, SIZES)
    return SHAPES[kind], np.array([x + 0.5, y + 0.5, RADII[size]]) * pixels


def outline(image: Tensor, mask: Tensor) -> np.ndarray:
    """Points [N, 2], x and y in pixels, on the line where a painted shape and its background are mixed half and half.

    image [3, H, W], mask its `segment`. Each region's colour is its median; the line is drawn between the pixels'
    centres, and left out where it is the picture's border that ends the shape.
    """
    pixels = image.double().numpy()
    shape, background = (np.median(pixels[:, region.numpy()], axis=1) for region in (mask, ~mask))
    share = np.tensordot(shape - background, pixels - background[:, None, None], axes=1)
    lines = contour_generator(z=share / np.square(shape - background).sum()).lines(0.5)
    return np.concatenate(lines or [np.empty((0, 2))]) + 0.5


def fit_shape(image: Tensor) -> tuple[str, np.ndarray, float]:
    """Which of data.SHAPES a picture [3, H, W] in [-1, 1] shows, (x, y, r) in pixels, and how far its outline is off.

    Centre and radius are fitted to the outline by least squares (Gauss-Newton), from `best_shape` on; the last is the
    mean distance in pixels. No name, and nan, when no shape is to be seen.
    """
    mask = segment(image)
    if not mask.any() or mask.all():
        return "", np.zeros(3), math.nan
    (kind, fit), points = best_shape(mask), outline(image, mask)

    def distance(fit):
        return signed_distance(kind, points[:, 0] - fit[0], points[:, 1] - fit[1], fit[2])

    best = kind, fit, np.inf
    for _ in range(20):
        found = distance(fit)
        best = min(best, (kind, fit, abs(found).mean()), key=lambda tried: tried[2])
        slopes = np.stack([(distance(fit + step) - found) / 1e-3 for step in 1e-3 * np.eye(3)], axis=1)
        fit = fit - np.linalg.lstsq(slopes, found, rcond=None)[0]
    return best


def outline_error(image: Tensor) -> float:
    """How ragged a painted shape is: its outline's mean distance in pixels from the best-fitting of data.SHAPES."""
    return fit_shape(image)[2]


def unevenness(image: Tensor) -> float:
    """How blotched a painted shape is: the standard deviation of its colour, 0 to 1, two pixels off its outline."""
    outside = F.pad((~segment(image)).float()[None], (2,) * 4, value=1)
    inner = F.max_pool2d(outside, 5, 1)[0] == 0
    return (image[:, inner] / 2).std(dim=1).mean().item() if inner.sum() > 20 else math.nan


def judge(sample: Tensor, caption: str) -> tuple[float, float, bool]:
    """Compare a sample [3, H, W] in [-1, 1] with its caption: (shape's colour error, background's, right shape?).

    An error is the mean absolute difference, 0 to 1, of the region's median colour from the one that the caption
    names. `segment` finds the shape, `best_shape` names it. Raises ValueError for a caption that names no colours.
    """
    mask = segment(sample)
    regions = (mask if mask.any() else ~mask, ~mask)  # with no shape to be seen, take the background
    colours = torch.stack([sample[:, region].median(dim=1).values for region in regions]) / 2 + 0.5
    errors = (colours - prompt_colours(caption)).abs().mean(dim=1)
    return *errors.tolist(), mask.any().item() and f" {best_shape(mask)[0]} with " in caption
