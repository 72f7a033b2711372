"""Several processes on a CPU give what one gives."""

import subprocess
import sys

import pytest
import torch
from standin import LATEST, ROOT, read_run, run_main

import train
from support.files import read_tensors


@pytest.fixture
def launch(quick, tmp_path):
    """launch(name, *options) -> what two processes under torchrun did, with gloo on the CPU."""

    def run(name, *options, program=ROOT / "train.py"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program, *quick]
        command += ["--device", "cpu", "--output-dir", tmp_path / name, *options]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)

    return run


def test_two_processes_equal_one(quick, launch, tmp_path, monkeypatch):
    """The same global batch gives the same weights up to rounding: sums in another order. And resuming works."""
    options = ["--gradient-accumulation-steps", "2", "--learning-rate", "1e-4"]
    one = ["--train-batch-size", "4", "--max-train-steps", "4", "--output-dir", tmp_path / "one"]
    run_main(monkeypatch, train, *quick, *options, *one)
    options += ["--train-batch-size", "2", "--max-train-steps"]
    for last, resume in (("2", []), ("4", LATEST)):
        done = launch("two", *options, last, *resume)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_tensors(tmp_path / name / "controlnet.safetensors")[0] for name in ("one", "two"))
    # Adam divides by the gradient's size, so that in four steps of 1e-4 a sign lost to rounding moves at most 8e-4.
    largest = max((one[name] - two[name]).abs().max().item() for name in one)
    typical = torch.cat([(one[name] - two[name]).abs().flatten() for name in one]).mean().item()
    assert largest <= 8e-4 and typical < 1e-6
    logs = [read_run(tmp_path / name) for name in ("one", "two")]
    assert [entry["step"] for entry in logs[1]] == [1, 2, 3, 4]  # one process writes it
    assert [entry["loss"] for entry in logs[1]] == pytest.approx([entry["loss"] for entry in logs[0]], rel=1e-4)


# train.py, but the loss of the third batch is no number, and the process that writes takes its time.
BROKEN = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import support.files, train
from support.command import run_command_line
mse_loss, save_file, losses = train.F.mse_loss, support.files.save_file, []

def broken(*arguments):
    losses.append(mse_loss(*arguments))
    return losses[-1] * float("nan") if len(losses) == 3 else losses[-1]

def slowly(*arguments):
    time.sleep(1)
    save_file(*arguments)

train.F.mse_loss, support.files.save_file = broken, slowly
run_command_line(train.main)
"""


def test_an_error_in_all_processes(launch, tmp_path):
    """torchrun ends the writing process as soon as another one has ended: it saves the last step all the same."""
    (tmp_path / "broken.py").write_text(BROKEN)
    done = launch("run", "--max-train-steps", "4", "--validation-hints", "1", program=tmp_path / "broken.py")
    assert done.returncode != 0 and "error: step 3: loss nan" in done.stderr
    assert "saved step 2: go on with --resume-from-checkpoint latest" in done.stdout
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert [entry["step"] for entry in read_run(tmp_path / "run")] == [1, 2]
