"""Hints made from photographs."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from standin import SAMPLE, run_main

import sample
from data import DrawnImages
from support.detect import detector, is_inverted
from support.pictures import fit_image, open_image, read_strip, save_picture, to_picture
from weights import save_controlnet

TARGET = SAMPLE / "target" / "0.png"  # a disc: its edge is the ring of source/0.png


@pytest.fixture(scope="module")
def photograph():
    """Blurred noise, [3, 192, 256] in [0, 1]: edges of all strengths and directions."""
    noise = np.random.default_rng(0).normal(size=(192, 256, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    pixels = np.uint8(np.clip(128 + 60 * smooth / smooth.std(), 0, 255))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def test_canny_is_that_of_the_authors_demo(photograph):
    pixels = np.uint8((photograph * 255).round().permute(1, 2, 0))
    for chosen, thresholds in (((), (100, 200)), ((30, 60), (30, 60))):
        hint = detector("canny", *chosen)(photograph)
        expected = torch.from_numpy(cv2.Canny(pixels, *thresholds)).float() / 255
        assert torch.equal(hint, expected.expand(3, -1, -1)) and hint.any()
    assert detector("none")(photograph) is photograph


def test_a_scribble_is_strokes_along_the_main_edges():
    """An edge becomes a stroke of 11 pixels, the width of the authors' fake scribbles; noise and specks become none."""
    picture = torch.full((3, 256, 256), 0.2)
    picture[:, :, 128:] = 0.8
    picture[:, 40:52, 40:52] = 0.8  # its outline is shorter than 50 pixels
    picture += 0.05 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    hint = detector("scribble")(picture.clamp(0, 1))
    assert hint.shape == picture.shape and set(hint.unique().tolist()) == {0, 1}
    widths, columns = hint[0].sum(1), hint[0].any(0).nonzero().flatten()
    assert (widths[8:-8] >= 10).all() and (widths <= 14).all()
    assert columns.min() >= 118 and columns.max() <= 138


def test_each_hint_has_its_detector(controlnet, nano, tmp_path, monkeypatch):
    """The hint beside the samples is the detected one, and the settings in the file make the picture again."""
    ready, control = SAMPLE / "source" / "1.png", tmp_path / "control.safetensors"
    save_controlnet(controlnet, control)
    options = ["--controlnet", control, "--hint", TARGET, "--detect", "canny"]
    options += ["--controlnet", control, "--hint", ready, "--detect", "none", "--canny-low", "50", "--canny-high", "90"]
    options += ["--base", nano, "--steps", "1", "--resolution", "64", "--output", tmp_path / "out.png"]
    run_main(monkeypatch, sample, *options)
    first, second, _ = read_strip(tmp_path / "out.png", 3)
    expected = detector("canny", 50, 90)(fit_image(open_image(TARGET), 64))
    assert torch.equal(first, expected * 2 - 1) and 0.01 < expected.mean() < 0.1  # a ring
    assert (second - (fit_image(open_image(ready), 64) * 2 - 1)).abs().max() <= 0.5 / 127.5 + 1e-6  # 8 bits
    settings = json.loads(Image.open(tmp_path / "out-0.png").text["settings"])
    assert (settings["detect"], settings["canny_low"], settings["canny_high"]) == (["canny", "none"], 50, 90)


def test_a_hint_that_is_dark_on_white(controlnet, nano, tmp_path, monkeypatch, capsys):
    """It is named, unless it is turned; what is white inside or at its frame alone is not, nor are colours."""
    hint = fit_image(open_image(SAMPLE / "source" / "0.png"), 64)
    framed, palettes = torch.ones_like(hint), DrawnImages(50, 64, palette=True)
    framed[:, 1:-1, 1:-1] = 0
    assert is_inverted(1 - hint) and is_inverted(0.9 - 0.9 * hint)
    assert not any(is_inverted(other) for other in (hint, framed, 1 - framed, *map(palettes.hint, range(50))))
    save_picture(to_picture(1 - hint * 2), tmp_path / "dark.png")
    save_controlnet(controlnet, tmp_path / "c.safetensors")
    options = ["--base", nano, "--controlnet", tmp_path / "c.safetensors", "--hint", tmp_path / "dark.png", "--steps",
               "1", "--resolution", "64", "--output", tmp_path / "out.png"]  # fmt: skip
    for turned, warnings in (([], 1), (["--invert"], 0)):
        run_main(monkeypatch, sample, *options, *turned)
        assert capsys.readouterr().err.count(f"warning: {tmp_path / 'dark.png'}: the hint is dark on white") == warnings
    shown, _ = read_strip(tmp_path / "out.png", 2)
    assert (shown - (hint * 2 - 1)).abs().max() <= 2 / 127.5  # rounded to 8 bits twice
