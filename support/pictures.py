"""Pictures in and out: any file to a tensor of the right size, and tensors to PNGs and contact sheets."""

import contextlib
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageOps, PngImagePlugin
from torch import Tensor

from support.errors import UserError, reading, warn
from support.files import write_atomically

MARGIN = 84  # pixels left of a contact sheet's pictures, for the labels


def to_picture(image: Tensor) -> Image.Image:
    """One image [3, H, W] in [-1, 1] as a Pillow picture."""
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def save_picture(picture: Image.Image, path: Path, settings: dict | None = None) -> None:
    """Write a PNG; `settings` go into its text chunk "settings" as JSON."""
    info = PngImagePlugin.PngInfo()
    if settings:
        info.add_text("settings", json.dumps(settings, default=str))
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG", pnginfo=info))


def save_animation(frames: Sequence[Image.Image], durations: Sequence[int], path: Path, quality: int) -> None:
    """Write an animated WebP that starts again at its end; `durations` are milliseconds, one for each frame."""
    write_atomically(path, lambda temporary: frames[0].save(
        temporary, format="WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=quality,
        method=6,
    ))  # fmt: skip


def save_samples(images: Tensor, hints: list[Tensor], path: Path, seed: int, settings: dict) -> None:
    """Write the row of hints [3, H, W] in [0, 1] and samples [N, 3, H, W] in [-1, 1], and each sample as NAME-i.png.

    Each has the settings that make it alone; sample i's seed is `seed` + i.
    """
    samples = [to_picture(image) for image in images]
    for i, sample in enumerate(samples):
        alone = settings | {"seed": seed + i, "num_samples": 1}
        save_picture(sample, path.with_name(f"{path.stem}-{i}.png"), alone)
    save_picture(side_by_side([*(to_picture(hint * 2 - 1) for hint in hints), *samples]), path, settings)


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one height as one row."""
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))


def read_strip(path: Path, count: int) -> Tensor:
    """A row of `count` pictures of one size, as side_by_side makes it -> [N, 3, H, W] in [-1, 1]."""
    with reading(path, f"row of {count} pictures", "delete it"), Image.open(path, formats=["PNG"]) as row:
        pixels = torch.from_numpy(np.array(row)) / 127.5 - 1
        return pixels.permute(2, 0, 1).unflatten(2, (count, -1)).permute(2, 0, 1, 3)


def contact_sheet(rows: dict[str, Tensor], captions: list[str]) -> Image.Image:
    """Rows of images [N, 3, H, W] in [-1, 1] by their labels, one column a pair, with the captions below."""
    side = next(iter(rows.values())).shape[-1]
    sheet = Image.new("RGB", (MARGIN + side * len(captions), side * len(rows) + 76), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (label, images) in enumerate(rows.items()):
        draw.text((4, side * y + side // 2 - 8), label, fill="black", font_size=16)
        for x, image in enumerate(images):
            sheet.paste(to_picture(image), (MARGIN + side * x, side * y))
    for x, caption in enumerate(captions):
        lines = textwrap.wrap(caption, max(side // 7, 8))[:4]
        draw.text((MARGIN + side * x + 2, side * len(rows) + 2), "\n".join(lines), fill="black", font_size=13)
    return sheet


def fit_image(image: Image.Image, resolution: int, square: bool = True) -> Tensor:
    """Any picture -> [3, H, W] in [0, 1]: the shorter side to `resolution`, antialiased bilinear, then the centre.

    The centre is a square, or else the largest part whose sides are multiples of 64.
    """
    size = [resolution if square else round(resolution * side / min(image.size)) // 64 * 64 for side in image.size]
    pixels = np.array(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BILINEAR), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


# Pillow knows more, among them PostScript, for which it would start another program.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA")
MOST_OBLONG = 16  # times as long as wide


def is_picture(path: Path) -> bool:
    """By its ending."""
    return Image.registered_extensions().get(path.suffix.lower()) in FORMATS


def open_image(path: Path, data: bytes | None = None) -> Image.Image:
    """A picture as RGB: decoded whole, turned as its EXIF says, its colours those of sRGB, black where transparent.

    `data` is its content where `path` is but a name.
    """
    picture = path, "picture", "save it again as PNG or JPEG, smaller if it is huge"
    source = path if data is None else io.BytesIO(data)
    if data is None and path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no regular file: pass a picture")
    with reading(*picture, damage=Exception), Image.open(source, formats=FORMATS) as image:
        if too_oblong(image):
            raise UserError("{} is {}x{} pixels: crop it, to at most 16 to 1".format(path, *image.size))
        if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
            raise UserError(f"{path} has 32 bits a channel: save it again as PNG")
        turned = ImageOps.exif_transpose(image)
    with reading(*picture):
        return as_srgb(turned, path)


def too_oblong(image: Image.Image) -> bool:
    return max(image.size) > MOST_OBLONG * min(image.size)


def sound_size(content: bytes) -> tuple[int, int] | None:
    """The size of a PNG or JPEG that seems whole: its checksums fit, or its last scan has an end. None for others."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
        if image.format == "PNG":
            image.verify()  # which raises what differs from a checksum
        elif content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):  # end of image, start of scan
            return None
        return None if too_oblong(image) else image.size


def as_srgb(image: Image.Image, path: Path) -> Image.Image:
    """A picture of any mode, with or without a colour profile, as RGB."""
    if image.mode.startswith("I"):  # 16 bits a channel: Pillow's convert would clip, not scale
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    opacity = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if profile := image.info.get("icc_profile"):
        try:
            theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            grey = theirs.profile.xcolor_space == "GRAY" and Image.getmodebase(image.mode) == "L"
            image = image if image.mode == "CMYK" else image.convert("L" if grey else "RGB")
            image = ImageCms.profileToProfile(image, theirs, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError) as error:
            warn(f"{path}: its colour profile can't be used ({error}); its colours are read as sRGB's")
    image = image.convert("RGB")
    if opacity is None:
        return image
    shown = Image.composite(image, Image.new("RGB", image.size), opacity)
    # Dark ink on transparency, as drawing programs save it, would not be seen: what is opaque is the line.
    return shown if shown.convert("L").getextrema()[1] > 127 else opacity.convert("RGB")
