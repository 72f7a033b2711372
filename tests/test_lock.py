"""A run's folder has one owner: `STARTS=50 pytest tests/test_lock.py` starts two trainings at once fifty times."""

import errno
import multiprocessing
import os
import subprocess
import sys
import time

from support.errors import UserError

import pytest
from standin import ROOT, SAMPLE, read_run

import support.lock
from support.lock import owned

STARTS = int(os.environ.get("STARTS", "1"))


def test_only_one_has_it(tmp_path):
    folder = tmp_path / "runs" / "mine"
    with owned(folder):
        mine = f"mine is in use by process {os.getpid()} on .*another --output-dir"
        with pytest.raises(UserError, match=mine), owned(folder):
            pass
        assert (folder / "lock").exists()  # the loser took nothing away
    assert not (tmp_path / "runs").exists()  # nothing was left in it
    with pytest.raises(RuntimeError), owned(folder):
        (folder / "result").write_text("")
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_child_does_not_keep_it(tmp_path):
    """Processes that load pictures live for seconds after a kill: until then nobody could resume."""
    with owned(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    with owned(tmp_path):
        child.kill()
    child.join()


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, capsys):
    """As on some network file systems: a warning, no more."""

    def not_here(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(support.lock.fcntl, "flock", not_here)
    with owned(tmp_path):
        assert "can't be locked (No locks available): use it for one run at a time" in capsys.readouterr().err


def take_again_and_again(folder):
    """Count up a file, which loses counts as soon as two do so at once."""
    done = 0
    while done < 100:
        try:
            with owned(folder):
                count = int((folder / "count").read_text())
                time.sleep(0.0005)
                (folder / "count").write_text(str(count + 1))
                done += 1
        except UserError:
            time.sleep(0.0003)


def test_many_at_once(tmp_path):
    """The lock's file comes and goes with its owners: nobody holds one that is no longer there."""
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=take_again_and_again, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert (tmp_path / "count").read_text() == "400"


def test_two_trainings_started_at_once(tmp_path):
    options = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "1", "--validation-steps", "0"]
    line = [sys.executable, "train.py", *map(str, options), "--max-train-steps", "3", "--output-dir"]
    for i in range(STARTS):
        folder = tmp_path / str(i)
        pair = [subprocess.Popen([*line, folder], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        ended = [(process.communicate()[1], process.returncode) for process in pair]
        (_, status), (told, other_status) = sorted(ended, key=lambda end: end[1])
        assert (status, other_status) == (0, 2)
        assert "is in use by process" in told or "holds a run already" in told  # if it came when all was over
        assert [entry["step"] for entry in read_run(folder)] == [1, 2, 3]
