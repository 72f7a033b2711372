"""Any picture in, samples and sheets out."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from support.errors import UserError
from support.pictures import (
    MARGIN,
    contact_sheet,
    fit_image,
    open_image,
    read_strip,
    save_picture,
    side_by_side,
    to_picture,
)


def test_to_picture():
    assert to_picture(torch.tensor([[[-1.0]], [[0.0]], [[2.0]]])).getpixel((0, 0)) == (0, 128, 255)


def test_contact_sheet():
    sheet = contact_sheet({"black": -torch.ones(2, 3, 64, 64), "white": torch.ones(2, 3, 64, 64)}, ["one", "two"])
    assert sheet.size == (MARGIN + 2 * 64, 2 * 64 + 64)
    assert sheet.getpixel((MARGIN + 64 + 5, 5)) == (0, 0, 0)
    assert sheet.getpixel((MARGIN + 64 + 5, 64 + 5)) == (255, 255, 255)


def test_a_strip_is_read_back(tmp_path):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_picture(side_by_side([to_picture(image) for image in images]), tmp_path / "strip.png")
    assert (read_strip(tmp_path / "strip.png", 3) - images).abs().max() <= 0.5 / 127.5 + 1e-6  # 8 bits


def test_a_broken_strip_is_named(tmp_path):
    Image.new("RGB", (30, 8)).save(tmp_path / "strip.png")
    with pytest.raises(UserError, match="strip.png is damaged or no row of 4 pictures .*delete it"):
        read_strip(tmp_path / "strip.png", 4)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n"


@pytest.mark.parametrize(
    "make, told",
    [
        (os.mkfifo, "is no regular file"),  # reading it would wait for a writer
        (lambda path: path.symlink_to(path), "too many levels of symbolic links; correct the path or its permissions"),
        (lambda path: path.mkdir(), "is no regular file"),
        (lambda path: path.write_bytes(POSTSCRIPT), "is damaged or no picture"),  # Pillow would start Ghostscript
        (lambda path: Image.fromarray(np.ones((64, 64), np.float32)).save(path, "TIFF"), "32 bits a channel"),
        (lambda path: Image.fromarray(np.full((64, 64), 200, np.int32)).save(path, "TIFF"), "32 bits a channel"),
        (lambda path: Image.new("RGB", (60_000, 1)).save(path), "is 60000x1 pixels: crop it"),
        (lambda path: Image.new("RGB", (1, 5000)).save(path), "is 1x5000 pixels: crop it"),
        (lambda path: Image.new("1", (13_500, 13_500)).save(path), "exceeds limit .* Make it smaller"),
    ],
)
def test_what_is_no_picture_of_use(make, told, tmp_path):
    make(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"a.png.*{told}"):
        open_image(tmp_path / "a.png")


def test_what_is_cropped_is_not_resized(tmp_path, monkeypatch):
    """The same as resizing all of it and cropping then, up to the rounding of the filter's coefficients."""
    pixels = np.random.default_rng(0).integers(0, 255, (90, 1200, 3), dtype=np.uint8)
    whole = Image.fromarray(pixels).resize((round(1200 * 64 / 90), 64), Image.Resampling.BILINEAR)
    left = (whole.width - 64) // 2
    expected = torch.from_numpy(np.array(whole.crop((left, 0, left + 64, 64)))).permute(2, 0, 1)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *more: sizes.append(size) or resize(self, size, *more)
    )
    assert (fit_image(Image.fromarray(pixels), 64) * 255 - expected).abs().max() <= 1 + 1e-4
    assert sizes == [(64, 64)]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_any_picture_is_read(mode):
    grey = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (80, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    tensor = fit_image(image, 64)
    assert tensor.shape == (3, 64, 64)
    expected = fit_image(Image.fromarray(grey), 64)
    assert (tensor - expected).abs().max() <= 0.01


def test_transparent_is_background():
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 32, 64))
    tensor = fit_image(image, 64)
    assert tensor[:, :, :32].min() == 1
    assert tensor[:, :, 32:].max() == 0


def test_sizes():
    wide = Image.new("RGB", (300, 100))
    assert fit_image(wide, 64).shape == (3, 64, 64)
    assert fit_image(wide, 64, square=False).shape == (3, 64, 192)
    assert fit_image(wide.transpose(Image.Transpose.ROTATE_90), 64, square=False).shape == (3, 192, 64)
    checks = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8))
    grey = fit_image(checks, 128)  # antialiased: a fine chequer becomes grey
    assert grey.std() < 0.02 and abs(grey.mean() - 0.5) < 0.02
