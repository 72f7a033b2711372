"""A run that was stopped goes on as if it had not been, and what it leaves on the disk."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from standin import ROOT, SAMPLE, HostilePickle, read_run, run_main, same_tensors

import support.files
import train
from stable_diffusion import StableDiffusion
from support.checkpoints import load_optimizer_tensors, optimizer_tensors
from support.errors import UserError
from support.files import read_tensors
from weights import load_controlnet

QUICK = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "3", "--validation-steps", "4"]


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, train, *QUICK, "--output-dir", tmp_path / "whole", "--max-train-steps", "5")
    run_main(monkeypatch, train, *QUICK, "--output-dir", tmp_path / "parts", "--max-train-steps", "3")
    resume = ["--output-dir", tmp_path / "parts", "--max-train-steps", "5", "--resume-from-checkpoint", "latest"]
    run_main(monkeypatch, train, *QUICK, *resume)
    whole, parts = (tmp_path / name / "controlnet.safetensors" for name in ("whole", "parts"))
    assert same_tensors(whole, parts)
    assert read_run(tmp_path / "whole") == read_run(tmp_path / "parts")
    assert [entry["step"] for entry in read_run(tmp_path / "whole")] == [1, 2, 3, 4, 5]
    assert "resuming from" in capsys.readouterr().out

    # What a run leaves.
    folder = tmp_path / "whole"
    assert {path.name for path in folder.iterdir()} == {
        "cache", "checkpoints", "config.json", "controlnet.safetensors", "convergence.png", "log.jsonl", "previews",
    }  # fmt: skip
    previews = {path.name for path in (folder / "previews").iterdir()}
    assert previews == {"hint.png", "step-0.png", "step-4.png", "step-5.png"}  # the last one at the end
    assert Image.open(folder / "previews" / "step-0.png").size == (4 * 64, 64)
    assert Image.open(folder / "previews" / "step-4.png").size == (60 + 4 * 64, 4 * 64 + 64)
    assert json.loads((folder / "config.json").read_text())["learning_rate"] == 1e-3
    tensors, metadata = read_tensors(whole)
    assert len(tensors) == 340
    assert (metadata["base"], metadata["steps"], metadata["license"]) == ("tiny", "5", "Apache-2.0")
    assert json.loads(metadata["config"])["train_batch_size"] == 3
    sd = StableDiffusion.load("tiny")
    controlnet = load_controlnet(whole, sd.unet)
    assert controlnet.middle_zero_conv.weight.count_nonzero() > 0

    # A changed option is refused by name, and so is a folder that holds a run.
    changed = ["--learning-rate", "0.1", *resume]
    with pytest.raises(UserError, match="--learning-rate 0.001"):
        run_main(monkeypatch, train, *QUICK, *changed)
    with pytest.raises(UserError, match="holds a run already"):
        run_main(monkeypatch, train, *QUICK, "--output-dir", folder)


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_interrupt_saves_and_goes_on(start, tmp_path, monkeypatch):
    """Ctrl-C reaches the processes that load pictures too, however they were started: they leave it to the main one."""
    program = f"""
