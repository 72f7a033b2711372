"""What a log tells of sudden convergence, and its plot."""

import json
import sys
from statistics import fmean, median

import pytest
import torch
from PIL import Image
from standin import ROOT

from controlnet import ControlNet, Denoiser
from convergence import LEAD, HeldOut, forecast, growth_step, hint_response, jump_step, milestones, plot_convergence
from data import DrawnImages
from stable_diffusion import StableDiffusion
from support.errors import UserError
from support.log import read_log
from tools import plot


def test_hint_response():
    eps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert hint_response(eps, eps, eps) == (0, 0)
    assert hint_response(eps, eps + 0.5, eps) == pytest.approx((0.5, 0.25), rel=1e-6)
    assert hint_response(eps + 0.5, eps, eps) == pytest.approx((0.5, -0.25), rel=1e-6)  # the wrong hint is better
    # float32 would lose a gap of 1e-10 beside a loss of 1
    sensitivity, gap = hint_response(eps + 1, eps + 1 + 2**-20, eps)
    assert sensitivity == pytest.approx(2**-20, rel=0.1)
    assert gap == pytest.approx(2**-19, rel=0.1)


class TwoCaptions(DrawnImages):
    """Two pairs for each hint."""

    def hint(self, index):
        return super().hint(index // 2 * 2)


def test_the_other_hint_is_another_hint(tmp_path):
    sd = StableDiffusion.load("tiny").requires_grad_(False)
    held_out = HeldOut(sd, TwoCaptions(6, 64), 0, tmp_path, previews=False)
    assert all((own != other).any() for own, other in zip(held_out.own, held_out.other, strict=True))
    denoiser = Denoiser(sd.unet, ControlNet.from_unet(sd.unet, sd.preset.hint_channels))
    assert held_out.response(denoiser)["hint_sensitivity"] == 0
    assert HeldOut(sd, TwoCaptions(2, 64), 0, tmp_path, previews=False).response(denoiser) == {}


def measured(*sensitivities, gap=0.0):
    return [
        {"step": 10 * i, "hint_sensitivity": s, "hint_gap": gap, "heldout_loss": 0.02}
        for i, s in enumerate(sensitivities)
    ]


def test_growth_is_told_from_noise():
    noise = [0.0, 2e-7, 1.7e-6, 5e-7, 9e-7, 1.5e-6, 4e-7]
    assert growth_step(measured(*noise)) is None
    assert growth_step(measured(*noise, 6e-7, 1e-6, 1.6e-6, 2.8e-6, 5e-6, 9e-6)) == 120
    assert growth_step(measured(1e-5, 4e-5, 2e-4, 9e-4)) is None
    assert growth_step(measured(1e-5, 4e-5, 2e-4, 9e-4, 4e-3)) == 40
    assert growth_step(measured(2e-7, 2.3e-7, 3.6e-7, 2.5e-6, 5e-7, 4e-7, 4e-7)) is None  # a spike
    assert growth_step(measured(1e-5, 1.1e-5, 1.2e-5, 1.3e-5)) is None
    assert growth_step([{"step": 1, "loss": 0.1}]) is None


def test_jump_is_half_of_the_loss_in_three_measurements():
    gaps = [0.0, 0.02, 0.0, 0.001, 0.01, 0.009, 0.011, 0.02]  # a single high one is none
    entries = [entry | {"hint_gap": gap} for entry, gap in zip(measured(*[1e-2] * 8), gaps, strict=True)]
    assert jump_step(entries) == 60
    assert jump_step(entries[:6]) is None
    assert jump_step([{"step": 1, "loss": 0.1}, *entries[3:]]) == 60


def test_forecast_waits_for_a_tenth_of_the_level():
    """With a loss of 0.02 samples follow at a sensitivity of 0.1: the forecast comes at 0.01, in three measurements."""
    rising = measured(1e-4, 1e-3, 5e-3, 8e-3, 1.1e-2, 1.3e-2, 3e-2)
    assert forecast(rising[:5]) is None
    assert forecast(rising[:6]) == forecast(rising) == (50, 80)
    assert forecast(measured(1e-4, 1e-4, 2.5e-2, 1e-4)) is None  # a spike
    assert forecast([]) is None


def test_what_is_said_when():
    entries = measured(1e-4, 1e-4, 1e-4, 5e-3, 1e-2, 2e-2, 5e-2)
    assert milestones(entries[:4]) == milestones(entries[:5]) == []
    assert milestones(entries[:6]) == [
        "step 50: the hint sensitivity is growing: 2.0e-02",
        "step 50: samples begin to follow their hints at about step 80, give or take a third",
    ]
    assert milestones(entries) == milestones([]) == []


def test_forecast_error():
    """Ten seeds with batches of 8, which LEAD is fitted on: each jump, from a factor fitted on the other nine.

    And the five default trainings, which it is not fitted on. The figures are those of docs/convergence.md.
    """
    found = {}
    for path in sorted((ROOT / "docs" / "logs").glob("forecast-*.jsonl")):
        entries = read_log(path)
        found[path.stem] = (forecast(entries)[0], jump_step(entries))
    assert len(found) == 10
    factors = {name: jump / early for name, (early, jump) in found.items()}
    errors = [
        abs(median(other for key, other in factors.items() if key != name) / factor - 1)
        for name, factor in factors.items()
    ]
    assert fmean(errors) == pytest.approx(0.158, abs=0.001) and max(errors) == pytest.approx(0.275, abs=0.001)
    assert median(factors.values()) == pytest.approx(LEAD, abs=0.02)
    defaults = [read_log(ROOT / "docs" / "logs" / f"seed-{seed}.jsonl") for seed in range(5)]
    errors = [abs(forecast(entries)[1] / jump_step(entries) - 1) for entries in defaults]
    assert min(errors) == pytest.approx(0.015, abs=0.001) and max(errors) == pytest.approx(0.252, abs=0.001)


def history(steps, iou_every):
    entries = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": 0.03 - 1e-5 * step, "lr": 5e-4, "seconds": step}
        if step % 10 == 0:
            entry |= {"hint_sensitivity": 1e-6 * 1.5 ** (step / 10), "hint_gap": 1e-4 * step, "heldout_loss": 0.02}
        if step % iou_every == 0:
            entry |= {"iou": step / steps, "base_iou": 0.2}
        entries.append(entry)
    return entries


def test_plot_has_a_panel_for_what_was_logged(tmp_path):
    plot_convergence({"run": history(100, 20)}, tmp_path / "whole.png")
    plot_convergence({"run": [{"step": 1, "loss": 0.1}]}, tmp_path / "loss.png")
    with Image.open(tmp_path / "whole.png") as whole, Image.open(tmp_path / "loss.png") as loss:
        assert whole.width == loss.width
        assert whole.height > 3 * loss.height


def test_command_line(tmp_path, monkeypatch, capsys):
    logs = []
    for name in ("default", "he"):
        (tmp_path / name).mkdir()
        logs.append(tmp_path / name / "log.jsonl")
        logs[-1].write_text("".join(json.dumps(entry) + "\n" for entry in history(60, 20)))
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, logs), "--output", str(tmp_path / "both.png")])
    plot.main()
    assert "both.png" in capsys.readouterr().out
    assert (tmp_path / "both.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        plot.main()
    (tmp_path / "notes.txt").write_text("no log\n")
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "notes.txt")])
    with pytest.raises(UserError, match="notes.txt has no entries"):
        plot.main()


def test_plotting_logs_of_different_runs(tmp_path):
    """One log without previews, one that starts in the middle, one with nothing measured."""
    logs = {"whole": history(60, 20), "no previews": history(60, 100), "later": history(60, 20)[25:]}
    plot_convergence(logs | {"empty": []}, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").height > 500
    plot_convergence({"empty": []}, tmp_path / "nothing.png")
