"""One owner of a folder."""

import contextlib
import os
import socket
import sys
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
    if fcntl is None:
        yield
        return
    made, path = [path for path in (folder, *folder.parents) if not path.exists()], folder / "lock"
    while True:
        with writing(folder, "another --output-dir"):
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            raise UserError(f"{folder} is in use by {owner}: wait for it, or choose another --output-dir") from None
        except OSError as error:
            print(
                f"warning: {folder} can't be locked ({error.strerror}): use it for one run at a time", file=sys.stderr
            )
            break
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its last owner has just removed it
                break
    os.register_at_fork(after_in_child=file.close)  # a child that outlives a kill must not keep the lock
    try:
        with writing(folder, "another --output-dir"):
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
