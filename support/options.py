"""Command-line options: their types, their defaults, and which of them decide a run's result."""

import argparse
import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path

from support.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse, except that a wrong option is a UserError: one line, without the usage text before it.

    `deciding` on the parsed arguments names the options that decide a run's result. One that only says where, how
    often or how fast is declared with `decides=False`, and may change when the run is resumed.
    """

    def add_argument(self, *names, decides: bool = True, **options):
        action = super().add_argument(*names, **options)
        if decides and action.dest != "help":
            self.set_defaults(deciding=[*(self.get_default("deciding") or ()), action.dest])
        return action

    def error(self, message):
        message = re.sub(r"^argument (-\S+): ", r"\1 ", message)
        raise UserError(f"{message} (see {self.prog} --help)")


def with_defaults(args: argparse.Namespace, preset) -> argparse.Namespace:
    """The arguments, with the preset's value for each that was not given; and the preset, as `preset`."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(preset=preset, **{name: getattr(preset, name, None) for name in vars(args)} | given)


def one_each(name: str, values: list, default, controlnets: int) -> list:
    """The values of a repeatable option `name`, one for each of `controlnets`: a single one serves for all of them."""
    if len(values) not in (0, 1, controlnets):
        raise UserError(f"{len(values)} {name}, {controlnets} --controlnet: give one, or one each")
    return values if len(values) > 1 else (values or [default]) * controlnets


# Help texts that several programs share.
BASE = "tiny (ships here; the default), sd15 (fetched once), a file, a folder, owner/repo:file"
VAE = "one to take instead of the base's: a file, a folder, owner/repo:file or owner/repo"
CONTROLNET = "a file, a folder, owner/repo:file or owner/repo"


def add_device(parser: ArgumentParser) -> None:
    told = "cpu, cuda, cuda:1, mps, … (default: cuda if there is one, else cpu)"
    parser.add_argument("--device", decides=False, help=told)


def add_placing(parser: ArgumentParser) -> None:
    """Add where and how large a program samples."""
    told, sizes = "auto: half on a GPU, else fp32", "shorter side, a multiple of 64 (default: tiny 128, sd15 512)"
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=told)
    parser.add_argument("--resolution", type=side, help=sizes)
    add_device(parser)


# Types of command-line options.


def number(kind: type, accepts: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """A type for add_argument: an int or float that `accepts` says yes to. `expected` completes "must be …"."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"{text}: must be {expected}")

    return convert


positive_int = number(int, lambda value: value > 0, "a whole number above 0")
count_or_zero = number(int, lambda value: value >= 0, "a whole number, 0 or more")
# PyTorch's generator for the CPU keeps 32 bits of a seed; the last belongs to data.DRAWN_HELD_OUT.
seed = number(int, lambda value: 0 <= value < 2**32 - 1, "a whole number, 0 or more and below 2^32 - 1")
port = number(int, lambda value: 0 < value < 2**16, "a whole number from 1 to 65535")
positive_float = number(float, lambda value: 0 < value < math.inf, "a number above 0")
finite_float = number(float, math.isfinite, "a finite number")
fraction = number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
# The VAE divides the side by 8, and the UNet does so again.
side = number(int, lambda value: value >= 64 and value % 64 == 0, "a multiple of 64")


def png(text: str) -> Path:
    """A type for add_argument: where a picture is to be written."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text}: must end in .png")
    return Path(text)
