"""Files in and out, and how a user's mistake ends: in one line, exit status 2, no traceback.

Reading never runs code, writing never leaves half a file, fetching says what to do without a connection.
"""

import argparse
import contextlib
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class UserError(Exception):
    """A mistake that the user can mend. Its text is the whole message, one line; a bug is anything else."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong option is one line too, without the usage before it."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def run(main: Callable[[], None]) -> None:
    """Run a command line: `main`, with a UserError shown as one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        message = str(error).split("UserError: ")[-1]  # from a process that loads pictures it comes in a traceback
        print("error:", " ".join(message.split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't write {path} ({error}): make room or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):  # it is gone when all went well
            temporary.unlink()


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, replacing what was there only when it is complete."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, {"format": "pt"} | (metadata or {})))


def save_json(content: dict, path: str | Path) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def read_log(path: Path) -> list[dict]:
    """A log's lines, one JSON object each; none if there is no log. A line cut short by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


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
