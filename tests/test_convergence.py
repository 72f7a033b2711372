"""Sudden convergence: what is measured, what a log tells, and verdicts on ControlNets whose answer is known."""

import re
import shutil

import pytest
import torch
from PIL import Image
from standin import SAMPLE, equal, refusal, run_main
from torch import Tensor

import convergence
from controlnet import ControlNet
from convergence import HeldOut, growth_step, hint_response, jump_step, measure, milestones, plot_convergence
from data import DRAWN_HELD_OUT, DrawnImages
from draw import SHIPPED
from stable_diffusion import TINY
from support.verdict import BANDS, HINTS, Measurement, strongest_band, verdict
from weights import load_controlnet, save_controlnet


def untrained(tiny):
    return ControlNet.from_unet(tiny.unet, TINY.hint_channels, "silu").requires_grad_(False)


# While a ControlNet trains


def test_hint_response():
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert hint_response(eps, eps, eps) == (0, 0)
    # Its inputs are float32: 0.5 is added with an error of 2^-24 of a number below 4.
    assert hint_response(eps, eps + 0.5, eps) == pytest.approx((0.5, 0.25), rel=1e-6)
    assert hint_response(eps + 0.5, eps, eps) == pytest.approx((0.5, -0.25), rel=1e-6)  # the wrong hint is better
    # float32 would lose a gap of 2e-6 beside a loss of 1
    one, more = torch.ones(4, 4, 8, 8), torch.full((4, 4, 8, 8), 1 + 2**-20)
    assert hint_response(one, more, torch.zeros_like(one)) == (2**-20, 2**-19 + 2**-40)


