"""The real command line on the miniature: the files it leaves, and that a resumed run equals an uninterrupted one."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from standin import ROOT

import checkpoints
import files
import train
from checkpoints import load_optimizer_tensors, optimizer_tensors
from controlnet import ControlNet
from data import DrawnImages, generator_for
from files import UserError, read_tensors
from sample import load_decoders
from stable_diffusion import StableDiffusion
from train import Denoiser, index_batches
from validation import Response
from weights import load_controlnet, official_state_dict

SAMPLE = ROOT / "tests" / "fill50k"
QUICK = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "3", "--validation-steps", "4"]


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_log(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, capsys):
    run(monkeypatch, *QUICK, "--output-dir", tmp_path / "whole", "--max-train-steps", "5")
    run(monkeypatch, *QUICK, "--output-dir", tmp_path / "parts", "--max-train-steps", "3")
    resume = ["--output-dir", tmp_path / "parts", "--max-train-steps", "5", "--resume-from-checkpoint", "latest"]
    run(monkeypatch, *QUICK, *resume)
    whole, parts = (read_tensors(tmp_path / name / "controlnet.safetensors")[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and len(whole) == 340
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    written = [(tmp_path / name / "controlnet.safetensors").read_bytes() for name in ("whole", "parts")]
    assert written[0] == written[1]  # the metadata's order too
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "parts")
    assert [entry["step"] for entry in read_log(tmp_path / "whole")] == [1, 2, 3, 4, 5]
    assert "resuming from" in capsys.readouterr().out

    # What a run leaves.
    folder = tmp_path / "whole"
    assert {path.name for path in folder.iterdir()} == {
        "cache", "checkpoints", "config.json", "controlnet.safetensors", "convergence.png", "log.jsonl", "previews",
    }  # fmt: skip
    assert {path.name for path in (folder / "previews").iterdir()} == {
        "hint.png",
        "step-4.png",
        "step-5.png",
    }  # and at the end
    assert Image.open(folder / "previews" / "step-4.png").size == (60 + 4 * 64, 4 * 64 + 64)
    assert json.loads((folder / "config.json").read_text())["learning_rate"] == 1e-3
    metadata = read_tensors(folder / "controlnet.safetensors")[1]
    assert (metadata["base"], metadata["steps"], metadata["license"]) == ("tiny", "5", "Apache-2.0")
    assert json.loads(metadata["config"])["train_batch_size"] == 3
    sd = StableDiffusion.load("tiny")
    controlnet = load_controlnet(folder / "controlnet.safetensors", sd.unet)
    assert controlnet.middle_zero_conv.weight.count_nonzero() > 0

    # A changed option is refused by name, and so is a folder that holds a run.
    changed = ["--learning-rate", "0.1", *resume]
    with pytest.raises(UserError, match="--learning-rate 0.001"):
        run(monkeypatch, *QUICK, *changed)
    with pytest.raises(UserError, match="holds a run already"):
        run(monkeypatch, *QUICK, "--output-dir", folder)


def test_what_is_measured(tmp_path, monkeypatch, capsys):
    """Sensitivity and gap every 10 steps, IoU and colour error of more hints than a preview shows, two sentences."""
    options = ["--resolution", "64", "--train-batch-size", "4", "--validation-steps", "20", "--validation-hints", "9"]
    monkeypatch.setattr(train, "DRAWN_PAIRS", 8)
    monkeypatch.setattr(checkpoints, "growth_step", lambda history: 10 if len(history) >= 10 else None)
    monkeypatch.setattr(checkpoints, "jump_step", lambda history: 20 if len(history) >= 20 else None)
    run(monkeypatch, *options, "--output-dir", tmp_path, "--max-train-steps", "20")
    log = {entry["step"]: entry for entry in read_log(tmp_path)}
    assert [step for step in log if "hint_sensitivity" in log[step]] == [10, 20]
    assert log[20]["hint_sensitivity"] > log[10]["hint_sensitivity"] > 0
    assert log[10].keys() == {"step", "loss", "lr", "hint_sensitivity", "hint_gap", "heldout_loss"}
    assert 0 < log[20]["heldout_loss"] < 0.2
    assert {"iou", "colour_error", "base_iou", "base_colour_error"} <= log[20].keys()
    assert Image.open(tmp_path / "previews" / "step-20.png").size == (60 + 8 * 64, 4 * 64 + 64)
    assert Image.open(tmp_path / "convergence.png").height > 500
    output = capsys.readouterr().out
    assert "step 10: the hint begins to count" in output
    assert "step 20: the jump has come" in output
    assert f"IoU {log[20]['iou']:.2f}" in output


def test_the_response_is_zero_before_the_first_step():
    """Equation (3) again: another pair's hint changes nothing yet, and the held-out pairs are the same each time."""
    sd, pairs = StableDiffusion.load("tiny").requires_grad_(False), DrawnImages(3, 64)
    response, again = Response(sd, pairs, 0), Response(sd, pairs, 0)
    for name in ("z", "eps", "hints", "other", "context"):
        assert torch.equal(getattr(response, name), getattr(again, name))
    assert torch.equal(response.hints[3], pairs.hint(0)) and torch.equal(response.other[3], pairs.hint(1))
    controlnet = ControlNet.from_unet(sd.unet, sd.preset.hint_channels).requires_grad_(False)
    values = response.measure(Denoiser(sd.unet, controlnet, bf16=False))
    assert values["hint_sensitivity"] == values["hint_gap"] == 0
    assert 0 < values["heldout_loss"] < 0.2


