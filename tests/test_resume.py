"""A run that was stopped goes on as if it had not been, and what it leaves on the disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from itertools import count
from operator import attrgetter

from support.errors import UserError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from standin import ROOT, SAMPLE, HostilePickle, read_run, run_main, same_tensors

import support.files
import train
from stable_diffusion import TINY_FILE, StableDiffusion
from support.checkpoints import load_optimizer_tensors, optimizer_tensors
from support.files import read_tensors, save_json, sha256
from weights import load_controlnet

QUICK = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "3", "--validation-steps", "4"]
QUICK += ["--cooldown", "0"]  # with a fall at the end, more steps are another training


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
        "cache", "checkpoints", "config.json", "controlnet.safetensors", "convergence.png", "inputs.json", "log.jsonl",
        "previews", "snapshots",
    }  # fmt: skip
    previews = {path.name for path in (folder / "previews").iterdir()}
    assert previews == {"hint.png", "step-0.png", "step-4.png", "step-5.png"}  # the last one at the end
    assert Image.open(folder / "previews" / "step-0.png").size == (4 * 64, 64)
    assert Image.open(folder / "previews" / "step-4.png").size == (60 + 4 * 64, 4 * 64 + 64)
    assert json.loads((folder / "config.json").read_text())["learning_rate"] == 2e-3
    tensors, metadata = read_tensors(whole)
    assert len(tensors) == 340
    assert (metadata["base"], metadata["steps"], metadata["license"]) == ("tiny", "5", "Apache-2.0")
    assert json.loads(metadata["config"])["train_batch_size"] == 3
    sd = StableDiffusion.load("tiny")
    controlnet = load_controlnet(whole, sd.unet)
    assert controlnet.middle_zero_conv.weight.count_nonzero() > 0

    # A changed option is refused by name, and so is a folder that holds a run.
    changed = ["--learning-rate", "0.1", *resume]
    with pytest.raises(UserError, match="--learning-rate 0.002"):
        run_main(monkeypatch, train, *QUICK, *changed)
    with pytest.raises(UserError, match="was made with no --only-mid-control: "):
        run_main(monkeypatch, train, *QUICK, "--only-mid-control", *resume)
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
    with pytest.raises(UserError, match="step-1 is damaged or renamed: resume from .*step-2"):
        run_main(monkeypatch, train, *options, "--resume-from-checkpoint", first)


def rewrite(path, change):
    """Change a safetensors file's tensors in place."""
    tensors, metadata = read_tensors(path)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors)
    save_file(tensors, path, metadata)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """The folder of a run with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "four"
    options = [*QUICK, "--output-dir", folder, "--validation-steps", "0", "--checkpointing-steps", "2"]
    with pytest.MonkeyPatch.context() as context:
        run_main(context, train, *options, "--max-train-steps", "4")
    return folder


@pytest.fixture
def four(four_steps, tmp_path):
    """A copy of it, to be spoiled, and the options that go on with it."""
    folder = tmp_path / "four"
    shutil.copytree(four_steps, folder)
    return folder, [*QUICK, "--output-dir", folder, "--validation-steps", "0", "--max-train-steps", "5"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_a_bit(folder / "state.safetensors"),
        lambda folder: rewrite(folder / "state.safetensors", lambda tensors: tensors.pop("optimizer.0.exp_avg")),
        lambda folder: (folder / "config.json").write_text((folder / "config.json").read_text().replace("4", "3", 1)),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "state.safetensors").unlink(),
        lambda folder: torch.save(HostilePickle(folder / "trap"), folder / "state.safetensors"),
    ],
    ids=["bit", "optimizer", "step", "json", "no config", "no state", "pickle"],
)
def test_damaged_checkpoint(damage, four, monkeypatch, capsys):
    """It is named, nothing in it is unpickled, and the newest one that is whole is offered, and works."""
    folder, options = four
    damage(folder / "checkpoints" / "step-4")
    with pytest.raises(UserError, match="step-4 is damaged or renamed: resume from .*step-2") as raised:
        run_main(monkeypatch, train, *options, "--resume-from-checkpoint", "latest")
    run_main(monkeypatch, train, *options, "--resume-from-checkpoint", str(raised.value).split()[-1])
    assert "the checkpoints of steps 4 go when the next one is written" in capsys.readouterr().out
    assert [entry["step"] for entry in read_run(folder)] == [1, 2, 3, 4, 5]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-2", "step-5"}
    assert not list(folder.rglob("trap"))


@pytest.mark.parametrize("change", ["missing", "misnamed", "misshapen", "more"])
def test_checkpoint_of_another_training(change, four, monkeypatch):
    """One whose checksum is right, but whose tensors are not this training's."""
    folder, options = four
    state, config = (folder / "checkpoints" / "step-4" / name for name in ("state.safetensors", "config.json"))

    def spoil(tensors):
        value = tensors["optimizer.3.exp_avg_sq"]
        if change in ("missing", "misnamed"):
            del tensors["optimizer.3.exp_avg_sq"]
        if change in ("misnamed", "more"):
            tensors["optimizer.3.exp_avg_square"] = value.clone()
        if change == "misshapen":
            tensors["optimizer.3.exp_avg_sq"] = value.flatten()[:1].clone()

    rewrite(state, spoil)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sha256": sha256(state)}))
    with pytest.raises(UserError, match="state.safetensors is damaged or no checkpoint of this training"):
        run_main(monkeypatch, train, *options, "--resume-from-checkpoint", "latest")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-2", "step-4"}


