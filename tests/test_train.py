"""The real command line on the nano base: what a step does, and what a run measures and writes."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial

from support.command import run_command_line

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from standin import HINT_CHANNELS, LATEST, NANO, SAMPLE, equal, read_run, refusal

import convergence
import data
import train
from controlnet import ControlNet, Denoiser
from convergence import RESPONSE_TIMES, HeldOut
from data import DrawnImages, PairedImages
from diffusion import NoiseSchedule
from stable_diffusion import StableDiffusion
from support.files import read_tensors
from support.pictures import MARGIN
from support.randomness import generator_for, index_batches
from unet import UNet
from weights import load_controlnet, load_decoder, official_state_dict


@pytest.fixture
def pairs(tmp_path):
    """A copy of the four pairs, to be changed."""
    return shutil.copytree(SAMPLE, tmp_path / "pairs")


def spy_on(monkeypatch, network) -> list:
    """The inputs of every forward pass of a class of networks, beginning with the first tensor."""
    calls, forward = [], network.forward
    monkeypatch.setattr(network, "forward", lambda self, *inputs: calls.append(inputs) or forward(self, *inputs))
    return calls


def test_the_learning_rate_falls_at_the_end(trained, monkeypatch):
    """A quarter less at each of the last three steps of five, in the optimizer and in the log."""
    module, used = sys.modules["torch.optim.adam"], []
    adam = module.adam
    monkeypatch.setattr(module, "adam", lambda *a, **k: used.append(k["lr"]) or adam(*a, **k))
    log = read_run(trained("--max-train-steps", "5", "--cooldown", "0.6", "--learning-rate", "4e-3"))
    assert used == [entry["lr"] for entry in log] == pytest.approx([4e-3, 4e-3, 3e-3, 2e-3, 1e-3])


def test_what_is_measured(trained, monkeypatch, capsys):
    """Sensitivity and gap every 5 steps, IoU and colour error of more hints than a preview shows, two sentences."""
    monkeypatch.setitem(data.DRAWN_PAIRS, "drawn", 8)
    monkeypatch.setattr(convergence, "growth_step", lambda history: 5 if len(history) >= 5 else None)
    monkeypatch.setattr(convergence, "jump_step", lambda history: 10 if len(history) >= 10 else None)
    options = ["--data", "drawn", "--validation-steps", "10", "--validation-hints", "9", "--snapshot-steps", "5"]
    folder = trained(*options, "--max-train-steps", "10", curves=True)
    log = {entry["step"]: entry for entry in read_run(folder)}
    assert [step for step in log if "hint_sensitivity" in log[step]] == [5, 10]
    assert log[5].keys() == {"step", "loss", "gradient_norm", "lr", "hint_sensitivity", "hint_gap", "heldout_loss"}
    assert log[10]["hint_sensitivity"] > 0 and log[10]["heldout_loss"] > 0
    scores = {"iou", "ious", "followed", "colour_error"}
    assert scores | {f"base_{score}" for score in scores} <= log[10].keys() and len(log[10]["ious"]) == 9
    first, last = (read_tensors(folder / "snapshots" / f"step-{step}.safetensors") for step in (0, 10))
    final, _ = read_tensors(folder / "controlnet.safetensors")
    assert not first[0]["control_model.middle_block_out.0.weight"].any() and last[1]["steps"] == "10"
    assert all(torch.equal(tensor, final[name].half()) for name, tensor in last[0].items())
    assert {path.name for path in (folder / "previews").iterdir()} == {"hint.png", "step-0.png", "step-10.png"}
    assert Image.open(folder / "previews" / "step-10.png").size == (MARGIN + 8 * 64, 4 * 64 + 76)
    assert Image.open(folder / "convergence.png").height > 500
    output = capsys.readouterr().out
    assert "step 5: the hint sensitivity is growing: " in output and "step 10: the jump: " in output
    assert f"IoU of samples and hints {log[10]['iou']:.2f}" in output and "now: python sample.py" in output


def test_the_response_is_zero_before_the_first_step(nano, tmp_path, monkeypatch):
    """Equation (3) again: another pair's hint changes nothing yet, and the held-out pairs are the same each time."""
    sd, pairs = StableDiffusion.load(nano).requires_grad_(False), DrawnImages(3, 64)
    held_out, again = (HeldOut(sd, pairs, 0, tmp_path, previews=False) for _ in range(2))
    for name in ("z", "eps", "own", "other", "context"):
        assert torch.equal(getattr(held_out, name), getattr(again, name))
    last = len(RESPONSE_TIMES) - 1  # 3 pairs for 4 times: the first one again
    assert torch.equal(held_out.own[last], pairs.hint(0)) and torch.equal(held_out.other[last], pairs.hint(1))
    denoiser = Denoiser(sd.unet, ControlNet.from_unet(sd.unet, sd.preset.hint_channels).requires_grad_(False))
    values = held_out.response(denoiser)
    assert values["hint_sensitivity"] == values["hint_gap"] == 0 < values["heldout_loss"]
    assert HeldOut(sd, DrawnImages(1, 64), 0, tmp_path, previews=False).response(denoiser) == {}
    first = HeldOut(sd, pairs, 0, tmp_path)
    monkeypatch.setattr(convergence, "generate", None)  # the base's samples are kept with the run: resuming reads them
    again = HeldOut(sd, pairs, 0, tmp_path)
    assert torch.equal(first.step_0, again.step_0) and first.base_scores == again.base_scores != {}