def test_one_graph():
    """Nothing in UNet and ControlNet makes torch.compile start a second graph (--compile)."""
    sd, pairs = StableDiffusion.load("tiny").requires_grad_(False), DrawnImages(2, 64)
    controlnet = ControlNet.from_unet(sd.unet, sd.preset.hint_channels)
    z, hint = torch.randn(2, 4, 8, 8), torch.stack([pairs.hint(i) for i in range(2)])
    inputs = z, torch.tensor([3, 700]), sd.encode_prompts(pairs.prompts), hint
    denoiser = Denoiser(sd.unet, controlnet, bf16=False)
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), denoiser(*inputs))


def test_interrupt_saves_and_goes_on(tmp_path, monkeypatch):
    command = [sys.executable, ROOT / "train.py", *QUICK, "--output-dir", tmp_path / "run", "--max-train-steps", "2000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and log.read_text()) and time.time() < deadline:
        time.sleep(0.1)
    assert read_log(tmp_path / "run"), "training did not start"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "--resume-from-checkpoint latest" in output
    steps = len(read_log(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps}" / "state.safetensors").exists()
    assert (tmp_path / "run" / "controlnet.safetensors").exists()

    resume = ["--output-dir", tmp_path / "run", "--resume-from-checkpoint", "latest", "--max-train-steps", steps + 1]
    run(monkeypatch, *QUICK, *resume)
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == list(range(1, steps + 2))


def test_resuming_from_an_earlier_step_drops_what_came_after(tmp_path, monkeypatch):
    options = [*QUICK, "--output-dir", tmp_path, "--checkpointing-steps", "1", "--validation-steps", "0"]
    run(monkeypatch, *options, "--max-train-steps", "3", "--checkpoints-total-limit", "3")
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')  # cut short by a crash
    first = tmp_path / "checkpoints" / "step-1"
    run(monkeypatch, *options, "--max-train-steps", "2", "--resume-from-checkpoint", first)
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-1", "step-2"]
    (first / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json can.t be read as JSON"):
        run(monkeypatch, *options, "--resume-from-checkpoint", first)


def test_broken_hint_is_found_before_training(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)
    (folder / "source" / "2.png").write_bytes(b"no picture")
    options = ["--data", folder, "--resolution", "64", "--output-dir", tmp_path / "run"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *options], capture_output=True, text=True)
    assert done.returncode == 2
    line = done.stderr.strip()
    assert line.startswith(f"error: {folder / 'prompt.json'} line 3: {folder / 'source' / '2.png'} can't be read")
    assert "\n" not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_picture_that_vanishes_later(workers, tmp_path, monkeypatch, capfd):
    """One line too when it is another process that reads it."""
    folder, real = tmp_path / "data", train.open_pairs
    shutil.copytree(SAMPLE, folder)

    def then_remove(*arguments):
        pairs = real(*arguments)
        (folder / "source" / "2.png").unlink()
        return pairs

    monkeypatch.setattr(train, "open_pairs", then_remove)
    options = ["--data", folder, "--resolution", "64", "--num-workers", workers, "--output-dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as ended:
        files.run(lambda: run(monkeypatch, *options))
    assert ended.value.code == 2
    errors = capfd.readouterr().err
    line = errors.strip().split("\n")[-1]
    assert line.startswith(f"error: {folder / 'source' / '2.png'}: no such file")
    assert "Traceback" not in errors


def test_accumulation_counts_optimizer_steps(tmp_path, monkeypatch):
    batches, forward = [], ControlNet.forward

    def spy(self, x, *others):
        batches.append(len(x))
        return forward(self, x, *others)

    monkeypatch.setattr(ControlNet, "forward", spy)
    options = ["--data", SAMPLE, "--resolution", "64", "--max-train-steps", "2", "--train-batch-size", "2"]
    options += ["--validation-steps", "0"]
    run(monkeypatch, *options, "--gradient-accumulation-steps", "3", "--output-dir", tmp_path)
    assert batches == [2] * 6
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]


def test_ablations_and_checkpoint_limit(tmp_path, monkeypatch):
    options = ["--connection", "gaussian", "--copy", "lite", "--mixed-precision", "bf16", "--gradient-checkpointing"]
    options += ["--checkpointing-steps", "1", "--checkpoints-total-limit", "2", "--max-train-steps", "3"]
    run(monkeypatch, *QUICK, *options, "--output-dir", tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-3"]
    tensors, metadata = read_tensors(tmp_path / "controlnet.safetensors")
    assert metadata["copy"] == "lite"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_half_of_the_prompts_are_empty(tmp_path, monkeypatch):
    contexts, forward = [], ControlNet.forward

    def spy(self, x, hint, t, context):
        contexts.append(context)
        return forward(self, x, hint, t, context)

    monkeypatch.setattr(ControlNet, "forward", spy)
    options = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "8", "--validation-steps", "0"]
    run(monkeypatch, *options, "--max-train-steps", "10", "--output-dir", tmp_path)
    empty = StableDiffusion.load("tiny").encode_prompts([""])[0].half().float()
    rows = torch.cat(contexts)
    share = sum(torch.equal(row, empty) for row in rows) / len(rows)
    assert 0.3 < share < 0.7  # 80 draws of one half: within four standard deviations


def test_every_pair_once_an_epoch():
    batches = index_batches(count=10, batch_size=4, seed=1, first=0)
    stream = [i for _ in range(5) for i in next(batches)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    later = index_batches(count=10, batch_size=4, seed=1, first=3)
    assert next(later) == stream[12:16]


def test_randomness_differs_by_seed_use_and_step():
    keys = [(seed, use, step) for seed in (0, 1, 2**31) for use in (0, 1) for step in (0, 1, 5)]
    draws = {torch.randn((), generator=generator_for(*key)).item() for key in keys}
    assert len(draws) == len(keys)
    assert torch.equal(torch.rand(3, generator=generator_for(1, 0, 5)), torch.rand(3, generator=generator_for(1, 0, 5)))


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


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-train-steps", "0"], "--max-train-steps 0"),
        (["--learning-rate", "-1"], "--learning-rate -1"),
        (["--proportion-empty-prompts", "1.5"], "--proportion-empty-prompts"),
        (["--resolution", "100"], "--resolution 100"),
        (["--data", "nowhere"], "nowhere/prompt.json: no such file"),
        (["--validation-hints", "0"], "--validation-hints 0"),
        (["--num-workers", "-1"], "--num-workers -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--resume-from-checkpoint", "latest"], "has no checkpoint"),
        (["--resume-from-checkpoint", "nowhere"], "nowhere is no checkpoint"),
        (["--mixed-precision", "fp64"], "--mixed-precision"),
    ],
)
def test_mistakes(options, message, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "--output-dir", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_cut(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)
    lines = (folder / "prompt.json").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"prompt": "circle " * 76})
    (folder / "prompt.json").write_text("\n".join(lines))
    options = ["--data", folder, "--max-train-steps", "1", "--validation-steps", "0", "--output-dir", tmp_path / "run"]
    run(monkeypatch, *QUICK, *options)
    warning = f"warning: 1 prompts have more than 75 tokens and are cut, the first is that of {folder / 'target'}"
    assert warning in capsys.readouterr().err


