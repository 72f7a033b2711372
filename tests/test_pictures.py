"""PNGs: samples, previews, and the plot of a training from its log."""

import json
import sys

import pytest
import torch
from PIL import Image

import pictures
from files import UserError
from pictures import contact_sheet, plot_convergence, to_picture


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


def test_to_picture():
    assert to_picture(torch.tensor([[[-1.0]], [[0.0]], [[2.0]]])).getpixel((0, 0)) == (0, 128, 255)


def test_contact_sheet():
    sheet = contact_sheet({"black": -torch.ones(2, 3, 64, 64), "white": torch.ones(2, 3, 64, 64)}, ["one", "two"])
    assert sheet.size == (60 + 2 * 64, 2 * 64 + 64)
    assert sheet.getpixel((60 + 64 + 5, 5)) == (0, 0, 0)
    assert sheet.getpixel((60 + 64 + 5, 64 + 5)) == (255, 255, 255)


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
    monkeypatch.setattr(sys, "argv", ["pictures.py", *map(str, logs), "--output", str(tmp_path / "both.png")])
    pictures.main()
    assert "both.png" in capsys.readouterr().out
    assert (tmp_path / "both.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        pictures.main()
