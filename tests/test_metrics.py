"""Scores of pictures whose scores are known."""

import math

import numpy as np
import pytest
import torch
from standin import SAMPLE

from data import DrawnImages, PairedImages
from metrics import circle_distance, circle_iou, colour_error, is_circle_task, prompt_colours


@pytest.fixture(scope="module")
def drawn():
    pairs = DrawnImages(24, 128, seed=3)
    hints, images = (torch.stack([part(i) for i in range(len(pairs))]) for part in (pairs.hint, pairs.image))
    return hints, images, pairs.prompts


def test_perfect_and_noisy_pictures(drawn):
    hints, images, prompts = drawn
    assert circle_iou(images, hints).shape == (24,)
    assert circle_iou(images, hints).min() > 0.99  # pixels that the outline cuts may fall on either side
    assert colour_error(images, hints, prompts).shape == (24, 2)
    assert colour_error(images, hints, prompts).max() < 1e-6
    noisy = images + 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert circle_iou(noisy, hints).min() > 0.9
    expected = 0.03 * math.sqrt(2 / math.pi) / 2  # of a normal variable, in [-1, 1], which is two wide
    assert colour_error(noisy, hints, prompts).mean().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("resolution", [128, 512])
def test_real_pairs(resolution):
    """fill50k's own pictures, which went through SD's VAE; at 128 pixels its rings are grey."""
    pairs = PairedImages(SAMPLE, resolution)
    hints, images = (torch.stack([part(i) for i in range(4)]) for part in (pairs.hint, pairs.image))
    assert is_circle_task(hints, pairs.prompts)
    assert circle_iou(images, hints).min() > 0.98
    assert colour_error(images, hints, pairs.prompts).max() < 0.05
    for hint in hints:  # its ring is 1 % of the side wide
        assert circle_distance(hint)[hint.mean(dim=0) > 0.5].abs().max() < max(1, 0.008 * resolution)


def test_known_overlap():
    """Discs of radius 30, 20 pixels apart: the lens between them has a closed form."""
    y, x = np.mgrid[:128, :128] + 0.5
    ring = abs(np.hypot(x - 60, y - 64) - 30) <= 0.64
    disc = np.hypot(x - 80, y - 64) <= 30
    hint = torch.from_numpy(ring).float().expand(1, 3, -1, -1)
    image = torch.from_numpy(disc).float().expand(1, 3, -1, -1) * 2 - 1
    lens = 2 * 30**2 * math.acos(20 / 60) - 20 / 2 * math.sqrt(4 * 30**2 - 20**2)
    expected = lens / (2 * math.pi * 30**2 - lens)
    assert circle_iou(image, hint).item() == pytest.approx(expected, abs=0.01)  # the pixels' staircase
    assert circle_iou(-image, hint).item() == pytest.approx(expected, abs=0.01)  # whichever colour is which
    assert circle_iou(torch.full_like(image, 0.3), hint).item() == 0  # nothing painted
    assert circle_iou(0.3 + 0.01 * image, hint).item() == 0  # nothing that the eye could tell apart


def test_colour_error_is_of_disc_and_background(drawn):
    hints, images, prompts = drawn
    inside = torch.stack([circle_distance(hint) < 0 for hint in hints])[:, None]
    changed = torch.where(inside, images + 0.2, images - 0.1)
    errors = colour_error(changed, hints, prompts)
    torch.testing.assert_close(errors, torch.tensor([[0.1, 0.05]]).expand(24, 2), atol=1e-6, rtol=0)
    swapped = [" circle with ".join(reversed(p.removesuffix(" background").split(" circle with "))) for p in prompts]
    assert colour_error(images, hints, [f"{p} background" for p in swapped]).min() > 0.08


def test_a_clipped_circle_is_found_whole():
    y, x = np.mgrid[:128, :128] + 0.5
    hint = torch.from_numpy(abs(np.hypot(x - 30, y - 100) - 50) <= 0.64).float().expand(3, -1, -1)
    distance = circle_distance(hint)
    torch.testing.assert_close(distance, torch.from_numpy(np.hypot(x - 30, y - 100) - 50), atol=0.1, rtol=0)


def test_other_tasks_are_not_scored(drawn):
    hints, images, prompts = drawn
    square = torch.zeros(1, 3, 128, 128)
    square[:, :, 40:90, [40, 89]] = square[:, :, [40, 89], 40:90] = 1
    assert is_circle_task(hints, prompts)
    for bad in (square, torch.zeros_like(square), torch.ones_like(square), torch.rand(1, 3, 128, 128)):
        assert not is_circle_task(bad, prompts[:1])
        with pytest.raises(ValueError, match="no circle"):
            circle_iou(images[:1], bad)
    for prompt in ("a house", "", "coral circle with no such colour background"):
        assert not is_circle_task(hints[:1], [prompt])
    colours = prompt_colours("pale golden rod circle with light golden rod yellow background")
    assert (colours * 255).round().tolist() == [[238, 232, 170], [250, 250, 210]]
