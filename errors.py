"""How a user's mistake ends: one line that says what, where and what to do, exit status 2, no traceback."""

import argparse
import sys
from collections.abc import Callable


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
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