def test_only_mid_control(tmp_path, monkeypatch):
    """The twelve skip connections stay zero, so that any program that reads the file does the same."""
    options = ["--only-mid-control", "--max-train-steps", "3", "--validation-steps", "0", "--output-dir", tmp_path]
    run(monkeypatch, *QUICK, *options)
    controlnet = load_controlnet(tmp_path / "controlnet.safetensors", StableDiffusion.load("tiny").unet)
    assert all(conv.weight.count_nonzero() == conv.bias.count_nonzero() == 0 for conv in controlnet.zero_convs)
    assert controlnet.middle_zero_conv.weight.count_nonzero() > 0
    assert controlnet.hint_encoder[-1].weight.count_nonzero() > 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_unlocked_decoder_travels_with_the_controlnet(precision, tmp_path, monkeypatch):
    """Trained, saved under its official names, resumed bit for bit, and put into the base by sample.py."""
    options = [*QUICK, "--unlock-decoder", "--mixed-precision", precision]
    run(monkeypatch, *options, "--output-dir", tmp_path / "whole", "--max-train-steps", "4")
    run(monkeypatch, *options, "--output-dir", tmp_path / "parts", "--max-train-steps", "2")
    resume = ["--resume-from-checkpoint", "latest", "--max-train-steps", "4"]
    run(monkeypatch, *options, "--output-dir", tmp_path / "parts", *resume)
    whole, parts = (read_tensors(tmp_path / name / "controlnet.safetensors")[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert (tmp_path / "whole" / "previews" / "step-4.png").read_bytes() == (
        tmp_path / "parts" / "previews" / "step-4.png"
    ).read_bytes()  # the row of step 0 too, which is the untouched base's

    sd = StableDiffusion.load("tiny")
    before = official_state_dict(sd.unet)
    before = {name: tensor.clone() for name, tensor in before.items()}
    decoder = {name for name in before if ".output_blocks." in name or ".diffusion_model.out." in name}
    assert whole.keys() - decoder == {name for name in whole if name.startswith("control_model.")}
    assert all(not torch.equal(before[name], whole[name]) for name in decoder)
    load_decoders(sd, [tmp_path / "whole" / "controlnet.safetensors"])
    after = official_state_dict(sd.unet)
    assert all(torch.equal(after[name], whole[name] if name in decoder else before[name]) for name in before)
    assert torch.equal(  # and the base's file is as it was
        official_state_dict(StableDiffusion.load("tiny").unet)["model.diffusion_model.out.2.weight"],
        before["model.diffusion_model.out.2.weight"],
    )
    with pytest.raises(UserError, match="both bring a decoder"):
        load_decoders(sd, [tmp_path / name / "controlnet.safetensors" for name in ("whole", "parts")])


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(monkeypatch, *QUICK, "--report-to", "tensorboard", "--output-dir", tmp_path, "--max-train-steps", "4")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [entry["loss"] for entry in read_log(tmp_path)]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
    assert events.Images("preview")[0].step == 4
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run(monkeypatch, *QUICK, "--report-to", "tensorboard", "--output-dir", tmp_path / "other")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_numbers_stop_the_run(what, tmp_path, monkeypatch):
    """Before they get into the weights, with the pairs named; the checkpoint before stays and can be resumed from."""
    options = [*QUICK, "--output-dir", tmp_path, "--checkpointing-steps", "2", "--validation-steps", "0"]
    real, calls = train.denoising_loss, []

    def broken(*arguments):
        loss = real(*arguments)
        calls.append(loss)
        if len(calls) < 4:
            return loss
        return loss * float("nan") if what == "loss" else loss + Exploding.apply(loss)

    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return torch.zeros_like(x)

        @staticmethod
        def backward(context, gradient):
            return gradient * float("inf")

    monkeypatch.setattr(train, "denoising_loss", broken)
    with pytest.raises(UserError) as raised:
        run(monkeypatch, *options, "--max-train-steps", "6")
    message = str(raised.value)
    assert message.startswith("step 4: ")
    assert str(SAMPLE / "target") in message
    assert str(tmp_path / "checkpoints" / "step-2") in message
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3]
    saved = read_tensors(tmp_path / "checkpoints" / "step-2" / "state.safetensors")[0]
    assert all(tensor.isfinite().all() for tensor in saved.values())
    monkeypatch.setattr(train, "denoising_loss", real)
    run(monkeypatch, *options, "--max-train-steps", "4", "--resume-from-checkpoint", "latest")
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3, 4]


