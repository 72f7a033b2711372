"""Files in and out: reading never runs code, writing never leaves half a file."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.errors import UserError, reading, writing

WEIGHT_FILES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a weight file and its metadata (empty but for safetensors), memory-mapped: nothing is read yet.

    Takes .safetensors, and .ckpt, .pth, .pt, .bin as far as they hold nothing but tensors: pickled objects are
    never built. Raises UserError when the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in WEIGHT_FILES:
        raise UserError(f"{path}: weights are read from {', '.join(WEIGHT_FILES)} files")
    refuse_placeholder(path)
    if path.suffix == ".safetensors":
        with reading(path, "safetensors file"), safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    with reading(path, "PyTorch file"), warnings.catch_warnings(action="ignore"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError:
            raise UserError(
                f"{path} holds more than tensors, and opening such a file can run code: use its .safetensors version "
                "(or it is no PyTorch file at all)"
            ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        parts = [name for name, value in content.items() if isinstance(value, dict)] if type(content) is dict else []
        advice = f"save its part {parts[0]!r} alone" if parts else "pass a checkpoint"
        raise UserError(f"{path} holds no named tensors: {advice}")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}, {}


def refuse_placeholder(path: Path) -> None:
    """Raise UserError for what downloads leave under a weight file's name when they go wrong."""
    with reading(path, "weight file"), open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file that it points to: run git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page that was saved under that name: download the file itself")


PARTIAL = ".partial-"  # begins the name of what is not written to its end
UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, flush it, and move it there: readers see the old file or the new one.

    Raises UserError when the folder can't be written or the disk is full; what stood at `path` is then intact.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=PARTIAL, dir=path.parent)  # a new file, whatever else is there
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with open(temporary, "r+b") as file:  # Windows flushes only what it may write
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~UMASK)  # until now only its owner could read it
            move(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # it is gone when all went well


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, to be filled; it gets that name if nothing goes wrong, and is removed otherwise.

    Raises OSError when there is something in `path` already, or when nothing can be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~UMASK)
        move(temporary, path)
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(path))) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear(folder: Path, prefix: str) -> None:
    """Remove what a killed process left in a folder, by the beginning of its name."""
    for path in folder.glob(f"{prefix}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock file, which the operating system frees however this process ends. Raises filelock.Timeout.

    It and the folders that were made for it go again, if nothing else is in them.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows keeps it
                    path.unlink()
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def make_folder(path: Path) -> None:
    """Make a folder, before the work whose results go there. Raises UserError when nothing can be written to it."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


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
    """Write a safetensors file, replacing what was there only when it is complete.

    Raises UserError when a number is not finite: such weights are of no use.
    """
    # To the CPU first: contiguous copies of channels_last tensors, all at once, would fill a card.
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if broken := next((name for name, tensor in contiguous.items() if not tensor.isfinite().all()), None):
        raise UserError(f"{path} was not written: {broken} is not finite, as after too high a learning rate")
    metadata = {"format": "pt"} | (metadata or {})
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, remedy: str = "restore it") -> dict:
    """A JSON object. Raises UserError when it is missing or something else."""
    with reading(path, "JSON object", remedy):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
        return content


def save_json(content: dict, path: str | Path) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