def test_a_run_without_its_record_of_inputs(four, monkeypatch):
    """They are taken for the same. What a kill left of a file goes."""
    folder, options = four
    (folder / "inputs.json").unlink()
    (folder / "checkpoints" / ".partial-x").mkdir()
    run_main(monkeypatch, train, *options, "--resume-from-checkpoint", "latest")
    assert [entry["step"] for entry in read_run(folder)] == [1, 2, 3, 4, 5]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-4", "step-5"}
    assert (folder / "inputs.json").exists()


def test_checkpoint_of_another_run(four, four_steps, monkeypatch):
    folder, options = four
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = four_steps / "checkpoints" / "step-2"
    with pytest.raises(UserError, match=f"step-2 is another run's, .*pass --output-dir {four_steps}"):
        run_main(monkeypatch, train, *options, "--resume-from-checkpoint", other)
    with pytest.raises(UserError, match="nowhere is no checkpoint: pass latest, or a folder of .*state.safetensors"):
        run_main(monkeypatch, train, *options, "--resume-from-checkpoint", "nowhere")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_number_of_threads_is_told(four, monkeypatch, capsys):
    folder, options = four
    record = folder / "inputs.json"
    record.write_text(record.read_text().replace(" threads)", "0 threads)"))
    run_main(monkeypatch, train, *options, "--resume-from-checkpoint", "latest")
    assert "0 threads); on cpu" in capsys.readouterr().out


