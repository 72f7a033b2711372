"""The notebooks run; their pictures; the trainings behind them, on a nano base."""

import json
import sys
from dataclasses import replace
from functools import partial
from unittest.mock import patch
from xml.etree import ElementTree

import nbformat
import pytest
import torch
from jupyter_client import KernelManager
from nbclient import NotebookClient
from PIL import Image
from standin import ROOT, run_main

import data
import train
from controlnet import ControlNet
from stable_diffusion import TINY, StableDiffusion
from support.block_table import block_table
from support.files import read_log
from unet import UNet

sys.path.insert(0, str(ROOT / "notebooks"))
import experiments
import pictures
import scores

NOTEBOOKS = pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
QUICK = """%reset -f
import sys
sys.path.insert(0, "..")
import sample, stable_diffusion
sample.ddim = lambda eps_fn, z_T, *rest, **options: z_T
def decode_latents(sd, z): return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(-1, 1)
stable_diffusion.StableDiffusion.decode_latents = decode_latents
"""
SVG = "{http://www.w3.org/2000/svg}"
TRAININGS = {name: training for group in experiments.TABLE.values() for name, training in group.items()}


@pytest.fixture(scope="module")
def kernel():
    """One process for all notebooks, which imports everything once. The last notebook is on the miniature."""
    files = {"CONTROLNET": ROOT / "models" / "fill50k" / "controlnet.safetensors", "HINT": "tests/fill50k/source/0.png"}
    with pytest.MonkeyPatch.context() as context:
        for name, value in ({"BASE": "tiny"} | files).items():
            context.setenv(name, str(value))
        manager = KernelManager(kernel_name="python3")
        manager.start_kernel(cwd=ROOT / "notebooks")
    yield manager
    manager.shutdown_kernel(now=True)


@NOTEBOOKS
def test_runs_from_top_to_bottom(path, kernel):
    """It draws what is committed. From 3 on samples are noise, for time."""
    notebook = nbformat.read(path, as_version=4)

    def shown() -> int:
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        return sum("image/png" in output.get("data", {}) for output in outputs)

    committed = shown()
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUICK if path.name >= "3" else "%reset -f"))
    NotebookClient(notebook, km=kernel, timeout=3600).execute()  # raises errors
    assert shown() >= 2 and committed == (0 if path.name >= "6" else shown())


def test_the_architecture_is_the_models():
    """docs/architecture.svg: each block's channels and resolution; what the decoder concatenates; zero convolutions."""
    drawing = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
    said = {
        box.get("id"): text.text for box in drawing.iter(f"{SVG}g") for text in box.findall(f"{SVG}text[@class='end']")
    }
    with torch.device("meta"):
        unet = UNet()
        controlnet = ControlNet.from_unet(unet)
    for name, _, channels, side, _ in block_table(unet):
        size, (part, _, i) = f"{channels} · {side}×{side}", name.partition(" ")
        if part == "decoder":
            skip = controlnet.zero_convs[11 - int(i)].in_channels
            below = unet.decoder[int(i)].resnet.conv1.in_channels - skip
            assert said[f"decoder-{i}"] == f"[{below}, {skip}] → {size}"
        else:
            assert said[name.replace(" ", "-")] == said[f"copy-{i or part}"] == size
    u = controlnet.hint_encoder[-1]
    assert said["hint-encoder"] == f"{u.in_channels} · 64×64" and said["encoder-0"] == f"{u.out_channels} · 64×64"
    zero_convs = drawing.findall(f"{SVG}use[@href='#zero']")
    assert len(zero_convs) == len(controlnet.zero_convs) + 2 + 1  # the middle's and the hint encoder's; in the legend


