"""SIGKILL at any moment loses nothing: `KILLS=100 pytest tests/test_kill.py` does it a hundred times."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter

from standin import LATEST, ROOT, read_run, run_main, same_tensors

import train

KINDS = ["encoding", "writing", "removing", "resuming", "any"]
KILLS = int(os.environ.get("KILLS", 4))
# train.py, but it says when a kill could do harm, and waits there for the one that is meant for it: with half of a
# target's record or of a weight file written, with a checkpoint half removed, before and after the log is trimmed.
SLOW = f"""
import os, shutil, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import support.batches, support.files, support.run, train
from support.command import run_command_line

wanted, skipped = os.environ["WANTED"], int(os.environ["SKIPPED"])

def pause(moment):
    global skipped
    skipped -= moment == wanted
    if "any" == wanted or skipped < 0:
        Path(os.environ["REACHED"]).touch()
    if skipped < 0:
        time.sleep(600)

keep, save_file, rmtree = support.batches.EncodedPairs.keep, support.files.save_file, shutil.rmtree
write_log = support.run.write_log

def keep_slowly(pairs, index, moments):
    before = pairs.path.read_bytes()
    row = keep(pairs, index, moments)
    after, middle = pairs.path.read_bytes(), (index + 1) * pairs.record_size - pairs.record_size // 2
    pairs.path.write_bytes((after[:middle] + before[middle:].ljust(len(after) - middle, b"x")))
    pause("encoding")
    pairs.path.write_bytes(after)
    return row

def save_slowly(tensors, path, metadata):
    save_file(tensors, path, metadata)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    pause("writing")
    path.write_bytes(content)

def remove_slowly(path, **options):
    if "step-" in Path(path).name:
        (Path(path) / "config.json").unlink(missing_ok=True)
        pause("removing")
    rmtree(path, **options)

def trim_slowly(*arguments):
    pause("resuming")
    write_log(*arguments)
    pause("resuming")

support.batches.EncodedPairs.keep, support.files.save_file, shutil.rmtree = keep_slowly, save_slowly, remove_slowly
support.run.write_log = trim_slowly
run_command_line(train.main)
"""


def test_killed_again_and_again(quick, tmp_path, monkeypatch):
    """Killed at random and at the worst moments, a run that is resumed each time, now and then from the checkpoint
    before the newest, ends with the weights, the log and the encoded targets of one that was left alone."""
    steps, folder, reached = 6 * KILLS, tmp_path / "killed", tmp_path / "reached"
    options = [*quick, "--data", "drawn", "--train-batch-size", "1", "--num-workers", "1", "--max-train-steps", steps]
    options += ["--checkpointing-steps", "2", "--checkpoints-total-limit", "3"]
    rng, killed = random.Random(0), Counter()
    while True:
        wanted = KINDS[killed.total() % len(KINDS)] if killed.total() < KILLS else "none"
        resume = LATEST if (folder / "config.json").exists() else []
        complete = sorted((folder / "checkpoints").glob("step-*/config.json"), key=lambda path: path.stat().st_mtime_ns)
        if wanted == "any" and len(complete) > 1:
            shutil.rmtree(complete[-1].parent)  # to go back
        reached.unlink(missing_ok=True)
        skipped = rng.randrange(2) if wanted in ("encoding", "writing", "resuming") else 0
        settings = os.environ | {"WANTED": wanted, "SKIPPED": str(skipped), "REACHED": str(reached)}
        command = [sys.executable, "-c", SLOW, *options, "--output-dir", folder, *resume]
        with open(tmp_path / "output", "w") as output:
            process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=settings)
            while process.poll() is None:
                time.sleep(0.01)
                if reached.exists():
                    time.sleep(rng.uniform(0, 1) if wanted == "any" else 0)
                    process.kill()
                    process.wait()
        if process.returncode != -9:
            assert process.returncode == 0, (tmp_path / "output").read_text()
            break
        killed[wanted] += 1
    assert killed.total() == KILLS and set(killed) == set(KINDS[:KILLS])

    run_main(monkeypatch, train, *options, "--output-dir", tmp_path / "whole")
    assert read_run(folder) == read_run(tmp_path / "whole")
    for file in ("controlnet.safetensors", f"checkpoints/step-{steps}/state.safetensors"):
        assert same_tensors(folder / file, tmp_path / "whole" / file)
    assert (folder / "cache" / "moments").read_bytes() == (tmp_path / "whole" / "cache" / "moments").read_bytes()
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {f"step-{steps - 4}", f"step-{steps - 2}", f"step-{steps}"}
    assert not list(folder.rglob(".*"))
