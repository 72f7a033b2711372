"""The real command line on the miniature: what a step does, and what a run measures and writes."""

import json
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

from support.errors import UserError, run_command_line

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from standin import ROOT, SAMPLE, read_run, run_main

import convergence
import data
import train
from controlnet import ControlNet, Denoiser
from convergence import RESPONSE_TIMES, HeldOut
from data import DrawnImages, PairedImages
from diffusion import NoiseSchedule
from stable_diffusion import SD15, StableDiffusion
from support.devices import fast_precision, warn_if_slow
from support.files import read_tensors
from support.randomness import generator_for, index_batches
from unet import UNet
from weights import load_controlnet, load_decoders, official_state_dict

QUICK = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "3", "--validation-steps", "4"]
QUICK += ["--cooldown", "0"]  # with a fall at the end, more steps are another training


def test_the_learning_rate_falls_at_the_end(tmp_path, monkeypatch):
    """A quarter less at each of the last three steps of five, in the optimizer and in the log."""
    used, options = [], ["--max-train-steps", "5", "--cooldown", "0.6", "--validation-steps", "0"]
    step = torch.optim.AdamW.step

    def spy(optimizer, *args, **kwargs):
        used.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run_main(monkeypatch, train, *QUICK, *options, "--learning-rate", "4e-3", "--output-dir", tmp_path)
    assert used == [entry["lr"] for entry in read_run(tmp_path)] == pytest.approx([4e-3, 4e-3, 3e-3, 2e-3, 1e-3])


def test_what_is_measured(tmp_path, monkeypatch, capsys):
    """Sensitivity and gap every 5 steps, IoU and colour error of more hints than a preview shows, two sentences."""
    options = ["--resolution", "64", "--train-batch-size", "4", "--validation-steps", "20", "--validation-hints", "9"]
    options += ["--hint-init", "default"]  # whose sensitivity begins small, and grows
    monkeypatch.setitem(data.DRAWN_PAIRS, "drawn", 8)
    monkeypatch.setattr("convergence.growth_step", lambda history: 10 if len(history) >= 10 else None)
    monkeypatch.setattr("convergence.jump_step", lambda history: 20 if len(history) >= 20 else None)
    run_main(monkeypatch, train, *options, "--output-dir", tmp_path, "--max-train-steps", "20")
    log = {entry["step"]: entry for entry in read_run(tmp_path)}
    assert [step for step in log if "hint_sensitivity" in log[step]] == [5, 10, 15, 20]
    assert log[20]["hint_sensitivity"] > log[10]["hint_sensitivity"] > 0
    assert log[10].keys() == {"step", "loss", "gradient_norm", "lr", "hint_sensitivity", "hint_gap", "heldout_loss"}
    assert 0 < log[20]["heldout_loss"] < 0.2
    scores = {"iou", "ious", "followed", "colour_error"}
    assert scores | {f"base_{score}" for score in scores} <= log[20].keys()
    assert log[20]["base_followed"] in [i / 9 for i in range(10)]
    assert {path.stem for path in (tmp_path / "snapshots").iterdir()} == {"step-0", "step-10", "step-20"}
    first, _ = read_tensors(tmp_path / "snapshots" / "step-0.safetensors")
    last, metadata = read_tensors(tmp_path / "snapshots" / "step-20.safetensors")
    final, _ = read_tensors(tmp_path / "controlnet.safetensors")
    assert not first["control_model.middle_block_out.0.weight"].any() and metadata["steps"] == "20"
    assert all(torch.equal(tensor, final[name].half()) for name, tensor in last.items())
    assert Image.open(tmp_path / "previews" / "step-20.png").size == (60 + 8 * 64, 4 * 64 + 64)
    assert Image.open(tmp_path / "convergence.png").height > 500
    output = capsys.readouterr().out
    assert "step 10: the hint sensitivity is growing: " in output
    assert "step 20: the jump: " in output and " --control-mode conditional" in output
    assert f"IoU of samples and hints {log[20]['iou']:.2f}" in output