def test_one_graph():
    """No kind of block in UNet and ControlNet makes torch.compile start a second graph (--compile)."""
    unet = UNet(replace(NANO[0], channel_mult=(1, 1), num_res_blocks=1, attention_levels=(0,))).requires_grad_(False)
    denoiser = Denoiser(unet, ControlNet.from_unet(unet, HINT_CHANNELS, connection="gaussian"))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, 16), torch.rand(2, 3, 64, 64)
    assert torch.equal(torch.compile(denoiser, fullgraph=True, backend="eager")(*inputs), denoiser(*inputs))


def test_accumulation_counts_optimizer_steps(trained, monkeypatch):
    """Three batches make a step, and its loss is their mean."""
    calls, losses, mse_loss = spy_on(monkeypatch, ControlNet), [], F.mse_loss
    monkeypatch.setattr(F, "mse_loss", lambda *inputs: losses.append(mse_loss(*inputs)) or losses[-1])
    folder = trained("--max-train-steps", "2", "--train-batch-size", "2", "--gradient-accumulation-steps", "3")
    assert [len(inputs[0]) for inputs in calls] == [2] * 6
    means = [sum(losses[first : first + 3]).item() / 3 for first in (0, 3)]
    assert [entry["loss"] for entry in read_run(folder)] == pytest.approx(means, rel=1e-6)  # sums of three, in float32


def test_only_mid_control(nano, trained):
    """The twelve skip connections stay zero, so that any program that reads the file does the same."""
    folder = trained("--only-mid-control", "--max-train-steps", "2")
    controlnet = load_controlnet(folder / "controlnet.safetensors", StableDiffusion.load(nano).unet)
    assert all(conv.weight.count_nonzero() == conv.bias.count_nonzero() == 0 for conv in controlnet.zero_convs)
    assert controlnet.middle_zero_conv.weight.count_nonzero() > 0