def test_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    real = files.save_file

    def full(tensors, path, metadata):
        real(tensors, path, metadata)
        if "checkpoints" in str(path) and (tmp_path / "checkpoints" / "step-2").exists():
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    options = [*QUICK, "--output-dir", tmp_path, "--checkpointing-steps", "2", "--validation-steps", "0"]
    with pytest.raises(UserError, match="No space left on device.*make room"):
        run(monkeypatch, *options, "--max-train-steps", "4")
    monkeypatch.setattr(files, "save_file", real)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-2"]
    run(monkeypatch, *options, "--max-train-steps", "4", "--resume-from-checkpoint", "latest")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_stopped_before_the_first_checkpoint(tmp_path, monkeypatch, capsys):
    """No dead end: the folder is refused as a new run's, and resuming starts from the beginning."""
    options = [*QUICK, "--output-dir", tmp_path, "--validation-steps", "0", "--max-train-steps", "2"]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(train, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, *options)
    with pytest.raises(UserError, match="holds a run already"):
        run(monkeypatch, *options)
    run(monkeypatch, *options, "--resume-from-checkpoint", "latest")
    assert "no checkpoint yet: starting at step 0" in capsys.readouterr().out
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]
    with pytest.raises(UserError, match="beyond --max-train-steps 1"):
        run(monkeypatch, *options, "--resume-from-checkpoint", "latest", "--max-train-steps", "1")
    (tmp_path / "controlnet.safetensors").unlink()  # stopped between the checkpoint and this file
    run(monkeypatch, *options, "--resume-from-checkpoint", "latest")
    assert (tmp_path / "controlnet.safetensors").exists()