def test_the_other_hint_is_another_hint(tiny, tmp_path):
    """Pairs may share a hint, with other captions."""

    class TwoCaptions(DrawnImages):
        def hint(self, index):
            return super().hint(index // 2 * 2)

    pairs = TwoCaptions(6, 64)
    assert torch.equal(pairs.other_hint(0), pairs.hint(2)) and torch.equal(pairs.other_hint(5), pairs.hint(0))
    held_out = HeldOut(tiny, pairs, 0, tmp_path, previews=False)
    assert all((own != other).any() for own, other in zip(held_out.own, held_out.other, strict=True))
    assert "all 2 pairs have the same hint" in refusal(measure, tiny, untrained(tiny), TwoCaptions(2, 64))


def measured(*sensitivities, gap=0.0):
    fixed = {"hint_gap": gap, "heldout_loss": 0.02}
    return [{"step": 10 * i, "hint_sensitivity": value} | fixed for i, value in enumerate(sensitivities, start=1)]


def test_growth_is_told_from_noise():
    noise = [0.0, 2e-7, 1.7e-6, 5e-7, 9e-7, 1.5e-6, 4e-7]
    assert growth_step(measured(*noise)) is None
    assert growth_step(measured(*noise, 6e-7, 1e-6, 1.6e-6, 2.8e-6, 5e-6, 9e-6)) == 130
    assert growth_step(measured(1e-5, 4e-5, 2e-4, 9e-4)) is None
    assert growth_step(measured(1e-5, 4e-5, 2e-4, 9e-4, 4e-3)) == 50
    assert growth_step(measured(2e-7, 2.3e-7, 3.6e-7, 2.5e-6, 5e-7, 4e-7, 4e-7)) is None  # a spike
    assert growth_step(measured(1e-5, 1.1e-5, 1.2e-5, 1.3e-5)) is None
    assert growth_step([{"step": 1, "loss": 0.1}]) is None
    heard = [{"step": i, "hint_sensitivity": 0.01 * 20**i, "hint_gap": 1, "heldout_loss": 1} for i in range(5)]
    assert growth_step(heard) is jump_step(heard) is None  # from the start on: unless it knew nothing
    heard[0]["hint_sensitivity"] = 0
    assert (growth_step(heard), jump_step(heard)) == (None, 2)  # once it has jumped, growth is no news


def test_jump_is_half_of_the_loss_in_three_measurements():
    gaps = [0.0, 0.02, 0.0, 0.001, 0.01, 0.009, 0.011, 0.02]  # a single high one is none
    entries = [entry | {"hint_gap": gap} for entry, gap in zip(measured(*[1e-2] * 8), gaps, strict=True)]
    assert jump_step(entries) == 70
    assert jump_step(entries[:6]) is None
    assert jump_step([{"step": 1, "loss": 0.1}, *entries[3:]]) == 70


def test_milestones():
    entries = measured(1e-4, 1e-4, 1e-4, 5e-3, 1e-2, 2e-2) + measured(*[5e-2] * 9, gap=0.01)[6:]
    assert [milestones(entries[:n]) for n in range(1, 6)] == [[]] * 5
    assert milestones(entries[:6]) == ["step 60: the hint sensitivity is growing: 2.0e-02"]
    assert milestones(entries[:8]) == []
    assert milestones(entries[:9]) == ["step 90: the jump: another pair's hint raises the held-out loss by half"]
    scored = {"step": 100, "iou": 0.5, "base_iou": 0.25, "followed": 0.25}
    told = "step 100: IoU of samples and hints 0.50 (the base's: 0.25), 25% of hints followed"
    assert milestones([*entries, scored]) == [told]


def test_plots_of_logs(tmp_path):
    """A panel for what was logged. A name is shown as it is: `$` begins no formula."""
    whole, heights = [{"loss": 0.03} | entry | {"iou": 0.5, "base_iou": 0.2} for entry in measured(*[1e-3] * 9)], []
    for logs in ({r"no $\previews$": whole, "empty": []}, {"run": [{"step": 1, "loss": 0.1}]}, {"empty": []}):
        plot_convergence(logs, tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as picture:
            heights.append(picture.height)
    assert heights[0] > 3 * heights[1]


# Any ControlNet


def test_known_answers(tiny):
    class MixedUp(DrawnImages):
        """Hints that do not belong to the pictures."""

        def hint(self, index):
            return super().hint((index + 2) % len(self))

    pairs, trained = DrawnImages(8, 64, DRAWN_HELD_OUT), load_controlnet(SHIPPED, tiny.unet)
    heard = measure(tiny, trained, pairs)
    assert verdict(heard).startswith("it follows its hint: another pair's hint raises")
    assert verdict(measure(tiny, trained, MixedUp(8, 64, DRAWN_HELD_OUT))).startswith("its hint moves the predict")
    silent = measure(tiny, untrained(tiny), pairs)
    assert verdict(silent).startswith("it does not hear its hint: its residuals are the same")
    assert silent.loss["own"].shape == silent.moved.shape == (8, len(BANDS))
    assert all(torch.equal(silent.loss["own"], loss) for loss in silent.loss.values())  # equation (3)
    # The same noise for every ControlNet, so that checkpoints can be compared: the base's loss is one and the same.
    assert torch.equal(silent.loss["none"], heard.loss["none"])
    assert not torch.equal(silent.loss["own"], heard.loss["own"])
    trained.middle_zero_conv.weight.data *= 1e38
    assert verdict(measure(tiny, trained, DrawnImages(2, 64))).startswith("its predictions are not finite")


def figures(added: Tensor, moved: float, pairs: int = 8) -> Measurement:
    """Of pairs whose own loss is 1, and with another hint 1 + added."""
    loss = {name: torch.ones(pairs, len(BANDS)) for name in HINTS}
    noise = 0.01 * torch.randn(pairs, len(BANDS), generator=torch.Generator().manual_seed(0))
    loss["other"] = loss["own"] + added + noise
    return Measurement(loss, torch.full((pairs, len(BANDS)), moved))


def test_verdicts():
    rising, hears = torch.linspace(0, 0.4, len(BANDS)), "it hears its hint, but samples hardly show it: "
    told = "another pair's hint raises the loss by 40% ± 0% at t = 875 to 999"
    assert verdict(figures(rising, 0.2)) == hears + told
    assert verdict(figures(3 * rising, 0.6)).startswith("it follows its hint")
    assert verdict(figures(-rising, 0.2)).startswith("its own hint makes the predictions worse")
    assert verdict(figures(rising, 0.2, pairs=4)) == "4 pairs are too few for a verdict: take 8 or more"
    noise = figures(torch.zeros(len(BANDS)), 0.05)
    noise.loss["other"] -= noise.figures()["gap"][0]  # hears at most by chance
    assert verdict(noise) == "it does not hear its hint yet, as far as 8 pairs can tell"
    noise.moved[:] = 0.2
    assert verdict(noise).startswith("its hint moves the predictions, but not towards these 8 pictures")


def test_what_the_strongest_band_is():
    """One that is noise does not count, and all together can be surer than each."""
    heard = figures(torch.full((len(BANDS),), 0.1), 0.1)
    heard.loss["other"][0, 2] += 30  # one pair alone
    assert strongest_band(heard)[2] != "250 to 374" and strongest_band(heard)[0] == pytest.approx(0.1, abs=0.02)
    heard = figures(torch.full((len(BANDS),), 0.05), 0.1)
    heard.loss["other"] += 0.06 * torch.eye(8) * 8 - 0.06  # one band of each pair, always another one
    # 64 draws of 0.01: their mean is within 0.01 of the added 0.05, eight standard errors
    assert strongest_band(heard) == (pytest.approx(0.05, abs=0.01), pytest.approx(0, abs=0.01), "0 to 999")
    assert "by 5% ± 0% at t = 0 to 999" in verdict(heard)


def test_standard_errors():
    """Of a mean over pairs: bands of one pair are no independent measurements."""
    rows = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, len(BANDS)).double()
    heard = Measurement({name: rows for name in HINTS}, rows**2)
    assert heard.figures()["own"] == pytest.approx((2.0, 1 / 3**0.5))
    # 1, 4 and 9: the mean is 14/3, its error sqrt(49/3 / 3); of the root half of that over the root
    assert heard.figures()["sensitivity"] == pytest.approx(((14 / 3) ** 0.5, (49 / 9) ** 0.5 / (2 * (14 / 3) ** 0.5)))


def judged_steps(monkeypatch, capsys, tmp_path, folder):
    """Step -> its own held-out loss, of a training's folder; and what was said."""
    capsys.readouterr()
    options = ["--pairs", "2", "--resolution", "64", "--data", SAMPLE, "--output", tmp_path / "curve.png"]
    run_main(monkeypatch, convergence, "--controlnet", folder, *options)
    assert (tmp_path / "curve.png").stat().st_size > 5000
    told = capsys.readouterr()
    assert "\n125 to 249 " in told.out  # the table
    losses = re.findall(rf"^{folder}\S*-(\d+)\S*: loss (\S+) ±", told.out, re.MULTILINE)
    return {int(step): float(loss) for step, loss in losses}, told


def test_a_training_of_ours(unet, trained, monkeypatch, capsys, tmp_path):
    """Every step with its own ControlNet, and with the decoder that was trained with it."""
    options = ["--checkpointing-steps", "1", "--snapshot-steps", "1", "--unlock-decoder"]
    run = trained(*options, "--max-train-steps", "2")
    last = load_controlnet(run / "controlnet.safetensors", unet).state_dict()
    assert equal(load_controlnet(run / "checkpoints" / "step-2", unet).state_dict(), last)
    losses, told = judged_steps(monkeypatch, capsys, tmp_path, run)
    assert list(losses) == [0, 1, 2] and losses[0] != losses[2]
    assert "trained on these pairs but for the last 0" in told.err  # too few to spare any
    assert "; 2 pairs are too few for a verdict: take 8" in told.out
    run_main(monkeypatch, convergence, "--controlnet", run / "controlnet.safetensors", "--pairs", "2")
    printed = capsys.readouterr().out
    assert printed.startswith(f"2 pairs of {SAMPLE} on cpu") and "its decoder was trained too" in printed
    all_bands = next(line for line in printed.splitlines() if line.lstrip().startswith("all "))
    assert float(all_bands.split()[1]) == losses[2]  # the file and the last checkpoint are the same
    shutil.rmtree(run / "checkpoints")
    assert judged_steps(monkeypatch, capsys, tmp_path, run)[0].keys() == {0, 1, 2}  # snapshots


def test_a_training_of_diffusers(tiny, monkeypatch, capsys, tmp_path):
    for step in (500, 1000):
        save_controlnet(untrained(tiny), tmp_path / f"checkpoint-{step}" / "controlnet", layout="diffusers")
    losses, told = judged_steps(monkeypatch, capsys, tmp_path, tmp_path)
    assert list(losses) == [500, 1000] and "trained on" not in told.err and "its decoder" not in told.out