def test_the_response_is_zero_before_the_first_step(tmp_path):
    """Equation (3) again: another pair's hint changes nothing yet, and the held-out pairs are the same each time."""
    sd, pairs = StableDiffusion.load("tiny").requires_grad_(False), DrawnImages(3, 64)
    held_out, again = (HeldOut(sd, pairs, 0, tmp_path, previews=False) for _ in range(2))
    for name in ("z", "eps", "own", "other", "context"):
        assert torch.equal(getattr(held_out, name), getattr(again, name))
    last = len(RESPONSE_TIMES) - 1  # 3 pairs for 4 times: the first one again
    assert torch.equal(held_out.own[last], pairs.hint(0)) and torch.equal(held_out.other[last], pairs.hint(1))
    controlnet = ControlNet.from_unet(sd.unet, sd.preset.hint_channels).requires_grad_(False)
    values = held_out.response(Denoiser(sd.unet, controlnet))
    assert values["hint_sensitivity"] == values["hint_gap"] == 0
    assert 0 < values["heldout_loss"] < 0.2
    assert not list(tmp_path.iterdir())  # nothing is sampled
    assert HeldOut(sd, DrawnImages(1, 64), 0, tmp_path, previews=False).response(Denoiser(sd.unet, controlnet)) == {}


def test_step_zero_is_sampled_once(tmp_path, monkeypatch):
    """The base's samples are kept with the run: resuming reads them."""
    sd, pairs = StableDiffusion.load("tiny"), DrawnImages(2, 64)
    first = HeldOut(sd, pairs, 0, tmp_path)
    monkeypatch.setattr(convergence, "generate", None)
    again = HeldOut(sd, pairs, 0, tmp_path)
    assert torch.equal(first.step_0, again.step_0) and first.base_scores == again.base_scores
    assert first.step_0.shape == (2, 3, 64, 64) and first.base_scores.keys() == {
        "base_iou", "base_ious", "base_followed", "base_colour_error"
    }  # fmt: skip


def test_one_graph():
    """Nothing in UNet and ControlNet makes torch.compile start a second graph (--compile)."""
    sd, pairs = StableDiffusion.load("tiny").requires_grad_(False), DrawnImages(2, 64)
    controlnet = ControlNet.from_unet(sd.unet, sd.preset.hint_channels)
    z, hint = torch.randn(2, 4, 8, 8), torch.stack([pairs.hint(i) for i in range(2)])
    inputs = z, torch.tensor([3, 700]), sd.encode_prompts(pairs.prompts), hint
    denoiser = Denoiser(sd.unet, controlnet)
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), denoiser(*inputs))


def test_accumulation_counts_optimizer_steps(tmp_path, monkeypatch):
    batches, forward = [], ControlNet.forward

    def spy(self, x, *others):
        batches.append(len(x))
        return forward(self, x, *others)

    monkeypatch.setattr(ControlNet, "forward", spy)
    options = ["--data", SAMPLE, "--resolution", "64", "--max-train-steps", "2", "--train-batch-size", "2"]
    options += ["--validation-steps", "0"]
    run_main(monkeypatch, train, *options, "--gradient-accumulation-steps", "3", "--output-dir", tmp_path)
    assert batches == [2] * 6
    assert [entry["step"] for entry in read_run(tmp_path)] == [1, 2]


