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

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from standin import ROOT, SAMPLE, HostilePickle, read_run, same_tensors

import support.files
import support.run
import train
from stable_diffusion import StableDiffusion
from support.checkpoints import load_checkpoint, save_checkpoint
from support.errors import UserError
from support.files import read_tensors, save_json, sha256
from weights import load_controlnet

LATEST = ("--resume-from-checkpoint", "latest")


@pytest.fixture
def four(four_steps, tmp_path):
    """A run with checkpoints at steps 2 and 4, to be spoiled; `trained` goes on with it."""
    return shutil.copytree(four_steps, tmp_path / "run")


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(folder) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_resumed_equals_uninterrupted(four_steps, trained, nano, tmp_path, capsys):
    trained("--max-train-steps", "3")
    parts = trained("--max-train-steps", "4", *LATEST)
    assert "resuming from" in capsys.readouterr().out
    assert same_tensors(*(folder / "controlnet.safetensors" for folder in (four_steps, parts)))
    assert read_run(four_steps) == read_run(parts) and [entry["step"] for entry in read_run(parts)] == [1, 2, 3, 4]

    # What a run leaves.
    assert {path.name for path in parts.iterdir()} == {
        "cache", "checkpoints", "config.json", "controlnet.safetensors", "convergence.png", "inputs.json", "lock",
        "log.jsonl",
    }  # fmt: skip
    assert json.loads((parts / "config.json").read_text())["learning_rate"] == 2e-3
    _, metadata = read_tensors(parts / "controlnet.safetensors")
    assert (metadata["base"], metadata["steps"], metadata.get("license")) == (str(nano), "4", None)
    assert json.loads(metadata["config"])["train_batch_size"] == 3
    controlnet = load_controlnet(parts / "controlnet.safetensors", StableDiffusion.load(nano).unet)
    assert controlnet.middle_zero_conv.weight.count_nonzero() > 0

    # A changed option is refused by name, and so is a folder that holds a run, or steps that are done.
    before = contents(parts)
    for options, message in (
        (["--learning-rate", "0.1", *LATEST], "--learning-rate 0.002"),
        (["--only-mid-control", *LATEST], "was made with --only-mid-control False: "),
        ([], "holds a run already"),
        (["--max-train-steps", "3", *LATEST], "beyond --max-train-steps 3"),
        ([LATEST[0], "step-2"], "invalid choice: 'step-2'"),
    ):
        with pytest.raises(UserError, match=message):
            trained(*options)
    assert contents(parts) == before


def start(program, *options, **settings):
    """A training as a process of its own."""
    line = [sys.executable, *program, *map(str, options)]
    return subprocess.Popen(line, cwd=ROOT, start_new_session=True, **settings)


def wait_for_steps(process, folder, steps):
    deadline = time.monotonic() + 600
    while not (folder / "log.jsonl").exists() or len(read_run(folder)) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_interrupt_saves_and_goes_on(method, quick, trained, tmp_path):
    """Ctrl-C reaches the processes that load pictures too, however they were started: they leave it to the main one."""
    program = f"import multiprocessing; multiprocessing.set_start_method({method!r}); import train; "
    program += "from support.command import run_command_line; run_command_line(train.main)"
    options = [*quick, "--num-workers", "1", "--output-dir", tmp_path / "run", "--max-train-steps", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = start(["-c", program], *options, **pipes)
    wait_for_steps(process, tmp_path / "run", 1)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "Traceback" not in errors
    assert "--resume-from-checkpoint latest" in output
    steps = len(read_run(tmp_path / "run"))
    assert checkpoints(tmp_path / "run") == {f"step-{steps}"}
    assert (tmp_path / "run" / "controlnet.safetensors").exists()
    trained(*LATEST, "--max-train-steps", steps + 1)
    assert [entry["step"] for entry in read_run(tmp_path / "run")] == list(range(1, steps + 2))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_the_terminal_goes_away(quick, tmp_path):
    """A closed pipe, a closed terminal, which tells all processes, twice: output is lost, training is not."""
    read, write = os.pipe()
    process = start(
        ["train.py"], *quick, "--num-workers", "1", "--output-dir", tmp_path, "--max-train-steps", "100000",
        stdout=write, stderr=write,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )  # fmt: skip
    os.close(write)
    os.close(read)
    wait_for_steps(process, tmp_path, 3)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGHUP)
    try:
        assert process.wait(timeout=600) == 0
    finally:
        process.kill()
    assert checkpoints(tmp_path) == {f"step-{len(read_run(tmp_path))}"}
    assert (tmp_path / "convergence.png").exists()