def test_ablations_and_checkpoint_limit(trained):
    options = ["--connection", "gaussian", "--copy", "lite", "--mixed-precision", "bf16", "--gradient-checkpointing"]
    folder = trained(*options, "--checkpointing-steps", "1", "--max-train-steps", "3")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-2", "step-3"}
    tensors, metadata = read_tensors(folder / "controlnet.safetensors")
    assert metadata["copy"] == "lite" and {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_equation_5(nano, trained, monkeypatch):
    """The model's output is compared with ε, and z_t is a sample of q(z_t | z_0), z_0 from the hint's picture."""
    calls, targets, mse_loss = spy_on(monkeypatch, Denoiser), [], F.mse_loss
    monkeypatch.setattr(F, "mse_loss", lambda predicted, eps: targets.append(eps) or mse_loss(predicted, eps))
    trained("--train-batch-size", "8", "--max-train-steps", "4")
    z, t, _, hint = (torch.cat(parts) for parts in zip(*calls))
    eps, sd, pairs = torch.cat(targets), StableDiffusion.load(nano), PairedImages(SAMPLE, 64)
    alpha = NoiseSchedule().alphas_cumprod[t].float()[:, None, None, None]
    z0 = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt() / sd.latent_scale
    with torch.no_grad():
        moments = sd.vae.encode(torch.stack([pairs.image(i) for i in range(4)]))
    hints = torch.stack([pairs.hint(i) for i in range(4)])
    pair = (hint[:, None] - hints).abs().amax((2, 3, 4)).argmin(dim=1)
    assert set(pair.tolist()) == {0, 1, 2, 3}
    mean, log_variance = moments[pair].chunk(2, dim=1)
    vae_noise = (z0 - mean) / (log_variance / 2).exp()
    # 32 rows of 256 numbers: their mean has a standard deviation of 1/90, their own is known to 1/128.
    for noise in (vae_noise, eps):
        assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert abs((vae_noise * eps).mean()) < 0.05  # two draws
    assert t.min() < 250 and t.max() >= 750 and len(t.unique()) > 25


def test_half_of_the_prompts_are_empty(nano, trained, monkeypatch):
    calls = spy_on(monkeypatch, ControlNet)
    trained("--train-batch-size", "8", "--max-train-steps", "10")
    rows = torch.cat([context for *_, context in calls])
    sd = StableDiffusion.load(nano)
    with torch.no_grad():
        known = sd.encode_prompts(["", *PairedImages(SAMPLE, 64).prompts])
    nearest = torch.cdist(rows.flatten(1), known.flatten(1)).argmin(dim=1)
    assert 0.3 < (nearest == 0).double().mean() < 0.7  # 80 draws of one half: within four standard deviations
    assert set(nearest.tolist()) == {0, 1, 2, 3, 4}


def test_order_and_randomness():
    """Every pair once an epoch, from any batch on; draws that differ by seed, use and step."""
    batches = index_batches(count=10, batch_size=4, seed=1, first=0)
    stream = [i for _ in range(5) for i in next(batches)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10)) and stream[:10] != stream[10:]
    assert next(index_batches(count=10, batch_size=4, seed=1, first=3)) == stream[12:16]
    keys = [(seed, use, step) for seed in (0, 1, 2**31) for use in (0, 1) for step in (0, 1, 5)]
    assert len({torch.randn((), generator=generator_for(*key)).item() for key in keys}) == len(keys)


def test_picture_that_vanishes_later(pairs, trained, monkeypatch, capfd):
    """One line too when it is another process that reads it."""
    monkeypatch.setattr(train, "HeldOut", lambda *_: (pairs / "source" / "2.png").unlink())
    with pytest.raises(SystemExit) as ended:
        run_command_line(lambda: trained("--data", pairs, "--num-workers", 2))
    errors = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in errors
    assert errors.strip().split("\n")[-1].startswith(f"error: {pairs / 'source' / '2.png'}: no such file")


def test_what_is_odd_about_the_pairs_is_said_once(pairs, trained, capsys):
    listing = pairs / "prompt.json"
    lines = listing.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"prompt": "circle " * 76})
    listing.write_text("\n".join(lines))
    for path in (pairs / "source").glob("*.png"):
        ImageOps.invert(Image.open(path).convert("RGB")).save(path)
    trained("--data", pairs, "--max-train-steps", "2")
    told = capsys.readouterr().err
    assert told.count(f"warning: 1 of 4 prompts are too long; {listing} line 2 is cut from: circle") == 1
    assert told.count(f"warning: {listing} line 1: the hint is dark on white") == 1


