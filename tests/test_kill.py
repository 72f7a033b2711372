"""SIGKILL at any moment loses nothing: `KILLS=100 pytest tests/test_kill.py` does it a hundred times."""

import os
import random
import subprocess
import sys
import time

from standin import ROOT, SAMPLE, read_run, same_tensors

KILLS = int(os.environ.get("KILLS", "5"))
# train.py, but a weight file is written in two halves with a pause between, so that kills fall inside.
SLOW_WRITES = """
import sys, time
sys.path.insert(0, {root!r})
import support.files, train
from support.errors import run_command_line
save_file = support.files.save_file
def slowly(tensors, path, metadata):
    save_file(tensors, path, metadata)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    time.sleep(0.15)
    path.write_bytes(content)
support.files.save_file = slowly
run_command_line(train.main)
"""


def test_killed_again_and_again(tmp_path):
    """Killed at random moments, and inside the writing of checkpoints, a run that is resumed each time ends with the
    weights and the log of one that was left alone."""
    steps = 8 * KILLS
    options = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "1"]
    options += ["--validation-steps", "0", "--checkpointing-steps", "2", "--max-train-steps", steps]
    slow = [sys.executable, "-c", SLOW_WRITES.format(root=str(ROOT)), *map(str, options)]
    slow += ["--output-dir", str(tmp_path / "killed")]
    log, partial = tmp_path / "killed" / "log.jsonl", tmp_path / "killed" / "checkpoints" / ".partial"
    rng, kills, inside = random.Random(0), 0, 0
    while True:
        resume = ["--resume-from-checkpoint", "latest"] if (tmp_path / "killed" / "config.json").exists() else []
        before, began = log.stat().st_mtime_ns if log.exists() else 0, time.time_ns()
        with open(tmp_path / "output", "w") as output:
            process = subprocess.Popen([*slow, *resume], stdout=output, stderr=output)
        if kills < KILLS:
            deadline = time.time() + 120  # alive: it has trimmed or written its log
            while (not log.exists() or log.stat().st_mtime_ns == before) and time.time() < deadline:
                time.sleep(0.01)
            if kills % 2:
                time.sleep(rng.uniform(0, 1.5))
            else:  # inside the writing of a checkpoint
                while not (partial.exists() and partial.stat().st_mtime_ns > began) and time.time() < deadline:
                    time.sleep(0.01)
            process.kill()
            kills += process.wait() == -9
            inside += partial.exists()
        if process.wait() != -9:
            assert process.returncode == 0, (tmp_path / "output").read_text()
            break
    print(f"{kills} kills, {inside} of them inside the writing of a checkpoint")
    assert kills == KILLS
    assert inside > 0

    whole = [sys.executable, ROOT / "train.py", *options, "--output-dir", tmp_path / "whole"]
    subprocess.run(list(map(str, whole)), check=True, capture_output=True)
    assert read_run(tmp_path / "killed") == read_run(tmp_path / "whole")
    assert same_tensors(*(tmp_path / name / "controlnet.safetensors" for name in ("killed", "whole")))
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {f"step-{steps - 2}", f"step-{steps}"}