def test_going_back_drops_what_came_after(four, four_steps, trained):
    """To the checkpoint before those that were deleted by hand."""
    (four / "snapshots").mkdir()
    for step in (2, 4):
        (four / "snapshots" / f"step-{step}.safetensors").write_bytes(b"")
    with open(four / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')  # cut short by a crash
    shutil.rmtree(four / "checkpoints" / "step-4")
    trained("--max-train-steps", "3", *LATEST)
    assert read_run(four) == read_run(four_steps)[:3]
    assert checkpoints(four) == {"step-2", "step-3"}
    assert [path.name for path in (four / "snapshots").iterdir()] == ["step-2.safetensors"]
    trained("--max-train-steps", "4", *LATEST)
    assert same_tensors(*(folder / "controlnet.safetensors" for folder in (four, four_steps)))


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


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_a_bit(folder / "state.safetensors"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "state.safetensors").unlink(),
        lambda folder: torch.save(HostilePickle(folder / "trap"), folder / "state.safetensors"),
    ],
    ids=["bit", "json", "no state", "pickle"],
)
def test_damaged_checkpoint(damage, four, trained):
    """It is named, nothing in it is unpickled, and what the line says to do works."""
    damage(four / "checkpoints" / "step-4")
    with pytest.raises(UserError, match="step-4/.*: delete its folder, and the same command goes on from the check"):
        trained(*LATEST)
    shutil.rmtree(four / "checkpoints" / "step-4")
    trained("--max-train-steps", "3", *LATEST)
    assert [entry["step"] for entry in read_run(four)] == [1, 2, 3]
    assert checkpoints(four) == {"step-2", "step-3"} and not list(four.rglob("trap"))


@pytest.mark.parametrize("change", ["missing", "misnamed", "misshapen", "more"])
def test_checkpoint_of_another_training(change, four, trained):
    """One whose checksum is right, but whose tensors are not this training's: nothing goes before that is known."""
    state, config = (four / "checkpoints" / "step-4" / name for name in ("state.safetensors", "config.json"))

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
        trained("--max-train-steps", "5", *LATEST)
    assert checkpoints(four) == {"step-2", "step-4"} and len(read_run(four)) == 4


def test_what_a_kill_leaves_goes(four, trained):
    """Half-written files and half-removed checkpoints."""
    (four / "checkpoints" / ".partial-x").mkdir()
    trained("--max-train-steps", "5", *LATEST)
    assert checkpoints(four) == {"step-4", "step-5"} and not list(four.rglob(".*"))


def test_a_log_that_was_cut_short(four):
    entries, log = read_run(four), four / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'\xff\0\n{"step": 5, "l')
    assert read_run(four) == entries


