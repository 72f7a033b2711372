"""SIGKILL at any moment loses nothing: `KILLS=100 pytest tests/test_kill.py` does it a hundred times."""

import os
import random
import subprocess
import sys
import time
from collections import Counter

from standin import ROOT, SAMPLE, read_run, same_tensors

KILLS = int(os.environ.get("KILLS", "5"))
# train.py, but it stops for a while where a kill could do harm, and says so: with half a weight file written, with a
# checkpoint half removed, with one of the later checkpoints set aside, before and after the log is trimmed.
SLOW = """
import shutil, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import support.files, support.log, train
from support.errors import run_command_line

def pause(moment):
    with open({moments!r}, "a") as file:
        file.write(moment + "\\n")
    time.sleep(0.2)

save_file, rmtree, rename, trim_log = support.files.save_file, shutil.rmtree, Path.rename, support.log.trim_log

def save_slowly(tensors, path, metadata):
    save_file(tensors, path, metadata)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    pause("writing")
    path.write_bytes(content)

def remove_slowly(path, **options):
    if Path(path).name.startswith("step-"):
        (Path(path) / "config.json").unlink(missing_ok=True)
        pause("removing")
    rmtree(path, **options)

def rename_slowly(path, target):
    rename(path, target)
    pause("going back")

def trim_slowly(*arguments):
    pause("resuming")
    kept = trim_log(*arguments)
    pause("resuming")
    return kept

support.files.save_file, shutil.rmtree, Path.rename = save_slowly, remove_slowly, rename_slowly
support.log.trim_log = trim_slowly
run_command_line(train.main)
"""


def test_killed_again_and_again(tmp_path):
    """Killed at random and at the worst moments, a run that is resumed each time, now and then from an earlier step,
    ends with the weights and the log of one that was left alone."""
    steps, folder, moments = 6 * KILLS, tmp_path / "killed", tmp_path / "moments"
    options = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "1", "--checkpoints-total-limit", "3"]
    options += [
        "--num-workers",
        "1",
        "--validation-steps",
        "0",
        "--checkpointing-steps",
        "2",
        "--max-train-steps",
        steps,
    ]
    program = [sys.executable, "-c", SLOW.format(root=str(ROOT), moments=str(moments)), *map(str, options)]
    program += ["--output-dir", str(folder)]
    rng, killed, kinds = random.Random(0), Counter(), ["writing", "removing", "going back", "resuming", "any"]
    while True:
        wanted = kinds[killed.total() % len(kinds)] if killed.total() < KILLS else None
        resume = ["--resume-from-checkpoint", "latest"] if (folder / "config.json").exists() else []
        complete = sorted((folder / "checkpoints").glob("step-*/config.json"), key=lambda path: path.stat().st_mtime_ns)
        if wanted == "going back" and len(complete) > 1:
            resume[1:] = [str(complete[0].parent)]
        moments.write_text("")
        with open(tmp_path / "output", "w") as output:
            process = subprocess.Popen([*program, *resume], stdout=output, stderr=output)
            while wanted not in moments.read_text().split("\n") and process.poll() is None:
                time.sleep(0.01)
                if wanted == "any" and moments.read_text():
                    time.sleep(rng.uniform(0, 1.5))
                    break
            if wanted:
                process.kill()
        if process.wait() != -9:
            assert process.returncode == 0, (tmp_path / "output").read_text()
            break
        killed[wanted] += 1
    print(dict(killed))
    assert killed.total() == KILLS and set(killed) == set(kinds)

    whole = [sys.executable, ROOT / "train.py", *options, "--output-dir", tmp_path / "whole"]
    subprocess.run(list(map(str, whole)), check=True, capture_output=True)
    assert read_run(folder) == read_run(tmp_path / "whole")
    assert same_tensors(*(tmp_path / name / "controlnet.safetensors" for name in ("killed", "whole")))
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {f"step-{steps - 4}", f"step-{steps - 2}", f"step-{steps}"}
    assert not list(folder.rglob(".*"))