def launch(folder, processes, *options):
    """torchrun with gloo processes on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [ROOT / "train.py", "--data", SAMPLE, "--resolution", "64", "--validation-steps", "2", "--device", "cpu"]
    command += ["--output-dir", folder, *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_tensors(folder / "controlnet.safetensors")[0]


def test_two_processes_equal_one(tmp_path, monkeypatch):
    """The same global batch gives the same weights up to rounding: sums in another order. And resuming works."""
    options = ["--max-train-steps", "4", "--gradient-accumulation-steps", "2", "--learning-rate", "1e-4"]
    one = ["--data", SAMPLE, "--resolution", "64", "--validation-steps", "2", "--train-batch-size", "4"]
    run(monkeypatch, *one, *options, "--output-dir", tmp_path / "one")
    two = launch(tmp_path / "two", 2, *options, "--train-batch-size", "2")
    parts = ["--train-batch-size", "2", *options[2:]]
    launch(tmp_path / "parts", 2, *parts, "--max-train-steps", "2")
    resumed = launch(tmp_path / "parts", 2, *parts, "--max-train-steps", "4", "--resume-from-checkpoint", "latest")
    one = read_tensors(tmp_path / "one" / "controlnet.safetensors")[0]
    assert all(torch.equal(two[name], resumed[name]) for name in two)
    # Adam divides by the gradient's size, so that in four steps of 1e-4 a sign lost to rounding moves at most 8e-4.
    largest = max((one[name] - two[name]).abs().max().item() for name in one)
    typical = torch.cat([(one[name] - two[name]).abs().flatten() for name in one]).mean().item()
    assert largest < 8e-4 and typical < 1e-6
    logs = [read_log(tmp_path / name) for name in ("one", "two", "parts")]
    assert [entry["step"] for entry in logs[1]] == [1, 2, 3, 4]  # one process writes it
    assert [entry["loss"] for entry in logs[1]] == pytest.approx([entry["loss"] for entry in logs[0]], rel=1e-4)
    assert logs[1] == logs[2]