def test_ablations_and_checkpoint_limit(tmp_path, monkeypatch):
    options = ["--connection", "gaussian", "--copy", "lite", "--mixed-precision", "bf16", "--gradient-checkpointing"]
    options += ["--checkpointing-steps", "1", "--checkpoints-total-limit", "2", "--max-train-steps", "3"]
    run_main(monkeypatch, train, *QUICK, *options, "--output-dir", tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-3"]
    tensors, metadata = read_tensors(tmp_path / "controlnet.safetensors")
    assert metadata["copy"] == "lite"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_equation_5(tmp_path, monkeypatch):
    """The model's output is compared with ε, and z_t is a sample of q(z_t | z_0), z_0 from the hint's picture."""
    calls, forward = [], Denoiser.forward

    def model(self, z, t, context, hint):
        calls.append({"z": z, "t": t, "hint": hint, "predicted": forward(self, z, t, context, hint)})
        return calls[-1]["predicted"]

    def mse_loss(predicted, eps):
        assert predicted is calls[-1]["predicted"]
        calls[-1]["eps"] = eps
        return F.mse_loss(predicted, eps)

    monkeypatch.setattr(Denoiser, "forward", model)
    monkeypatch.setattr(train, "F", SimpleNamespace(mse_loss=mse_loss))
    options = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "8", "--validation-steps", "0"]
    run_main(monkeypatch, train, *options, "--max-train-steps", "4", "--output-dir", tmp_path)  # none is measured

    z, t, hint, eps = (torch.cat([call[name] for call in calls]) for name in ("z", "t", "hint", "eps"))
    sd, pairs = StableDiffusion.load("tiny"), PairedImages(SAMPLE, 64)
    alpha = NoiseSchedule().alphas_cumprod[t].float()[:, None, None, None]
    z0 = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt() / sd.latent_scale
    with torch.no_grad():
        moments = sd.vae.encode(torch.stack([pairs.image(i) for i in range(4)]))
    hints = torch.stack([pairs.hint(i) for i in range(4)])
    pair = (hint[:, None] - hints).abs().amax((2, 3, 4)).argmin(dim=1)
    assert set(pair.tolist()) == {0, 1, 2, 3}
    mean, log_variance = moments[pair].chunk(2, dim=1)
    vae_noise = (z0 - mean) / (log_variance / 2).exp()
    # 32 rows of 256 numbers. The moments are kept in half precision: beside a σ of 0.05 that rounds by a hundredth.
    for noise in (vae_noise, eps):
        assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert abs((vae_noise * eps).mean()) < 0.05  # two draws
    assert t.min() < 250 and t.max() >= 750 and len(t.unique()) > 25


def test_half_of_the_prompts_are_empty(tmp_path, monkeypatch):
    contexts, forward = [], ControlNet.forward

    def spy(self, x, hint, t, context):
        contexts.append(context)
        return forward(self, x, hint, t, context)

    monkeypatch.setattr(ControlNet, "forward", spy)
    options = ["--data", SAMPLE, "--resolution", "64", "--train-batch-size", "8", "--validation-steps", "0"]
    run_main(monkeypatch, train, *options, "--max-train-steps", "10", "--output-dir", tmp_path)
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


def test_broken_hint_is_found_before_training(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)
    (folder / "source" / "2.png").write_bytes(b"no picture")
    options = ["--data", folder, "--resolution", "64", "--output-dir", tmp_path / "run"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *options], capture_output=True, text=True)
    assert done.returncode == 2
    line = done.stderr.strip().split("\n")[-1]  # after a progress bar
    assert line.startswith(
        f"error: {folder / 'prompt.json'} line 3: {folder / 'source' / '2.png'} is damaged or no picture"
    )
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_broken_pictures_are_listed_together(tmp_path, monkeypatch):
    """The first broken picture ends the encoding, not the looking."""
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)
    for name in ("1", "3"):
        (folder / "target" / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="2 of 4 entries are broken") as raised:
        run_main(monkeypatch, train, "--data", folder, *QUICK[2:], "--output-dir", tmp_path / "run")
    assert [detail.split(": ")[0] for detail in raised.value.args[1:]] == [
        f"{folder / 'prompt.json'} line {number}" for number in (2, 4)
    ]
    assert not (tmp_path / "run").exists()