def test_a_log_that_is_not_all_a_log(four, monkeypatch, capsys):
    folder, options = four
    entries, log = read_run(folder), folder / "log.jsonl"
    log.write_bytes(b'[1]\n"step"\n{"step": "one"}\n{"loss": 1}\n\xff\xfe\n' + log.read_bytes() + b'{"step": 5, "l')
    assert read_run(folder) == entries
    assert "log.jsonl: 6 of 10 lines are no entries and left out" in capsys.readouterr().out
    run_main(monkeypatch, train, *options, "--resume-from-checkpoint", "latest")
    assert [entry["step"] for entry in read_run(folder)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("what", ["hint", "target", "prompt", "base"])
def test_other_inputs_are_refused(what, tmp_path, monkeypatch):
    """Something else under the same name."""
    data, base = tmp_path / "data", tmp_path / "base" / TINY_FILE.name
    shutil.copytree(SAMPLE, data)
    shutil.copytree(TINY_FILE.parent, base.parent)
    options = ["--data", data, *QUICK[2:], "--base", base, "--output-dir", tmp_path / "run", "--validation-steps", "0"]
    run_main(monkeypatch, train, *options, "--max-train-steps", "1")
    cached, changed = (tmp_path / "run" / "cache" / "moments.npy").read_bytes(), f"{data / 'prompt.json'} line 2"
    if what == "prompt":
        listing, changed = data / "prompt.json", f"{data / 'prompt.json'} line 1"
        listing.write_text(listing.read_text().replace("coral circle", "red circle"))
    elif what == "base":
        changed = "the base's UNet"
        rewrite(base, lambda tensors: tensors["model.diffusion_model.out.2.bias"].add_(0.125))
    else:
        folder = {"hint": "source", "target": "target"}[what]
        shutil.copy(data / folder / "0.png", data / folder / "1.png")
    with pytest.raises(UserError, match=f"{changed} is not what .* was trained with: restore it"):
        run_main(monkeypatch, train, *options, "--max-train-steps", "2", "--resume-from-checkpoint", "latest")
    assert (tmp_path / "run" / "cache" / "moments.npy").read_bytes() == cached


@pytest.mark.parametrize(
    "where, call, saved",
    [
        ("support.cache.CachedPairs.__getitem__", 7, 2),  # the third batch's first pair
        ("torch.optim.AdamW.step", 3, None),  # between two steps there is nothing whole to save
        ("support.log.Log.write", 3, 3),
        ("train.export", 2, 4),  # after the snapshot of step 0
    ],
)
def test_an_error_loses_no_step(where, call, saved, four_steps, tmp_path, monkeypatch, capsys):
    """Whatever ends a run in its middle, what is done is saved, and goes on as if nothing had been."""
    options = [*QUICK, "--output-dir", tmp_path, "--validation-steps", "0", "--checkpointing-steps", "4"]
    options += ["--num-workers", "0"]  # to count the calls
    real, calls = attrgetter(where.partition(".")[2])(import_module(where.partition(".")[0])), count(1)

    def fails_once(*arguments, **settings):
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        return real(*arguments, **settings)

    monkeypatch.setattr(where, fails_once)
    with pytest.raises(OSError, match="No space left on device"):
        run_main(monkeypatch, train, *options, "--max-train-steps", "4")
    there = {path.name for path in (tmp_path / "checkpoints").glob("*")}
    assert there == ({f"step-{saved}"} if saved else set())
    assert (f"saved step {saved}: go on with --resume" in capsys.readouterr().out) == (saved in (2, 3))
    run_main(monkeypatch, train, *options, "--max-train-steps", "4", "--resume-from-checkpoint", "latest")
    assert read_run(tmp_path) == read_run(four_steps)
    states = (folder / "checkpoints" / "step-4" / "state.safetensors" for folder in (tmp_path, four_steps))
    assert same_tensors(*states)


def test_a_log_on_a_full_disk(four_steps, tmp_path, monkeypatch):
    """The line that could not be written, or not to its end, is written again with the checkpoint."""
    options = [*QUICK, "--output-dir", tmp_path, "--validation-steps", "0"]
    write = train.Run.log

    def on_a_full_disk(run, entry):
        if entry["step"] == 3:
            with open(tmp_path / "log.jsonl", "a") as log:
                log.write('{"step": 3, "lo')
            run.log_book.file = open("/dev/full", "a")  # noqa: SIM115
        write(run, entry)

    monkeypatch.setattr(train.Run, "log", on_a_full_disk)
    with pytest.raises(UserError, match="can't write .*No space left on device"):
        run_main(monkeypatch, train, *options, "--max-train-steps", "4")
    assert read_run(tmp_path) == read_run(four_steps)[:3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_the_terminal_goes_away(tmp_path, monkeypatch):
    """A closed pipe, a closed terminal, which tells all processes, twice: output is lost, training is not."""
    options = [*QUICK, "--output-dir", tmp_path, "--validation-steps", "0", "--max-train-steps", "2000"]
    read, write = os.pipe()
    line = [sys.executable, "train.py", *map(str, options), "--num-workers", "1"]
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=write, stderr=write, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )  # fmt: skip
    os.close(write)
    os.close(read)
    deadline = time.monotonic() + 120
    while not (tmp_path / "log.jsonl").exists() or len(read_run(tmp_path)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGHUP)
    try:
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
    steps = len(read_run(tmp_path))
    assert (tmp_path / "checkpoints" / f"step-{steps}" / "state.safetensors").exists()
    assert (tmp_path / "convergence.png").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    options = [*QUICK, "--output-dir", tmp_path, "--validation-steps", "0", "--max-train-steps", "1"]
    with pytest.raises(UserError, match="step-1/state.safetensors was not written: .* is not finite"):
        run_main(monkeypatch, train, *options, "--learning-rate", "1e39")
    assert not list((tmp_path / "checkpoints").iterdir()) and not (tmp_path / "controlnet.safetensors").exists()


def test_files_are_written_under_new_names(tmp_path):
    """A link planted under a temporary name that could be guessed is not written through."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".partial-a.json", "a.json.partial", "a.json"):
        (tmp_path / name).symlink_to(victim)
    save_json({}, tmp_path / "a.json")
    assert victim.read_text() == "precious"
    assert json.loads((tmp_path / "a.json").read_text()) == {} and not (tmp_path / "a.json").is_symlink()


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


def test_what_may_change_on_resume():
    """Every option says for itself whether it decides the result; these do."""
    assert train_options() == [
        "base", "data", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
        "cooldown", "proportion_empty_prompts", "resolution", "seed", "mixed_precision", "validation_hints",
        "hint_init", "connection", "copy", "only_mid_control", "unlock_decoder",
    ]  # fmt: skip


def train_options() -> list[str]:
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", ["train.py"])
        return train.parse_arguments().deciding
