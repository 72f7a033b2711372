"""Any picture in, samples and sheets out."""

import os
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from standin import SAMPLE, refusal

from support.errors import UserError
from support.pictures import fit_image, open_image, read_strip, save_picture, side_by_side, to_picture


def test_a_strip_is_read_back(tmp_path):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_picture(side_by_side([to_picture(image) for image in images]), tmp_path / "strip.png")
    assert (read_strip(tmp_path / "strip.png", 3) - images).abs().max() <= 0.5 / 127.5 + 1e-6  # 8 bits
    assert "strip.png is damaged or no row of 5 pictures" in refusal(read_strip, tmp_path / "strip.png", 5)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n"


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda path: path.symlink_to(path), "too many levels of symbolic links; correct the path or its permissions"),
        (lambda path: path.mkdir(), "is no regular file"),
        (os.mkfifo, "is no regular file"),  # reading it would wait for a writer
        (lambda path: path.write_bytes((SAMPLE / "source" / "0.png").read_bytes()[:500]), "is damaged or no picture"),
        (lambda path: path.write_bytes(POSTSCRIPT), "is damaged or no picture"),  # Pillow would start Ghostscript
        (lambda path: Image.fromarray(np.ones((64, 64), np.float32)).save(path, "TIFF"), "32 bits a channel"),
        (lambda path: Image.new("RGB", (1, 5000)).save(path), "is 1x5000 pixels: crop it"),
        (lambda path: Image.new("1", (13_500, 13_500)).save(path), "exceeds limit .* smaller if it is huge"),
    ],
)
def test_what_is_no_picture_of_use(make, told, tmp_path):
    make(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"a.png.*{told}"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16"])
def test_any_picture_is_read(mode, tmp_path):
    grey = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (80, 1))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "a.png")
    picture = open_image(tmp_path / "a.png")
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture) - grey[..., None].astype(int)).max() <= (1 if mode == "P" else 0)


@pytest.mark.parametrize("ink", [255, 0])
def test_transparent_is_background(ink, tmp_path):
    """A white line on black is, and dark ink is its line, for else it would not be seen."""
    image = Image.new("RGBA", (64, 64), (ink, ink, ink, 0))
    image.paste((ink, ink, ink, 255), (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    pixels = np.asarray(open_image(tmp_path / "a.png"))
    assert pixels[:, :32].min() == 255 and pixels[:, 32:].max() == 0


def test_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter: what is above is on the right
    image = Image.new("RGB", (64, 128))
    image.paste((255, 255, 255), (0, 0, 64, 64))
    image.save(tmp_path / "a.jpg", exif=exif)
    pixels = np.asarray(open_image(tmp_path / "a.jpg"))
    assert pixels.shape == (64, 128, 3) and pixels[:, 72:].min() > 250 and pixels[:, :56].max() < 5


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Of a screen whose red is sRGB's blue, and the other way round.
SWAPPED = SRGB.replace(b"rXYZ", b"tmp ").replace(b"bXYZ", b"rXYZ").replace(b"tmp ", b"bXYZ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_colour_profiles(mode, tmp_path, capsys):
    """The same colours in sRGB: hints, targets, photographs and uploads are all read by open_image."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=SWAPPED)
    expected = np.asarray(image.convert("RGB"))[..., ::-1]
    assert np.abs(np.asarray(open_image(tmp_path / "a.png")) - expected.astype(int)).max() <= 1
    assert capsys.readouterr().err == ""


def test_damaged_colour_profile(tmp_path, capsys):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for i, (mode, profile) in enumerate((("RGB", SWAPPED[:200]), ("RGB", b"profile"), ("CMYK", SRGB))):
        path = tmp_path / f"{i}.tif"
        image.convert(mode).save(path, icc_profile=profile)
        assert open_image(path).tobytes() == image.convert(mode).convert("RGB").tobytes()
        assert f"warning: {path}: its colour profile can't be used" in capsys.readouterr().err


def test_sizes():
    wide = Image.new("RGB", (300, 100))
    assert fit_image(wide, 64).shape == (3, 64, 64)
    assert fit_image(wide, 64, square=False).shape == (3, 64, 192)
    assert fit_image(wide.transpose(Image.Transpose.ROTATE_90), 64, square=False).shape == (3, 192, 64)
    checks = Image.fromarray((np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8))
    grey = fit_image(checks, 128)  # antialiased: a fine chequer becomes grey
    assert grey.std() < 0.02 and abs(grey.mean() - 0.5) < 0.02


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_mutated_pictures(ending, tmp_path):
    """Cut short, with a bit flipped, or with bytes put in: read, or refused with a UserError; else this test fails."""
    path, rng, refused = tmp_path / f"a.{ending}", random.Random(0), 0
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(path)
    original = path.read_bytes()
    for i in range(60):
        content, at = bytearray(original), rng.randrange(len(original))
        if i % 3 == 0:
            del content[at:]
        elif i % 3 == 1:
            content[at] ^= 1 << rng.randrange(8)
        else:
            content[at:at] = rng.randbytes(rng.randrange(1, 30))
        path.write_bytes(content)
        try:
            open_image(path)
        except UserError:
            refused += 1
    assert refused > 10  # most of those that were cut short
