"""How a command line ends when the user made a mistake: one line on stderr, exit status 2, no traceback."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from tqdm import tqdm

OUT_OF_MEMORY = (  # in a RuntimeError
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class UserError(Exception):
    """A mistake that the user can put right. Its text is the whole message, one line; a bug is any other exception.

    `details` are lines to show before it, where one mistake was made many times.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = details


def run_command_line(main: Callable[[], None], less_memory: str = "closing other programs") -> None:
    """Call `main`; a UserError becomes one line on stderr and exit status 2.

    So does running out of memory; `less_memory` names the options that need less.
    """
    try:
        main()
    except UserError as error:
        message = str(error).split("UserError: ")[-1]  # from a loader's worker process it comes inside a traceback
        fail(*error.details, message)
    except (MemoryError, RuntimeError) as error:
        if "Bus error" in str(error):  # what PyTorch says when a loader's worker finds /dev/shm full
            fail("shared memory ran out: take --num-workers 0, or give a container more with --shm-size")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            phrase in str(error) for phrase in OUT_OF_MEMORY
        ):
            raise
        fail(f"out of memory ({str(error).split('.')[0]}): try {less_memory}")
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
