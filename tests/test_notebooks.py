"""Every notebook runs from top to bottom, and its committed outputs hold the pictures that it draws."""

import re
import sys

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from standin import ROOT

from controlnet import ControlNet
from unet import UNet

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_all_are_there():
    assert [path.name[0] for path in NOTEBOOKS] == list("123456")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, monkeypatch):
    """Notebook 6 on the miniature instead of Stable Diffusion."""
    monkeypatch.setenv("BASE", "tiny")
    monkeypatch.setenv("CONTROLNET", str(ROOT / "models" / "fill50k" / "controlnet.safetensors"))
    monkeypatch.setenv("HINT", "tests/fill50k/source/0.png")
    notebook = nbformat.read(path, as_version=4)
    committed = pictures(notebook)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    client.execute()  # raises the first error of a cell
    assert pictures(notebook) >= (2 if path.name.startswith("6") else 3)
    assert committed == (0 if path.name.startswith("6") else pictures(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_to_headings(path):
    """The table of contents, as GitHub makes anchors of headings."""
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    kept = str.maketrans("", "", "?!.,:·'()")
    headings = [line.lstrip("# ") for line in text.split("\n") if line.startswith("## ")]
    anchors = {heading.lower().translate(kept).replace(" ", "-") for heading in headings}
    links = [part.split(")")[0] for part in text.split("](#")[1:]]
    assert links and set(links) == anchors


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_to_what_they_name(path):
    """[`Class.function`](../file.py) is to a file that defines both; other links are to files that are there."""
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    for label, target in re.findall(r"\[([^\]]+)\]\((?!#|https?:)([^)#]+)", text):
        file = path.parent / target
        assert file.is_file(), target
        if file.suffix == ".py" and label != f"`{file.name}`":
            for name in label.strip("`").split("."):
                assert re.search(rf"^ *(def|class) {name}\b|^{name}\b.* = ", file.read_text(), re.M), (label, target)


def test_the_architecture_is_drawn_from_the_model(tmp_path):
    """The picture in docs/ has the size that the program draws; another model changes what stands in the boxes."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    try:
        from drawing import draw_architecture, output_sizes
    finally:
        sys.path.pop(0)
    with torch.device("meta"):
        unet = UNet()
        controlnet = ControlNet.from_unet(unet)
    draw_architecture(unet, controlnet, tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn, Image.open(ROOT / "docs" / "architecture.png") as committed:
        assert drawn.size == committed.size
    sizes = output_sizes(unet, controlnet, image_size=768)
    assert sizes[unet.encoder[8]] == sizes[controlnet.encoder[8]] == sizes[controlnet.zero_convs[8]] == "1280 · 24×24"