@pytest.mark.parametrize("what", ["nothing", "hint", "target", "prompt", "fewer", "base", "vae"])
def test_inputs_are_told_by_their_contents(what, nano, trained, four_steps, tmp_path, monkeypatch):
    """The same ones under another name are the same training; others, whatever they are called, are refused by name."""
    (tmp_path / "as-it-was").mkdir()
    monkeypatch.chdir(tmp_path / "as-it-was")
    shutil.copytree(SAMPLE, "pairs")
    shutil.copytree(nano.parent, "base")
    folder = trained("--data", "pairs", "--base", f"base/{nano.name}", "--max-train-steps", "2")
    encoded = (folder / "cache" / "moments").read_bytes()
    (tmp_path / "as-it-was").rename(tmp_path / "moved")
    data, base = tmp_path / "moved" / "pairs", tmp_path / "moved" / "base" / nano.name
    monkeypatch.chdir(tmp_path)
    changed, listing = f"{data / 'prompt.json'} line 2", data / "prompt.json"
    if what == "prompt":
        listing.write_text(listing.read_text().replace("coral circle", "red circle"))
        changed = f"{listing} line 1"
    elif what == "fewer":
        listing.write_text("\n".join(listing.read_text().splitlines()[:3]))
        changed = "the number of pairs|prompt.json line 1"
    elif what == "base":
        rewrite(base, lambda tensors: tensors["model.diffusion_model.out.2.bias"].add_(0.125))
        changed = "the base's UNet"
    elif what == "vae":
        rewrite(base, lambda tensors: tensors["first_stage_model.quant_conv.bias"].add_(0.125))
        changed = "the base's VAE"
    elif what != "nothing":
        part = data / {"hint": "source", "target": "target"}[what]
        shutil.copy(part / "0.png", part / "1.png")
    options = ["--data", f"{data}/", "--base", base, "--max-train-steps", "4", *LATEST]
    if what in ("nothing", "vae"):  # where the VAE comes from does not matter either
        shutil.copy(base if what == "vae" else nano, "vae.safetensors")
        options += ["--base", nano, "--vae", "vae.safetensors"]
    if what == "nothing":
        trained(*options)
        assert json.loads((folder / "config.json").read_text())["base"] == str(nano)
        assert read_run(folder) == read_run(four_steps)
    else:
        with pytest.raises(UserError, match=f"({changed}) is not what .* was trained with: restore it"):
            trained(*options)
        assert checkpoints(folder) == {"step-2"}
    assert (folder / "cache" / "moments").read_bytes() == encoded


@pytest.mark.parametrize(
    "module, name, call, saved",
    [
        ("support.batches", "EncodedPairs.__getitem__", 3, 2),  # the third batch
        ("support.batches", "EncodedPairs.keep", 4, 1),  # while a target of the second batch is encoded
        ("torch.optim.adam", "adam", 3, None),  # between two steps there is nothing whole to save
        ("support.run", "append_entry", 3, 3),  # it has no line yet
        ("train", "export", 2, 4),
    ],
)
def test_an_error_loses_no_step(module, name, call, saved, four_steps, trained, tmp_path, monkeypatch, capsys):
    """Whatever ends a run in its middle, what is done is saved, and goes on as if nothing had been."""
    *classes, name = name.split(".")
    place = attrgetter(*classes)(import_module(module)) if classes else import_module(module)
    real, calls = getattr(place, name), count(1)

    def fails_once(*arguments, **settings):
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        return real(*arguments, **settings)

    monkeypatch.setattr(place, name, fails_once)
    options = ["--checkpointing-steps", "2", "--num-workers", "0", "--max-train-steps", "4"]  # to count the calls
    with pytest.raises((OSError, UserError), match="No space left on device"):
        trained(*options)
    folder = tmp_path / "run"
    assert (folder / "checkpoints" / f"step-{saved}").exists() or saved is None
    assert (f"saved step {saved}: go on with --resume" in capsys.readouterr().out) == (saved in (1, 3, 4))
    trained(*options, *LATEST)
    assert read_run(folder) == read_run(four_steps)
    states = (run / "checkpoints" / "step-4" / "state.safetensors" for run in (folder, four_steps))
    assert same_tensors(*states)


def test_weights_that_are_not_finite_are_not_saved(trained, tmp_path):
    with pytest.raises(UserError, match="was not written: .* is not finite"):
        trained("--max-train-steps", "1", "--learning-rate", "1e39")
    assert not list(tmp_path.rglob("step-*")) and not (tmp_path / "run" / "controlnet.safetensors").exists()


