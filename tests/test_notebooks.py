"""Every notebook runs from top to bottom, its committed outputs hold the pictures that it draws, its links lead on."""

import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from standin import ROOT

from controlnet import ControlNet
from support.block_table import block_table
from unet import UNet

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ONE_STEP = """
import sys
sys.path.insert(0, "..")
import diffusion
timesteps = diffusion.ddim_timesteps
diffusion.ddim_timesteps = lambda schedule, steps: timesteps(schedule, 1)
"""
SVG = "{http://www.w3.org/2000/svg}"
LAYERS = {
    "ResBlock": "res",
    "resnet1": "res",
    "resnet2": "res",
    "transformer": "attn",
    "downsample": "down",
    "upsample": "up",
}


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def text_of(path: Path) -> str:
    return "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")


def test_all_are_there():
    assert [path.name[0] for path in NOTEBOOKS] == list("123456")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, monkeypatch):
    """From 3 on with one step of DDIM in each sample, for time; 6 on the miniature instead of Stable Diffusion."""
    monkeypatch.setenv("BASE", "tiny")
    monkeypatch.setenv("CONTROLNET", str(ROOT / "models" / "fill50k" / "controlnet.safetensors"))
    monkeypatch.setenv("HINT", "tests/fill50k/source/0.png")
    notebook = nbformat.read(path, as_version=4)
    committed = pictures(notebook)
    if path.name[0] in "3456":
        notebook.cells.insert(0, nbformat.v4.new_code_cell(ONE_STEP))
    client = NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": path.parent}})
    client.execute()  # raises the first error of a cell
    assert pictures(notebook) >= (2 if path.name[0] == "6" else 3)
    assert committed == (0 if path.name[0] == "6" else pictures(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links(path):
    """To headings, as GitHub makes anchors of them; to files; [`Class.function`](../file.py) to one that defines both."""
    text, kept = text_of(path), str.maketrans("", "", "?!.,:·'()")
    headings = [line.removeprefix("## ") for line in text.split("\n") if line.startswith("## ")]
    anchors = {heading.lower().translate(kept).replace(" ", "-") for heading in headings}
    assert anchors and anchors == set(re.findall(r"\]\(#([^)]+)\)", text))
    for label, target in re.findall(r"\[([^\]]+)\]\((?!#|https?:)([^)#]+)", text):
        file = path.parent / target
        assert file.is_file(), target
        if file.suffix == ".py" and label != f"`{file.name}`":
            for name in label.strip("`").split("."):
                assert re.search(rf"^ *(def|class) {name}\b|^{name}\b.* = ", file.read_text(), re.M), (label, target)


def test_the_architecture_is_the_models():
    """docs/architecture.svg has each block's layers, channels and resolution, what is concatenated, and zero convs."""
    drawing = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
    boxes = {group.get("id"): [text.text for text in group.iter(f"{SVG}text")] for group in drawing.iter(f"{SVG}g")}
    with torch.device("meta"):
        unet = UNet()
        controlnet = ControlNet.from_unet(unet)
        sizes, h = [], torch.empty(1, 3, 512, 512)
        for layer in controlnet.hint_encoder:
            h = layer(h)
            sizes.append("{1} · {2}×{3}".format(*h.shape))
    blocks = {}
    for name, layers, channels, side, _ in block_table(unet):
        part, _, number = name.partition(" ")
        size = f"{channels} · {side}×{side}"
        if part == "decoder":
            both, skip = (
                unet.decoder[int(number)].resnet.conv1.in_channels,
                controlnet.zero_convs[11 - int(number)].in_channels,
            )
            size = f"[{both - skip}, {skip}] → {size}"
        shown = " + ".join(LAYERS.get(layer, layer) for layer in layers.split(" + "))
        blocks[name.replace(" ", "-")] = [number] * bool(number) + [shown, size]
        if part != "decoder":
            blocks["copy-" + (number or part)] = blocks[name.replace(" ", "-")]
    assert {name: boxes.get(name) for name in blocks} == blocks and len(blocks) == 25 + 13
    assert boxes["hint-encoder"] == ["hint encoder", sizes[-3]]
    assert [text.text for text in drawing.iter(f"{SVG}text") if text.get("id") == "condition"] == sizes[-1:]
    zero_convs = [use for use in drawing.iter(f"{SVG}use") if use.get("href") == "#zero"]
    assert len(zero_convs) == len(controlnet.zero_convs) + 2 + 1  # the middle's, the hint encoder's; one in the legend
