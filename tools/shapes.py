"""Does a picture show what its caption says, the shape and both colours? This is how the miniature is judged."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import SHAPES, signed_distance
from metrics import prompt_colours, segment

GRID, SIZES = 64, 25  # pixels a side that best_shape works with, and the sizes of each shape that it tries


@cache
def shape_masks() -> tuple[Tensor, Tensor]:
    """Each of data.SHAPES at 25 radii from 1/8 to 1/2 of the side: spectra [75, 128, 65], and areas [75, 64, 64].

    An area is the number of a shape's pixels that lie inside the picture when its centre is at that place.
    """
    y, x = np.mgrid[-GRID:GRID, -GRID:GRID]
    radii = np.linspace(1 / 8, 1 / 2, SIZES) * GRID
    masks = np.stack([signed_distance(shape, x, y, radius) <= 0 for shape in SHAPES for radius in radii])
    spectra = torch.fft.rfft2(torch.from_numpy(np.fft.ifftshift(masks, (1, 2))).float()).conj()
    return spectra, shared_pixels(torch.ones(GRID, GRID), spectra)


def shared_pixels(picture: Tensor, spectra: Tensor) -> Tensor:
    """How many pixels a picture [64, 64] shares with each shape at each place: [75, 64, 64], a correlation."""
    padded = torch.fft.rfft2(picture, s=(2 * GRID, 2 * GRID))
    return torch.fft.irfft2(padded * spectra)[:, :GRID, :GRID]


def best_shape(mask: Tensor) -> str:
    """Which of data.SHAPES a segmented picture, bool [H, W], shows: the one that covers it best.

    Every shape is tried in every size at every place of a 64x64 grid, clipped by the border; the best has the highest
    intersection over union.
    """
    spectra, areas = shape_masks()
    mask = (F.adaptive_avg_pool2d(mask[None].float(), GRID)[0] > 0.5).float()
    both = shared_pixels(mask, spectra)
    iou = both / (areas + mask.sum() - both).clamp(min=1)
    return SHAPES[iou.flatten().argmax().item() // iou[:SIZES].numel()]


def judge(sample: Tensor, caption: str) -> tuple[float, float, bool]:
    """Compare a sample [3, H, W] in [-1, 1] with its caption: (shape's colour error, background's, right shape?).

    An error is the mean absolute difference, 0 to 1, of the region's median colour from the one that the caption
    names. `segment` finds the shape, `best_shape` names it. Raises ValueError for a caption that names no colours.
    """
    mask = segment(sample)
    regions = (mask if mask.any() else ~mask, ~mask)  # with no shape to be seen, take the background
    colours = torch.stack([sample[:, region].median(dim=1).values for region in regions]) / 2 + 0.5
    errors = (colours - prompt_colours(caption)).abs().mean(dim=1)
    return *errors.tolist(), mask.any().item() and f" {best_shape(mask)} with " in caption
