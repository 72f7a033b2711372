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
from safetensors.torch import save_file
from standin import LATEST, ROOT, SAMPLE, HostilePickle, read_run, refusal, same_tensors

import train
from stable_diffusion import StableDiffusion
from support.errors import UserError
from support.files import read_tensors, save_json, save_tensors, sha256
from weights import load_controlnet


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
        assert message in refusal(trained, *options)
    assert contents(parts) == before


def start(program, *options, **settings):
    """A training as a process of its own, as a terminal would start it: the tests may run under nohup."""

    def as_in_a_terminal():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    line = [sys.executable, "-c", program, *map(str, options), "--num-workers", "1", "--max-train-steps", "100000"]
    return subprocess.Popen(line, cwd=ROOT, start_new_session=True, preexec_fn=as_in_a_terminal, **settings)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("method, signals", [("fork", ["SIGINT"]), ("spawn", ["SIGXCPU", "SIGHUP", "SIGHUP"])])
def test_a_signal_saves_and_goes_on(method, signals, quick, trained, tmp_path):
    """Ctrl-C, or its time is up and the terminal closes, which is told twice, and takes the output's reader with it.

    They reach the processes that load pictures too, however these were started, who leave it to the main one.
    """
    program = f"import multiprocessing; multiprocessing.set_start_method({method!r}); import train; "
    program += "from support.command import run_command_line; run_command_line(train.main)"
    folder, output = tmp_path / "run", {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = start(program, *quick, "--output-dir", folder, **output)
    while not (folder / "log.jsonl").exists() or not read_run(folder):
        assert process.poll() is None
        time.sleep(0.05)
    if method == "spawn":
        process.stdout.close()
    for name in signals:
        send = os.kill if name == "SIGXCPU" else os.killpg  # a process's time is its own
        send(process.pid, getattr(signal, name))
    told = process.communicate(timeout=600)[0] if method == "fork" else process.wait(600)
    assert process.returncode == 0 and (not told or ("Traceback" not in told and "checkpoint latest" in told))
    steps = len(read_run(folder))
    assert checkpoints(folder) == {f"step-{steps}"} and (folder / "controlnet.safetensors").exists()
    if method == "fork":
        assert len(read_run(trained(*LATEST, "--max-train-steps", steps + 1))) == steps + 1


def test_what_came_after_the_checkpoint_goes(four, four_steps, trained):
    """And what a kill left half written."""
    (four / "checkpoints" / "step-4").rename(four / "checkpoints" / ".partial-x")
    (four / "snapshots").mkdir()
    for step in (2, 4):
        (four / "snapshots" / f"step-{step}.safetensors").write_bytes(b"")
    with open(four / "log.jsonl", "ab") as log:
        log.write(b'\xff\0\n{"step": 5, "lo')  # cut short by a crash
    assert read_run(four) == read_run(four_steps)
    trained("--max-train-steps", "3", *LATEST)
    assert read_run(four) == read_run(four_steps)[:3]
    assert checkpoints(four) == {"step-2", "step-3"} and not list(four.rglob(".*"))
    assert [path.name for path in (four / "snapshots").iterdir()] == ["step-2.safetensors"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = [
    lambda folder: flip_a_bit(folder / "state.safetensors"),
    lambda folder: (folder / "config.json").write_text("{"),
    lambda folder: (folder / "state.safetensors").unlink(),
    lambda folder: torch.save(HostilePickle(folder / "trap"), folder / "state.safetensors"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=["bit", "json", "no state", "pickle"])
def test_damaged_checkpoint(damage, four, trained):
    """It is named, and nothing in it is unpickled."""
    damage(four / "checkpoints" / "step-4")
    with pytest.raises(UserError, match="step-4/.*: delete its folder, and the same command goes on from the check"):
        trained(*LATEST)
    assert not list(four.rglob("trap"))


def test_checkpoint_of_another_training(four, trained):
    """One whose checksum is right, but whose tensors are not this training's: nothing goes before that is known."""
    state, config = (four / "checkpoints" / "step-4" / name for name in ("state.safetensors", "config.json"))
    (good, metadata), name = read_tensors(state), "optimizer.3.exp_avg_sq"
    for changed in ({"optimizer.3.another": good[name]}, {name: good[name].flatten()[:1]}):
        state.unlink()  # which `good` is mapped from
        save_file({key: value for key, value in good.items() if key != name} | changed, state, metadata)
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sha256": sha256(state)}))
        told = refusal(trained, "--max-train-steps", "5", *LATEST)
        assert "state.safetensors is damaged or no checkpoint of this training" in told
    assert checkpoints(four) == {"step-2", "step-4"} and len(read_run(four)) == 4


def again(folder):
    """Its first picture in the place of the second."""
    shutil.copy(folder / "0.png", folder / "1.png")


def listed(data, change):
    (data / "prompt.json").write_text(change((data / "prompt.json").read_text()))


def shifted(base, name):
    tensors, metadata = read_tensors(base)
    save_tensors(tensors | {name: tensors[name] + 0.125}, base, metadata)


OTHERS = {  # what is done to the pairs or the base, and what the refusal names
    "hint": (lambda data, base: again(data / "source"), "line 2"),
    "target": (lambda data, base: again(data / "target"), "line 2"),
    "prompt": (lambda data, base: listed(data, lambda text: text.replace("coral circle", "red circle")), "line 1"),
    "fewer": (lambda data, base: listed(data, lambda text: text[: text.rindex("{")]), "the number of pairs|line 1"),
    "UNet": (lambda data, base: shifted(base, "model.diffusion_model.out.2.bias"), "the base's UNet"),
    "VAE": (lambda data, base: shifted(base, "first_stage_model.quant_conv.bias"), "the base's VAE"),
}


@pytest.mark.parametrize("what", ["nothing", *OTHERS])
def test_inputs_are_told_by_their_contents(what, nano, four, trained, four_steps, tmp_path, capsys):
    """The same ones under another name are the same training; others, whatever they are called, are refused by name."""
    shutil.rmtree(four / "checkpoints" / "step-4")
    data, base = shutil.copytree(SAMPLE, tmp_path / "pairs"), shutil.copytree(nano.parent, tmp_path / "b") / nano.name
    encoded = (four / "cache" / "moments").read_bytes()
    options = ["--data", data, "--base", base, "--vae", base, "--max-train-steps", "4", *LATEST]
    if what == "nothing":
        trained(*options)
        assert f"--data was {SAMPLE}, is {data}: what counts is that it holds the same" in capsys.readouterr().out
        assert json.loads((four / "config.json").read_text())["base"] == str(base)
        assert read_run(four) == read_run(four_steps)
    else:
        change, told = OTHERS[what]
        change(data, base)
        with pytest.raises(UserError, match=f"({told}) is not what .* was trained with: restore it"):
            trained(*options)
        assert checkpoints(four) == {"step-2"}
    assert (four / "cache" / "moments").read_bytes() == encoded


@pytest.mark.parametrize(
    "module, name, call, saved, said",
    [
        ("support.batches", "EncodedPairs.__getitem__", 3, 2, False),  # the third batch
        ("support.batches", "EncodedPairs.keep", 4, 1, True),  # while a target of the second batch is encoded
        ("torch.optim.adam", "adam", 3, None, False),  # between two steps there is nothing whole to save
        ("support.files", "save_file", 4, 2, False),  # the second checkpoint itself
        ("train", "export", 2, 4, True),
    ],
)
def test_an_error_loses_no_step(module, name, call, saved, said, four_steps, trained, tmp_path, monkeypatch, capsys):
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
    assert (f"saved step {saved}: go on with --resume" in capsys.readouterr().out) == said
    trained(*options, *LATEST)
    assert read_run(folder) == read_run(four_steps)
    states = (run / "checkpoints" / "step-4" / "state.safetensors" for run in (folder, four_steps))
    assert same_tensors(*states)


def test_weights_that_are_not_finite_are_not_saved(trained, tmp_path):
    told = refusal(trained, "--max-train-steps", "1", "--learning-rate", "1e39")
    assert "was not written: " in told and " is not finite" in told
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


def test_stopped_before_the_first_checkpoint(trained, tmp_path, monkeypatch, capsys):
    """No dead end: the folder is refused as a new run's, and resuming starts from the beginning, with no preview."""
    with monkeypatch.context() as context:
        context.setattr("support.checkpoints.save_checkpoint", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            trained("--max-train-steps", "2")
    (tmp_path / "run" / "previews").mkdir()
    for name in ("step-0.png", "step-0 copy.png"):
        (tmp_path / "run" / "previews" / name).write_text("of another resolution, maybe")
    assert "holds a run already" in refusal(trained, "--max-train-steps", "2")
    trained("--max-train-steps", "2", *LATEST)
    assert "resuming from step 0: there is no checkpoint yet" in capsys.readouterr().out
    assert [entry["step"] for entry in read_run(tmp_path / "run")] == [1, 2]


def test_what_may_change_on_resume(monkeypatch):
    """Every option says for itself whether it decides the result; these do."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train.parse_arguments().deciding == [
        "base", "vae", "data", "controlnet", "max_train_steps", "train_batch_size", "gradient_accumulation_steps",
        "learning_rate", "cooldown", "proportion_empty_prompts", "resolution", "seed", "mixed_precision",
        "validation_hints", "hint_init", "connection", "copy", "only_mid_control", "unlock_decoder",
    ]  # fmt: skip
