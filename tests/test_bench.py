"""The benchmark compares equal work, and its command runs. No test looks at a time."""

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import torch
from standin import run_main
from torch.utils.flop_counter import FlopCounterMode

from stable_diffusion import TINY
from tools import bench, versus_diffusers


def test_both_sides_do_the_same_work():
    """A training step has as many multiplications in convolutions, products of matrices and attention, both ways."""
    ids = torch.full((2, 77), TINY.text.vocab_size - 1)
    args = Namespace(work="train", preset=TINY, precision="fp32", batch_size=2, resolution=64, ids=ids)
    counted = []
    for side in (bench, versus_diffusers):
        step = side.training(args, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            step(lambda part: None)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 1e9


def test_command_line(monkeypatch, capsys):
    """In this process, where it takes one for each measurement."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    run_main(monkeypatch, bench, "tiny", "--steps", "1", "--rounds", "1", "--resolution", "64", "--batch-size", "1")
    lines = capsys.readouterr().out.splitlines()
    parts = {line.split(",")[0].strip() for line in lines if ", s, mean " in line}
    assert parts == {"encode", "forward", "backward", "optimizer"}
    assert lines[-1].startswith("ratio time ") and ", memory " in lines[-1]
