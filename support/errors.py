"""How a command line ends when the user made a mistake: one line on stderr, exit status 2, no traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import torch
from safetensors import SafetensorError
from tqdm import tqdm

# What an error says -> what the user is told; {less_memory} names the options that need less.
MEMORY = "out of memory ({said}): try {less_memory}"
SAID_IN_ERRORS = {
    "can't allocate memory": MEMORY,
    "Cannot allocate memory": MEMORY,  # ENOMEM
    "could not create a primitive": MEMORY,  # oneDNN, which doesn't say why
    "CUDA error: out of memory": MEMORY,
    "CUBLAS_STATUS_ALLOC_FAILED": MEMORY,
    "CUDNN_STATUS_ALLOC_FAILED": MEMORY,
    "Bus error": "shared memory ran out: take --num-workers 0, or give a container more with --shm-size",
    "DataLoader worker (pid": "a process that loads pictures has died ({said}): take --num-workers 0",
}
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EAGAIN: "close other programs",
}


class UserError(Exception):
    """A mistake that the user can put right. Its text is the whole message, one line; a bug is any other exception.

    `details` are lines to show before it, where one mistake was made many times.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = details


def known_cause(error: Exception, less_memory: str = "") -> str | None:
    """What to tell the user where memory, processes or the like ran out; None for any other error.

    `less_memory` names what needs less.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        line = MEMORY
    else:
        line = next((line for phrase, line in SAID_IN_ERRORS.items() if phrase in str(error)), None)
    return line and line.format(said=str(error).split("\n")[0].split(". ")[0], less_memory=less_memory)


def explain(error: OSError, path: str | Path = "") -> str:
    """The line for an error of the operating system: where, what, what to do."""
    place = f"{error.filename or path}: ".removeprefix(": ")
    reason = (error.strerror or str(error)).lower()
    return f"{place}{reason}; {REMEDIES.get(error.errno, 'correct the path or its permissions')}"


@contextlib.contextmanager
def reading(path: str | Path, kind: str, remedy: str = "fetch it again") -> Iterator[None]:
    """Around a reader of foreign bytes: all that it raises becomes a UserError that names the path, or the damage."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if known_cause(error):
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

    def __init__(self, stream: TextIO):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self.outlast(lambda: self.stream.write(text))

    def flush(self) -> None:
        self.outlast(self.stream.flush)

    def outlast(self, use: Callable[[], object]) -> None:
        try:
            use()
        except OSError:  # `| head` has seen enough, the terminal was closed, the disk is full
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


def run_command_line(main: Callable[[], None], less_memory: str = "closing other programs") -> None:
    """Call `main`; a UserError becomes one line on stderr and exit status 2.

    So does what the machine is to blame for, such as a full disk, or too little memory: `less_memory` names the options
    that need less.
    """
    sys.stdout, sys.stderr = (stream and Output(stream) for stream in (sys.stdout, sys.stderr))  # None: closed
    try:
        main()
    except UserError as error:
        message = str(error).split("UserError: ")[-1]  # from a loader's worker process it comes inside a traceback
        fail(*error.details, message)
    except (OSError, MemoryError, RuntimeError) as error:
        if line := known_cause(error, less_memory):
            fail(line)
        if not isinstance(error, OSError):
            raise
        fail(explain(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(*lines: str) -> NoReturn:
    for line in lines:
        tqdm.write(f"error: {' '.join(line.split())}", file=sys.stderr)  # on a line of its own, below no progress bar
    sys.exit(2)


def warn_if_cut(tokenizer, prompts: dict[str, str]) -> None:
    """Say which of the prompts, by name, do not fit into the text encoder, and where the first one is cut."""
    cut = [(name, rest) for name, prompt in prompts.items() if (rest := tokenizer.cut(prompt))]
    if cut:
        name, rest = cut[0]
        print(
            f"warning: {len(cut)} of {len(prompts)} prompts are too long; {name} is cut from: {rest}", file=sys.stderr
        )