import multiprocessing, train
from support.errors import run_command_line
multiprocessing.set_start_method({start!r})
run_command_line(train.main)
"""
    options = [*QUICK, "--num-workers", "1", "--output-dir", tmp_path / "run", "--max-train-steps", "2000"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, options)], cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and log.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    assert read_run(tmp_path / "run"), "training did not start"
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in errors
    assert "--resume-from-checkpoint latest" in output
    steps = len(read_run(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps}" / "state.safetensors").exists()
    assert (tmp_path / "run" / "controlnet.safetensors").exists()

    resume = ["--output-dir", tmp_path / "run", "--resume-from-checkpoint", "latest", "--max-train-steps", steps + 1]
    run_main(monkeypatch, train, *QUICK, *resume)
    assert [entry["step"] for entry in read_run(tmp_path / "run")] == list(range(1, steps + 2))


def test_resuming_from_an_earlier_step_drops_what_came_after(tmp_path, monkeypatch):
    options = [*QUICK, "--output-dir", tmp_path, "--checkpointing-steps", "1", "--validation-steps", "0"]
    run_main(monkeypatch, train, *options, "--max-train-steps", "3", "--checkpoints-total-limit", "3")
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')  # cut short by a crash
    first = tmp_path / "checkpoints" / "step-1"
    run_main(monkeypatch, train, *options, "--max-train-steps", "2", "--resume-from-checkpoint", first)
    assert [entry["step"] for entry in read_run(tmp_path)] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-1", "step-2"]
    (first / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json can.t be read as JSON"):
        run_main(monkeypatch, train, *options, "--resume-from-checkpoint", first)


def test_optimizer_state_keeps_its_memory_format():
    def make():
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return conv, torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)

    def step(conv, optimizer):
        conv(torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    conv, optimizer = make()
    step(conv, optimizer)
    contiguous = torch.contiguous_format  # as a file gives them back
    saved = {name: value.clone(memory_format=contiguous) for name, value in optimizer_tensors(optimizer).items()}
    other, other_optimizer = make()
    other.load_state_dict(conv.state_dict())
    load_optimizer_tensors(other_optimizer, saved)
    step(conv, optimizer)
    step(other, other_optimizer)
    assert torch.equal(conv.weight, other.weight)


def test_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    real = support.files.save_file

    def full(tensors, path, metadata):
        real(tensors, path, metadata)
        if "checkpoints" in str(path) and (tmp_path / "checkpoints" / "step-2").exists():
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(support.files, "save_file", full)
    options = [*QUICK, "--output-dir", tmp_path, "--checkpointing-steps", "2", "--validation-steps", "0"]
    with pytest.raises(UserError, match="No space left on device.*make room"):
        run_main(monkeypatch, train, *options, "--max-train-steps", "4")
    monkeypatch.setattr(support.files, "save_file", real)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-2"]
    run_main(monkeypatch, train, *options, "--max-train-steps", "4", "--resume-from-checkpoint", "latest")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_stopped_before_the_first_checkpoint(tmp_path, monkeypatch, capsys):
    """No dead end: the folder is refused as a new run's, and resuming starts from the beginning."""
    options = [*QUICK, "--output-dir", tmp_path, "--validation-steps", "0", "--max-train-steps", "2"]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("support.run.save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run_main(monkeypatch, train, *options)
    with pytest.raises(UserError, match="holds a run already"):
        run_main(monkeypatch, train, *options)
    run_main(monkeypatch, train, *options, "--resume-from-checkpoint", "latest")
    assert "no checkpoint yet: starting at step 0" in capsys.readouterr().out
    assert [entry["step"] for entry in read_run(tmp_path)] == [1, 2]
    with pytest.raises(UserError, match="beyond --max-train-steps 1"):
        run_main(monkeypatch, train, *options, "--resume-from-checkpoint", "latest", "--max-train-steps", "1")
    (tmp_path / "controlnet.safetensors").unlink()  # stopped between the checkpoint and this file
    run_main(monkeypatch, train, *options, "--resume-from-checkpoint", "latest")
    assert (tmp_path / "controlnet.safetensors").exists()


def test_previews_of_a_run_that_died_are_not_taken_for_its_own(tmp_path, monkeypatch):
    """Killed between the base's samples and the first step, the folder is free: for another resolution, too."""
    options = [*QUICK, "--output-dir", tmp_path, "--max-train-steps", "4"]
    with monkeypatch.context() as context:
        context.setattr(train.Run, "resume", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run_main(monkeypatch, train, *options)
    assert (tmp_path / "previews" / "step-0.png").exists()
    (tmp_path / "previews" / "step-0 copy.png").write_text("somebody's own")
    run_main(monkeypatch, train, *options, "--resolution", "128")
    assert Image.open(tmp_path / "previews" / "step-0.png").size == (4 * 128, 128)
    assert (tmp_path / "previews" / "step-0 copy.png").exists()


def test_malicious_checkpoint_folder(tmp_path, monkeypatch):
    """A pickle under a checkpoint's file name is no safetensors file, and is never unpickled."""
    options = [*QUICK, "--output-dir", tmp_path, "--validation-steps", "0", "--max-train-steps", "1"]
    run_main(monkeypatch, train, *options)
    torch.save(HostilePickle(tmp_path / "trap"), tmp_path / "checkpoints" / "step-1" / "state.safetensors")
    with pytest.raises(UserError, match="state.safetensors is no safetensors file"):
        run_main(monkeypatch, train, *options, "--resume-from-checkpoint", "latest", "--max-train-steps", "2")
    assert not (tmp_path / "trap").exists()


def test_what_may_change_on_resume():
    """Every option says for itself whether it decides the result; these do."""
    assert train_options() == [
        "base", "data", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
        "proportion_empty_prompts", "resolution", "seed", "mixed_precision", "validation_hints", "hint_init",
        "connection", "copy", "only_mid_control", "unlock_decoder",
    ]  # fmt: skip


def train_options() -> list[str]:
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", ["train.py"])
        return train.parse_arguments().deciding