def test_fp16_passes_over_a_step_that_overflows(trained, monkeypatch):
    """The scale is halved, the weights stay, a resumed run goes on from that scale; a loss of NaN stops it even so."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**100))
    options = ["--mixed-precision", "fp16"]
    trained(*options, "--max-train-steps", "2")
    folder = trained(*options, "--max-train-steps", "3", *LATEST)
    assert [entry.keys() for entry in read_run(folder)] == [{"step", "loss", "lr", "skipped"}] * 3
    saved, metadata = read_tensors(folder / "checkpoints" / "step-3" / "state.safetensors")
    assert json.loads(metadata["scaler"])["scale"] == 2.0**97
    assert saved["trained.controlnet.middle_zero_conv.weight"].count_nonzero() == 0
    monkeypatch.setattr(F, "mse_loss", lambda a, b: (a - b).square().mean() * float("nan"))
    assert "step 4: loss nan" in refusal(trained, *options, "--max-train-steps", "4", *LATEST)


def test_unlocked_decoder_travels_with_the_controlnet(nano, trained, tmp_path):
    """Trained, saved under its official names, resumed bit for bit, and put into the base by sample.py."""
    options, folders = ["--unlock-decoder", "--mixed-precision", "bf16"], [tmp_path / "whole", tmp_path / "parts"]
    trained(*options, "--max-train-steps", "4", folder=folders[0])
    trained(*options, "--max-train-steps", "3", folder=folders[1])
    trained(*options, "--max-train-steps", "4", *LATEST, folder=folders[1])
    whole, parts = (read_tensors(folder / "controlnet.safetensors")[0] for folder in folders)
    assert equal(whole, parts) and {tensor.dtype for tensor in whole.values()} == {torch.float32}

    sd = StableDiffusion.load(nano)
    before = {name: tensor.clone() for name, tensor in official_state_dict(sd.unet).items()}
    decoder = {name for name in before if ".output_blocks." in name or ".diffusion_model.out." in name}
    assert whole.keys() - decoder == {name for name in whole if name.startswith("control_model.")}
    assert all(not torch.equal(before[name], whole[name]) for name in decoder)
    load_decoder(sd.unet, folders[0] / "controlnet.safetensors")
    after = official_state_dict(sd.unet)
    assert all(torch.equal(after[name], whole[name] if name in decoder else before[name]) for name in before)


def test_on_from_a_controlnet(trained, four_steps, tmp_path, capsys):
    """Its weights, not a fresh copy's: said, with what its hint moves before the first step. Told by its contents."""
    first = tmp_path / "first.safetensors"
    shutil.copy(four_steps / "controlnet.safetensors", first)
    measured = ["--controlnet", first, "--validation-hints", "2", "--snapshot-steps", "2"]
    folder = trained(*measured, "--max-train-steps", "2")
    start, *log = read_run(folder)
    said = capsys.readouterr().out
    assert f"starting from the ControlNet in {first} (full)" in said
    assert start["step"] == 0 and start["hint_sensitivity"] > 0 and len(log) == 2
    assert f"step 0: hint sensitivity {start['hint_sensitivity']:.1e}" in said
    snapshot, loaded = (read_tensors(path)[0] for path in (folder / "snapshots" / "step-0.safetensors", first))
    assert all(torch.equal(tensor, loaded[name].half()) for name, tensor in snapshot.items())
    # Another place is the same ControlNet, another content is not, and neither is none.
    resume = [*LATEST, "--max-train-steps", "3"]
    moved = first.rename(tmp_path / "moved.safetensors")
    for source in (["--controlnet", four_steps / "checkpoints" / "step-2"], []):
        assert "the ControlNet that it starts from is not what" in refusal(trained, *source, *measured[2:], *resume)
    assert len(read_run(trained("--controlnet", moved, *measured[2:], *resume))) == 4


def test_what_a_controlnet_brings(trained, tmp_path):
    """A lite one goes on as one, a decoder that was trained goes on with it; what is for a fresh copy is refused."""
    options, both = ["--unlock-decoder", "--max-train-steps", "1", "--snapshot-steps", "1"], tmp_path / "both"
    made = trained(*options, "--copy", "lite", folder=both) / "controlnet.safetensors"
    assert "brings a decoder that was trained with it: add --unlock-decoder" in refusal(trained, "--controlnet", made)
    folder = trained("--controlnet", made, *options)
    start, loaded = (read_tensors(path)[0] for path in (folder / "snapshots" / "step-0.safetensors", made))
    assert equal({name: tensor.half() for name, tensor in loaded.items()}, start)
    assert read_tensors(folder / "controlnet.safetensors")[1]["copy"] == "lite"
    assert "are for a fresh copy" in refusal(trained, "--controlnet", made, "--copy", "lite")


def test_compiling_is_tried_first(tmp_path, trained, monkeypatch):
    """Without a compiler it is one line, before the base is loaded or a folder made."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "none"),))
    monkeypatch.setattr(StableDiffusion, "load", None)
    told = refusal(trained, "--compile")
    assert told.startswith("--compile does not work here (") and "): install a C++ compiler" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_numbers_stop_the_run(what, trained, four_steps, monkeypatch):
    """Before they get into the weights, with the pairs named; the last good step is saved and can be resumed from."""
    real, calls = F.mse_loss, []

    def broken(*arguments):
        loss = real(*arguments)
        calls.append(loss)
        if len(calls) == 4 and what == "loss":
            return loss * float("nan")
        if len(calls) == 4:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(F, "mse_loss", broken)
    told = refusal(trained, "--max-train-steps", "6")
    assert told.startswith("step 4: ") and f"{SAMPLE / 'prompt.json'} line " in told
    monkeypatch.setattr(F, "mse_loss", real)
    folder = trained("--max-train-steps", "4", *LATEST)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-3", "step-4"}
    assert read_run(folder) == read_run(four_steps)
