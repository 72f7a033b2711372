"""One owner of a folder."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from support.errors import UserError, writing

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make `folder` this process's own until the end, however it ends. What is empty then is removed again.

    Raises UserError that says whose it is if another process has it, or when it can't be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / "lock"
    while True:
        with writing(folder, "another --output-dir"):
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            raise UserError(f"{folder} is in use by {owner}: wait for it, or choose another --output-dir") from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # its last owner did not remove it meanwhile
                break
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            for empty in made:
                empty.rmdir()
        file.close()
