"""The mistakes that a user can put right, each told in one line: what, where, what to do.

Whatever reads, writes or checks raises UserError where it notices; the docstrings elsewhere do not repeat it.
"""

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

OUT_OF_MEMORY = re.compile("out of memory|allocate memory|_ALLOC_FAILED|could not create a primitive")  # oneDNN's words
# What damaged files make their readers raise; AttributeError, TypeError and others are bugs.
DAMAGE = (OSError, ValueError, LookupError, EOFError, RuntimeError, SafetensorError)


class UserError(Exception):
    """A mistake that the user can put right; a bug is any other exception.

    Its first argument is the whole message, one line. Others are lines to show before it, where one mistake was made
    many times.
    """

    def __str__(self) -> str:
        return self.args[0]


def known_cause(error: Exception, less_memory: str) -> str | None:
    """What to tell the user where memory or a loader's process was lost, None for any other error."""
    said = str(error).split("\n")[0].split(". ")[0]
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return f"out of memory ({said}): try {less_memory}"
    if "DataLoader worker (pid" in said:
        return f"{said}: take --num-workers 0, or give a container more shared memory with --shm-size"
    return None


def explain(error: OSError, path: str | Path = "") -> str:
    """The line for an error of the operating system: where, what, what to do."""
    place = f"{error.filename or path}: ".removeprefix(": ")
    reason = (error.strerror or str(error)).lower()
    return f"{place}{reason}; correct the path or its permissions, or make room"


@contextlib.contextmanager
def reading(path: str | Path, kind: str, remedy: str = "fetch it again", damage=DAMAGE) -> Iterator[None]:
    """Around a reader of foreign bytes: what these make it raise becomes a UserError that names path and damage.

    `damage` is Exception for a library that raises anything, around its call alone: a bug keeps its traceback.
    """
    try:
        yield
    except damage as error:
        if isinstance(error, UserError) or known_cause(error, ""):
            raise
        if isinstance(error, OSError) and error.errno:
            raise UserError(explain(error, path)) from None
        raise UserError(f"{path} is damaged or no {kind} ({error}): {remedy}") from None


@contextlib.contextmanager
def writing(path: str | Path, elsewhere: str = "another folder") -> Iterator[None]:
    """Around all that writes to `path`: UserError when the disk is full or the folder can't be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't write {path} ({reason}): make room or choose {elsewhere}") from None


@functools.cache
def warn(message: str) -> None:
    """Say it on stderr, once."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def warn_if_cut(tokenizer, prompts: dict[str, str]) -> None:
    """Say which of the prompts, by name, do not fit into the text encoder, and where the first one is cut."""
    if cut := [(name, rest) for name, prompt in prompts.items() if (rest := tokenizer.cut(prompt))]:
        name, rest = cut[0]
        warn(f"{len(cut)} of {len(prompts)} prompts are too long; {name} is cut from: {rest}")
