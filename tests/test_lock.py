"""A run's folder has one owner: `STARTS=50 pytest tests/test_lock.py` starts two trainings at once fifty times."""

import multiprocessing
import os
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from standin import ROOT, read_run

from support.errors import UserError
from support.run import Run

STARTS = int(os.environ.get("STARTS", "1"))


def owned(folder):
    return Run(Namespace(output_dir=folder, device="cpu", resume_from_checkpoint=None, compile=False))


def test_only_one_has_it(tmp_path):
    folder = tmp_path / "runs" / "mine"
    for _ in range(2):  # what ends with an error leaves it free
        with pytest.raises(RuntimeError), owned(folder):
            told = "mine is in use by another run: wait for it, or choose another --output-dir"
            with pytest.raises(UserError, match=told), owned(folder):
                pass
            raise RuntimeError


def test_a_child_does_not_keep_it(tmp_path):
    """Processes that load pictures live for seconds after a kill: until then nobody could resume."""
    with owned(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
    with owned(tmp_path):
        child.kill()
    child.join()


def test_two_trainings_started_at_once(quick, tmp_path):
    line = [sys.executable, "train.py", *map(str, quick), "--max-train-steps", "1", "--output-dir"]
    for i in range(STARTS):
        folder = tmp_path / str(i)
        pair = [subprocess.Popen([*line, folder], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        ended = [(process.communicate()[1], process.returncode) for process in pair]
        (_, status), (told, other_status) = sorted(ended, key=lambda end: end[1])
        assert (status, other_status) == (0, 2)
        assert "is in use by another run" in told or "holds a run already" in told  # if it came when all was over
        assert [entry["step"] for entry in read_run(folder)] == [1]
