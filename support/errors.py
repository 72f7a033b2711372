"""How a command line ends when the user made a mistake: one line on stderr, exit status 2, no traceback."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch


class UserError(Exception):
    """A mistake that the user can put right. Its text is the whole message, one line; a bug is any other exception.

    `details` are lines to show before it, where one mistake was made many times.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__(message)
        self.details = details


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that a wrong option is a UserError: one line, without the usage text before it."""

    def error(self, message):
        message = re.sub(r"^argument (-\S+): ", r"\1 ", message)
        raise UserError(f"{message} (see {self.prog} --help)")


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


# Types of command-line options.


def number(kind: type, accepts: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """A type for add_argument: an int or float that `accepts` says yes to. `expected` completes "must be …"."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {expected}")
        return value

    return convert


positive_int = number(int, lambda value: value > 0, "a whole number above 0")
count_or_zero = number(int, lambda value: value >= 0, "a whole number, 0 or more")
positive_float = number(float, lambda value: 0 < value < math.inf, "a number above 0")
finite_float = number(float, math.isfinite, "a finite number")
share = number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
side = number(int, lambda value: value >= 64 and value % 64 == 0, "a multiple of 64")  # 8 of the VAE times 8 of the UNet