def test_the_table(monkeypatch):
    """Its options are train.py's; it changes training hints, and the features before u."""
    for training in TRAININGS.values():
        monkeypatch.setattr(sys, "argv", ["train.py", *f"{experiments.ALWAYS} {training.options}".split()])
        train.parse_arguments()
    assert len(TRAININGS) == sum(map(len, experiments.TABLE.values()))  # each has a folder of its own

    monkeypatch.setitem(data.DRAWN_PAIRS, "drawn", 4)
    opened = ("drawn", 64, 0, 4)
    plain, held_out = data.open_pairs(*opened)
    for name, hint in ("shuffled", plain.hint(3)), ("inverted", 1 - plain.hint(2)), ("black", 0 * plain.hint(2)):
        with TRAININGS[name].change():
            pairs, others = train.open_pairs(*opened)
        assert torch.equal(pairs.hint(2), hint) and torch.equal(others.hint(2), held_out.hint(2))

    hints, s = torch.stack([plain.hint(i) for i in range(4)]), {}
    for name in ("features-0.25", "seed", "features-4"):
        torch.manual_seed(0)
        with TRAININGS[name].change():
            s[name] = experiments.factors(ControlNet.from_unet(UNet(TINY.unet), TINY.hint_channels), hints)["s"]
    assert s["features-4"] == 4 * s["seed"] == 16 * s["features-0.25"] > 0  # powers of two: nothing is rounded


def test_the_runner(nano, tmp_path, monkeypatch):
    """A small default training and its scores; then it is complete, and neither trained nor sampled again."""
    for folder in ("RUNS", "LOGS", "DOCS"):
        monkeypatch.setattr(scores, folder, tmp_path / folder)
    sd = StableDiffusion.load(nano).requires_grad_(False)
    monkeypatch.setattr(scores, "base", lambda: sd)
    monkeypatch.setattr(scores, "TINY", replace(TINY, resolution=64))
    monkeypatch.setattr(scores, "sample_fast", partial(scores.sample, steps=1))
    monkeypatch.setattr(scores, "HELD_OUT", (pictures.COLUMNS, data.DRAWN_HELD_OUT))
    monkeypatch.setattr(scores, "FRESH", (2, 1))
    monkeypatch.setattr(experiments, "STEPS", 12)
    options = f"--base {nano} --resolution 64 --train-batch-size 2 --validation-steps 0 --snapshot-steps 1"
    training = experiments.Training(options, 1, 12, partial(patch.dict, data.DRAWN_PAIRS, drawn=4))
    monkeypatch.setitem(experiments.TABLE, "seeds", {"seed": training})
    scores.LOGS.mkdir()
    run_main(monkeypatch, experiments, "seeds")
    log = read_log(scores.LOGS / "seed-0.jsonl")
    assert [entry["step"] for entry in log if "hint_sensitivity" in entry] == [5, 10]
    assert all(log[9][factor] > 0 for factor in "suv")
    followed = [(entry["step"], len(entry["ious"])) for entry in log if "followed" in entry]
    assert followed == [(i, 6) for i in range(6, 13)]
    rows = [json.loads(line) for line in (scores.LOGS / "scores-seeds.jsonl").read_text().splitlines()]
    assert len(rows[0]["fresh"]["iou"]) == 2 and [len(row["loss"]["own"]) for row in rows[1:]] == [8, 8, 8]
    maps = [row["maps"] for row in read_log(scores.LOGS / "residuals.jsonl")]
    assert [[len(hints_part) for _, hints_part in row] for row in maps] == 3 * [[8] * 3 + [4] * 3 + [2] * 3 + [1] * 4]
    with Image.open(scores.DOCS / "jump.webp") as animation, Image.open(scores.DOCS / "jump.png") as sheet:
        assert (animation.n_frames, animation.info["loop"], sheet.width) == (8, 0, 840)

    rows = scores.score_ablation([("seed", 0, None)])
    assert [row["prompt"] for row in rows] == ["none", "insufficient", "conflicting", "perfect"]
    assert ["colour_error" in row for row in rows] == [False, False, True, True]
    samples, judged = scores.score_failures([("seed", 0, None)])
    assert samples["prompt"] == "none" and judged["verdict"] and len(judged["gap"]) == 2
    for picture in ("ablation", "failures", "failure-curves"):
        assert (scores.DOCS / f"{picture}.png").exists()
    monkeypatch.setattr(train, "main", None)
    monkeypatch.setattr(scores, "load_controlnet", None)
    experiments.run("seed", training, 0)
    assert scores.follow("seed", 0, [6, 12])[12] == log[-1]["ious"]


def test_flips():
    """Of three hints the first jumps within two steps, the second is followed from the start, the third never is."""
    ious = {0: [0.2, 0.8, 0.3], 50: [0.25, 0.8, 0.3], 51: [0.29, 0.9, 0.3], 52: [0.5, 0.9, 0.6], 53: [0.7, 0.9, 0.69]}
    assert scores.flips(ious) == [(51, 53)]
