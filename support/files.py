"""Files in and out: reading never runs code, writing never leaves half a file."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.errors import UserError, reading, writing

WEIGHT_FILES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
NO_WEIGHTS = {  # how a file begins -> what it is, and what to do
    b"version https://git-lfs": "a Git LFS pointer, not the file that it points to: run git lfs pull",
    b"<": "a web page that was saved under that name: download the file itself",
    b"": f"no file of weights: these are read from {', '.join(WEIGHT_FILES)} files",
}
PARTIAL = ".partial-"  # begins the name of what is not written to its end


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a weight file and its metadata (empty but for safetensors), memory-mapped: nothing is read yet.

    What it is, its first bytes tell, not its name. Of pickled files only tensors are read: no object is ever built.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with reading(path, "weight file"), open(path, "rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":  # after the length of the header, in JSON
        with reading(path, "safetensors file"):
            try:
                with safe_open(path, "pt") as file:
                    return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
            except SafetensorError as error:
                if "not fully covered" in str(error):
                    raise UserError(f"{path} is longer or shorter than its header says: fetch it again") from None
                raise
    if start.startswith((b"PK", b"\x80")):  # a zip file, or a pickle alone, as PyTorch once wrote
        return read_pickled(path, mmap=start.startswith(b"PK")), {}
    start = start.lstrip()
    raise UserError(f"{path} is {next(what for begins, what in NO_WEIGHTS.items() if start.startswith(begins))}")


def read_pickled(path: Path, mmap: bool) -> dict[str, Tensor]:
    """The tensors of a file that PyTorch wrote, from its top or the part where trainers keep the model."""
    with warnings.catch_warnings(action="ignore"), reading(path, "PyTorch file", damage=Exception):
        try:
            parts = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError:
            raise UserError(f"{path} holds more than tensors, and opening such a file can run code: use its "
                            ".safetensors version (or it is no PyTorch file at all)") from None  # fmt: skip
    parts = parts if isinstance(parts, dict) else {}
    folders = [name for name, value in parts.items() if isinstance(value, dict)]
    model = next((parts[name] for name in ("state_dict", "module", "model") if name in folders), parts)
    tensors = {name: value for name, value in model.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        advice = f"save its part {folders[0]!r} alone" if folders else "pass a checkpoint"
        raise UserError(f"{path} holds no named tensors: {advice}")
    return tensors


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` for a new file or folder, which is moved there if nothing goes wrong, and removed otherwise.

    Others see what stood there or what is complete, after a power cut too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{PARTIAL}{uuid4().hex}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        remove(temporary)  # it is gone when all went well


def flush(path: Path) -> None:
    """Wait until a file or a folder's names are on the disk, where the file system can do that."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only what it may write
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of some network file systems
            raise
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file, replacing what stood at `path` only when it is complete."""
    with writing(path), replacing(Path(path)) as temporary:
        write(temporary)


def make_folder(path: Path) -> None:
    """Make a folder, before the work whose results go there, and see that it can be written."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, replacing what was there only when it is complete. Every number must be finite."""
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
    with reading(path, "JSON object", remedy):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
        return content


def save_json(content: dict, path: str | Path) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


# A run's log.jsonl, one JSON object a line


def read_log(path: Path) -> list[dict]:
    """A log's entries; none if there is no log. A line that a crash cut short is left out."""
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


def write_log(path: Path, entries: list[dict]) -> None:
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def append_entry(path: Path, entry: dict) -> None:
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")
