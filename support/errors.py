"""How a command line ends when the user made a mistake: one line on stderr, exit status 2, no traceback.

Whatever reads, writes or checks raises UserError where it notices; the docstrings elsewhere do not repeat it.
"""

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError
from tqdm import tqdm

OUT_OF_MEMORY = re.compile("out of memory|allocate memory|_ALLOC_FAILED|could not create a primitive")  # oneDNN's words
REMEDIES = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EMFILE: "allow more open files (ulimit -n)"}
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
    return f"{place}{reason}; {REMEDIES.get(error.errno, 'correct the path or its permissions')}"


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


class Output:
    """A stream of text that stops nothing: its reader may go away, its encoding may lack a character."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115  None: it is closed
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # `| head` has seen enough, the terminal was closed, the disk is full
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def run_command_line(main: Callable[[], None], less_memory: str = "closing other programs") -> None:
    """Call `main`; what the user or the machine is to blame for becomes one line on stderr, and exit status 2.

    `less_memory` names the options that need less.
    """
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main()
    except UserError as error:
        # From a loader's worker process it comes inside a traceback.
        end_with(*error.args[1:], str(error).split("UserError: ")[-1])
    except (OSError, MemoryError, RuntimeError) as error:
        if line := known_cause(error, less_memory) or (explain(error) if isinstance(error, OSError) else None):
            end_with(line)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def end_with(*lines: str) -> None:
    for line in lines:
        tqdm.write(f"error: {' '.join(line.split())}", file=sys.stderr)  # on a line of its own, below no progress bar
    sys.exit(2)


@functools.cache
def warn(message: str) -> None:
    """Say it on stderr, once."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def warn_if_cut(tokenizer, prompts: dict[str, str]) -> None:
    """Say which of the prompts, by name, do not fit into the text encoder, and where the first one is cut."""
    if cut := [(name, rest) for name, prompt in prompts.items() if (rest := tokenizer.cut(prompt))]:
        name, rest = cut[0]
        warn(f"{len(cut)} of {len(prompts)} prompts are too long; {name} is cut from: {rest}")
