"""How every command begins and ends: a user's mistake is one line on stderr and exit status 2, no traceback.

Commands import this before anything that loads PyTorch, and with it OpenMP, which reads then how long its threads spin
while they wait for each other. By default that is so long that a step beside one busy process, which keeps a thread
from its core, takes up to twenty times as long as alone.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

from support.errors import UserError, explain, known_cause

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


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