def test_broken_held_out_pairs_are_found_too(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)
    entries = (SAMPLE / "prompt.json").read_text().splitlines()
    (folder / "prompt.json").write_text("\n".join(entries[:2] * 5 + entries[3:]))  # the last of 11 is held out
    Image.new("RGB", (64, 128)).save(folder / "source" / "3.png")
    with pytest.raises(UserError, match="line 11: hint 3.png is 64x128, target 3.png 512x512; crop them alike"):
        run_main(monkeypatch, train, "--data", folder, *QUICK[2:], "--output-dir", tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 2])
def test_picture_that_vanishes_later(workers, tmp_path, monkeypatch, capfd):
    """One line too when it is another process that reads it."""
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)

    def then_remove(*arguments):
        (folder / "source" / "2.png").unlink()
        return None

    monkeypatch.setattr(train, "HeldOut", then_remove)
    options = ["--data", folder, "--resolution", "64", "--num-workers", workers, "--output-dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as ended:
        run_command_line(lambda: run_main(monkeypatch, train, *options))
    assert ended.value.code == 2
    errors = capfd.readouterr().err
    line = errors.strip().split("\n")[-1]
    assert line.startswith(f"error: {folder / 'source' / '2.png'}: no such file")
    assert "Traceback" not in errors


def test_a_prompt_that_is_cut(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    shutil.copytree(SAMPLE, folder)
    lines = (folder / "prompt.json").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"prompt": "circle " * 76})
    (folder / "prompt.json").write_text("\n".join(lines))
    options = ["--data", folder, "--max-train-steps", "1", "--validation-steps", "0", "--output-dir", tmp_path / "run"]
    run_main(monkeypatch, train, *QUICK, *options)
    warning = f"warning: 1 of 4 prompts are too long; {folder / 'prompt.json'} line 2 is cut from: circle"
    assert warning in capsys.readouterr().err


def test_only_mid_control(tmp_path, monkeypatch):
    """The twelve skip connections stay zero, so that any program that reads the file does the same."""
    options = ["--only-mid-control", "--max-train-steps", "3", "--validation-steps", "0", "--output-dir", tmp_path]
    run_main(monkeypatch, train, *QUICK, *options)
    controlnet = load_controlnet(tmp_path / "controlnet.safetensors", StableDiffusion.load("tiny").unet)
    assert all(conv.weight.count_nonzero() == conv.bias.count_nonzero() == 0 for conv in controlnet.zero_convs)
    assert controlnet.middle_zero_conv.weight.count_nonzero() > 0
    assert controlnet.hint_encoder[-1].weight.count_nonzero() > 0


