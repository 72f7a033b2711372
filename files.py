"""Files in and out, and how a user's mistake ends: in one line, exit status 2, no traceback.

Reading never runs code, writing never leaves half a file, fetching says what to do without a connection.
"""

import argparse
import contextlib
import ctypes
import json
import os
import pickle
import re
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class UserError(Exception):
    """A mistake that the user can mend. Its text is the whole message, one line; a bug is anything else.

    `details` are lines shown before it, where one mistake has been made many times.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = details


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong option is one line too, without the usage before it."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def run(main: Callable[[], None], less_memory: str = "closing other programs") -> None:
    """Run a command line: `main`, with a UserError shown as one line on stderr and exit status 2.

    Memory that runs out is one too; `less_memory` names the options that lower it.
    """
    try:
        main()
    except UserError as error:
        message = str(error).split("UserError: ")[-1]  # from a process that loads pictures it comes in a traceback
        fail(*error.details, message)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        fail(f"out of memory ({str(error).split('.')[0]}): try {less_memory}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(*lines: str) -> NoReturn:
    for line in lines:
        print("error:", " ".join(line.split()), file=sys.stderr)
    sys.exit(2)


def keep_freed_memory() -> None:
    """Let the process keep what it frees, where the C library is glibc (elsewhere nothing is done).

    By default each large tensor is mapped afresh and zeroed page by page by the kernel, step after step: on a CPU a
    third of a training step at SD 1.5's size.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's free end is not given back


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, by default a GPU if there is one. Raises UserError when it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {name} is not there ({reason}): leave it out, or take cpu") from None


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a weight file and its metadata (empty but for safetensors), memory-mapped: nothing is read yet.

    Takes .safetensors, and .ckpt, .pth, .pt, .bin as far as they hold nothing but tensors: pickled objects are
    never built. Raises UserError when the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: pass the single-file checkpoint (.safetensors) instead")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no safetensors file, or a damaged one ({error}): fetch it again") from None
    if path.suffix not in (".ckpt", ".pth", ".pt", ".bin"):
        raise UserError(f"{path}: weights are read from .safetensors, .ckpt, .pth, .pt and .bin files")
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors, and opening such a file can run code: use its .safetensors version "
            "(or it is no PyTorch file at all)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged or no PyTorch file ({error}): fetch it again") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no named tensors: pass a checkpoint")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}, {}


UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, flush it, and move it there: readers see the old file or the new one.

    Raises UserError when the folder can't be written or the disk is full; what stood at `path` is then intact.
    """
    path = Path(path)
    temporary = path.with_name(f".partial-{path.name}")  # one name, so that a killed run's is written over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors makes files that only their owner can read
        move(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't write {path} ({error}): make room or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):  # it is gone when all went well
            temporary.unlink()


def make_folder(path: Path) -> None:
    """Make a folder, before the work whose results go there. Raises UserError when nothing can be written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"can't write to {path} ({error}): choose another folder") from None


def move(source: Path, target: Path) -> None:
    """Rename in one step, and make sure that the new name outlasts a power cut."""
    os.replace(source, target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, replacing what was there only when it is complete. The same content, the same bytes."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        save_file(contiguous, temporary, {"format": "pt"} | (metadata or {}))
        with open(temporary, "r+b") as file:  # the library leaves the metadata's order to chance
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size))

    write_atomically(path, write)


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError when it is missing or something else."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as JSON ({error}): restore it") from None
    return content


def save_json(content: dict, path: str | Path) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def fit_image(image: Image.Image, resolution: int, square: bool = True) -> Tensor:
    """Any picture -> [3, H, W] in [0, 1]: the shorter side to `resolution`, antialiased bilinear, then the centre.

    The centre is a square, or else the largest part whose sides are multiples of 64.
    """
    if image.mode.startswith("I"):  # 16 bits a channel: Pillow's convert would clip, not scale
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:  # what is transparent is background: black
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    image = image.convert("RGB")
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    crop_width, crop_height = (resolution, resolution) if square else (width // 64 * 64, height // 64 * 64)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    pixels = np.asarray(image.crop((left, top, left + crop_width, top + crop_height)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def open_image(path: Path) -> Image.Image:
    """A picture, decoded whole and turned as its EXIF says. Raises UserError when it is missing or no picture."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise UserError(f"{path} can't be read as a picture ({error}): save it again as PNG or JPEG") from None


def read_image(path: Path, resolution: int, square: bool = True) -> Tensor:
    """open_image, then fit_image: a picture's file -> [3, H, W] in [0, 1]. Raises UserError as open_image does."""
    return fit_image(open_image(path), resolution, square)


def read_log(path: Path) -> list[dict]:
    """A log's lines, one JSON object each; none if there is no log. A line cut short by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def append_line(file: TextIO, line: str) -> None:
    """Add a line to an open log. Raises UserError when the disk is full."""
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        raise UserError(f"can't write {file.name} ({error}): make room, then resume") from None


def fetch(repo: str, file: str, advice: str) -> Path:
    """A file of a Hugging Face repository, from the hub's cache or else downloaded into it, with a progress bar.

    Raises UserError naming repository and file when it can't be had; `advice` says how to do without.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings at each of five tries would bury the one line below
    try:
        cached = try_to_load_from_cache(repo, file)
        if isinstance(cached, str):
            return Path(cached)
        print(f"fetching {file} from huggingface.co/{repo}")
        return Path(hf_hub_download(repo, file))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"can't fetch {file} from huggingface.co/{repo} ({reason}); {advice}") from None


def locate(source: str | Path, advice: str) -> Path:
    """A local path as it is, or owner/repo:file fetched from the hub. Raises UserError as fetch does."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+):(.+)", str(source))
    if match and not Path(source).exists():
        return fetch(match[1], match[2], advice)
    return Path(source)
