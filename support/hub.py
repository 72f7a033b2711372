"""Files of the Hugging Face hub, fetched once."""

import contextlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from support.errors import UserError, reading, writing
from support.files import WEIGHT_FILES


@contextlib.contextmanager
def fetching(what: str, repo: str, advice: str) -> Iterator[None]:
    """Around the hub's library: whatever it raises becomes a UserError that ends with `advice`, how to do without."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its warnings at each of five tries would bury the one line below
    try:
        yield
    except Exception as error:  # of the network, the hub, the disk: each has its own kinds
        reason = str(error).split("\n")[0]
        raise UserError(f"can't fetch {what} from huggingface.co/{repo} ({reason}); {advice}") from None


def fetch(repo: str, file: str, advice: str) -> Path:
    """A file of a Hugging Face repository, from the hub's cache or else downloaded into it, with a progress bar."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    with fetching(file, repo, advice):
        cached = try_to_load_from_cache(repo, file)
        return Path(cached if isinstance(cached, str) else hf_hub_download(repo, file))


def on_hub(source: str | Path) -> tuple[str, str | None] | None:
    """The repository and file of owner/repo:file, or of owner/repo (None); None of what means a local path."""
    path, named = Path(source), re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?::(.+))?", str(source))
    if path.exists() or not named or path.parts[0] == "runs":
        return None
    repo, file = named.groups()
    missing = not file and (path.parent.exists() or path.suffix in WEIGHT_FILES)
    return None if missing else (repo, file)


def locate(source: str | Path, files: list[str], advice: str) -> Path:
    """A local path as it is; from the hub owner/repo:file, or owner/repo: the folder of its `files` (patterns)."""
    if not (named := on_hub(source)):
        return Path(source)
    repo, file = named
    if file:
        return fetch(repo, file, advice)
    from huggingface_hub import snapshot_download

    with fetching("a folder in diffusers' layout", repo, f"nor is there a file or folder {repo} here: {advice}"):
        print(f"fetching the files of huggingface.co/{repo} in diffusers' layout")
        folder = Path(snapshot_download(repo, allow_patterns=files))
    if missing := [file for file in files if "*" not in file and not (folder / file).is_file()]:
        raise UserError(f"huggingface.co/{repo} has no {missing[0]}: name a file in it, {repo}:FILE")
    return folder


def fetch_folder(repo: str, file: str, folder: Path, contains: str, advice: str) -> Path:
    """A zip file of a Hugging Face repository, unpacked once into `folder`: the part of it that `contains` a file."""
    lock = folder.absolute().with_name(f".{folder.name}.lock")  # of several processes one fetches it
    with FileLock(lock), tempfile.TemporaryDirectory(dir=lock.parent) as temporary:
        if (folder / contains).is_file():
            return folder
        archive, remedy = fetch(repo, file, advice), "delete it, so that it is fetched again"
        with reading(archive, "zip file", remedy, damage=Exception), zipfile.ZipFile(archive) as file:
            print(f"unpacking {archive.name}")
            file.extractall(temporary)  # inside it, whatever the names
        found = next(Path(temporary).rglob(contains), None)
        if found is None:
            raise UserError(f"{archive} has no {contains} in it: {remedy}")
        with writing(folder, "another folder to start from"):
            os.replace(found.parent, folder)
    return folder