def test_fp16_passes_over_a_step_that_overflows(tmp_path, monkeypatch):
    """The scale is halved, the weights stay, a resumed run goes on from that scale; a loss of NaN stops it even so."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**60))
    options = [*QUICK, "--mixed-precision", "fp16", "--validation-steps", "0", "--validation-hints", "1"]
    options += ["--output-dir", tmp_path]
    run_main(monkeypatch, train, *options, "--max-train-steps", "2")
    resume = ["--resume-from-checkpoint", "latest"]
    run_main(monkeypatch, train, *options, "--max-train-steps", "3", *resume)
    assert [entry.keys() for entry in read_run(tmp_path)] == [{"step", "loss", "lr", "skipped"}] * 3
    saved, metadata = read_tensors(tmp_path / "checkpoints" / "step-3" / "state.safetensors")
    assert json.loads(metadata["scaler"])["scale"] == 2.0**57
    assert saved["trained.controlnet.middle_zero_conv.weight"].count_nonzero() == 0
    monkeypatch.setattr(train.F, "mse_loss", lambda a, b: (a - b).square().mean() * float("nan"))
    with pytest.raises(UserError, match="step 4: loss nan"):
        run_main(monkeypatch, train, *options, "--max-train-steps", "4", *resume)


def test_auto_takes_what_the_device_is_fast_in(monkeypatch):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    for bf16, word in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, bf16=bf16: bf16)
        assert fast_precision(cuda) == word
    for instructions, word in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "no")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda instructions=instructions: instructions)
        assert fast_precision(cpu) == word
    assert fast_precision(torch.device("meta")) == "no"


def test_where_it_runs_is_said(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, train, *QUICK, "--max-train-steps", "1", "--device", "cpu", "--output-dir", tmp_path)
    said = capsys.readouterr()
    assert f"training on cpu ({torch.get_num_threads()} threads), mixed precision: no" in said.out
    assert "CPU" not in said.err  # the miniature is made for it
    with torch.device("meta"):
        warn_if_slow(UNet(SD15.unet), torch.device("cpu"))
    assert "warning: Stable Diffusion 1.5 on a CPU takes" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_unlocked_decoder_travels_with_the_controlnet(precision, tmp_path, monkeypatch):
    """Trained, saved under its official names, resumed bit for bit, and put into the base by sample.py."""
    options = [*QUICK, "--unlock-decoder", "--mixed-precision", precision]
    run_main(monkeypatch, train, *options, "--output-dir", tmp_path / "whole", "--max-train-steps", "4")
    run_main(monkeypatch, train, *options, "--output-dir", tmp_path / "parts", "--max-train-steps", "2")
    resume = ["--resume-from-checkpoint", "latest", "--max-train-steps", "4"]
    run_main(monkeypatch, train, *options, "--output-dir", tmp_path / "parts", *resume)
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
    load_decoders(sd.unet, [tmp_path / "whole" / "controlnet.safetensors"])
    after = official_state_dict(sd.unet)
    assert all(torch.equal(after[name], whole[name] if name in decoder else before[name]) for name in before)
    assert torch.equal(  # and the base's file is as it was
        official_state_dict(StableDiffusion.load("tiny").unet)["model.diffusion_model.out.2.weight"],
        before["model.diffusion_model.out.2.weight"],
    )
    with pytest.raises(UserError, match="both bring a decoder"):
        load_decoders(sd.unet, [tmp_path / name / "controlnet.safetensors" for name in ("whole", "parts")])


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_main(
        monkeypatch, train, *QUICK, "--report-to", "tensorboard", "--output-dir", tmp_path, "--max-train-steps", "4"
    )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [entry["loss"] for entry in read_run(tmp_path)]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
    assert events.Images("preview")[0].step == 4
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run_main(monkeypatch, train, *QUICK, "--report-to", "tensorboard", "--output-dir", tmp_path / "other")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_numbers_stop_the_run(what, tmp_path, monkeypatch):
    """Before they get into the weights, with the pairs named; the last good step is saved and can be resumed from."""
    options = [*QUICK, "--output-dir", tmp_path, "--checkpointing-steps", "2", "--validation-steps", "0"]
    options += ["--validation-hints", "1"]  # one pair has no other's hint: only training calls the loss
    real, calls = F.mse_loss, []

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

    monkeypatch.setattr(train.F, "mse_loss", broken)
    with pytest.raises(UserError) as raised:
        run_main(monkeypatch, train, *options, "--max-train-steps", "6")
    message = str(raised.value)
    assert message.startswith("step 4: ")
    assert f"{SAMPLE / 'prompt.json'} line " in message
    assert [entry["step"] for entry in read_run(tmp_path)] == [1, 2, 3]
    saved = read_tensors(tmp_path / "checkpoints" / "step-3" / "state.safetensors")[0]
    assert all(tensor.isfinite().all() for tensor in saved.values())
    monkeypatch.setattr(train.F, "mse_loss", real)
    run_main(monkeypatch, train, *options, "--max-train-steps", "4", "--resume-from-checkpoint", "latest")
    assert [entry["step"] for entry in read_run(tmp_path)] == [1, 2, 3, 4]