def test_files_are_written_under_new_names(tmp_path):
    """A link planted under a temporary name that could be guessed is not written through."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".partial-a.json", "a.json.partial", "a.json"):
        (tmp_path / name).symlink_to(victim)
    save_json({}, tmp_path / "a.json")
    assert victim.read_text() == "precious"
    assert json.loads((tmp_path / "a.json").read_text()) == {} and not (tmp_path / "a.json").is_symlink()


def test_optimizer_state_keeps_its_memory_format(tmp_path):
    """A file gives tensors back contiguous; the fused step needs them as the weights are."""

    def make():
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)
        return conv, optimizer, {"conv": conv}, torch.amp.GradScaler("cpu", enabled=False)

    def step(conv, optimizer):
        conv(torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    (conv, optimizer, trained, scaler), (other, other_optimizer, *into) = make(), make()
    step(conv, optimizer)
    save_checkpoint(tmp_path, 1, trained, optimizer, scaler, {}, limit=1)
    load_checkpoint(tmp_path / "step-1", into[0], other_optimizer, into[1])
    step(conv, optimizer)
    step(other, other_optimizer)
    assert torch.equal(conv.weight, other.weight)


def test_full_disk_leaves_the_last_checkpoint(trained, tmp_path, monkeypatch):
    real = support.files.save_file

    def full(tensors, path, metadata):
        real(tensors, path, metadata)
        if "checkpoints" in str(path) and (tmp_path / "run" / "checkpoints" / "step-2").exists():
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(support.files, "save_file", full)
    options = ["--checkpointing-steps", "2", "--max-train-steps", "4"]
    with pytest.raises(UserError, match="No space left on device.*make room"):
        trained(*options)
    monkeypatch.setattr(support.files, "save_file", real)
    assert checkpoints(tmp_path / "run") == {"step-2"}
    assert checkpoints(trained(*options, *LATEST)) == {"step-2", "step-4"}


def test_stopped_before_the_first_checkpoint(trained, tmp_path, monkeypatch, capsys):
    """No dead end: the folder is refused as a new run's, and resuming starts from the beginning."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("support.checkpoints.save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            trained("--max-train-steps", "2")
    with pytest.raises(UserError, match="holds a run already"):
        trained("--max-train-steps", "2")
    trained("--max-train-steps", "2", *LATEST)
    assert "resuming from step 0: there is no checkpoint yet" in capsys.readouterr().out
    assert [entry["step"] for entry in read_run(tmp_path / "run")] == [1, 2]


def test_previews_of_a_run_that_died_are_not_taken_for_its_own(trained, tmp_path, monkeypatch):
    """Killed between the base's samples and the first step, the folder is free: for another resolution, too."""
    options = ["--max-train-steps", "1", "--validation-steps", "1", "--validation-hints", "1"]
    with monkeypatch.context() as context:
        context.setattr(train.Run, "resume", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            trained(*options)
    previews = tmp_path / "run" / "previews"
    assert (previews / "step-0.png").exists()
    (previews / "step-0 copy.png").write_text("somebody's own")
    trained(*options, "--resolution", "128")
    assert Image.open(previews / "step-0.png").size == (128, 128)
    assert (previews / "step-0 copy.png").exists()


def test_the_log_is_on_the_disk_before_its_checkpoint(trained, monkeypatch):
    order, flush, save = [], support.run.flush, save_checkpoint
    monkeypatch.setattr("support.run.flush", lambda path: order.append(path.name) or flush(path))
    monkeypatch.setattr("support.checkpoints.save_checkpoint", lambda *what: order.append("checkpoint") or save(*what))
    trained("--max-train-steps", "1")
    assert order == ["log.jsonl", "checkpoint"]


def test_what_may_change_on_resume(monkeypatch):
    """Every option says for itself whether it decides the result; these do."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train.parse_arguments().deciding == [
        "base", "vae", "data", "controlnet", "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
        "learning_rate",
        "cooldown", "proportion_empty_prompts", "resolution", "seed", "mixed_precision", "validation_hints",
        "hint_init", "connection", "copy", "only_mid_control", "unlock_decoder",
    ]  # fmt: skip
