"""python data.py --from-pictures: a folder of pairs from somebody's own pictures."""

import json
import os
import shutil
import sys

import pytest
import torch
from PIL import Image
from standin import SAMPLE

from data import PairedImages
from support.detect import detector
from support.errors import UserError
from support.pictures import MARGIN, fit_image, open_image
from support.pictures_to_pairs import make_pairs

CAPTIONS = {"a.png": "a disc, coral", "b.jpg": "another disc", "more/a.png": "a third: é"}


@pytest.fixture
def pictures(tmp_path):
    """Three pictures, one in a folder that is a link, and what lies beside them in such folders; no captions yet."""
    folder = tmp_path / "pictures"
    (tmp_path / "disk").mkdir()
    folder.mkdir()
    (folder / "more").symlink_to(tmp_path / "disk")
    for i, name in enumerate(CAPTIONS):
        Image.open(SAMPLE / "target" / f"{i}.png").resize((160, 128)).save(folder / name)
    (folder / "._a.png").write_text("of a Mac")
    (folder / "clip.MP4").write_text("a film")
    (folder / "more" / "back").symlink_to(folder)
    return folder


def write_texts(folder, captions=CAPTIONS, encoding="utf-8"):
    for name, caption in captions.items():
        (folder / name).with_suffix(".txt").write_text(f"{caption}\n", encoding=encoding)


def write_listing(folder, captions=CAPTIONS):
    lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def make(monkeypatch, folder, output, *options):
    line = f"data.py --from-pictures {folder} --output {output} --detect canny --resolution 64"
    monkeypatch.setattr(sys, "argv", [*line.split(), *options])
    make_pairs()


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.png") if path.parent != folder}


@pytest.mark.parametrize("caption", [write_texts, write_listing])
def test_train_reads_the_pairs(caption, pictures, tmp_path, monkeypatch, capsys):
    """Hints by the detector, targets as cut for it, either form of captions, a sheet to look at."""
    caption(pictures)
    make(monkeypatch, pictures, tmp_path / "pairs", "--canny-low", "20")
    assert "3 pairs" in capsys.readouterr().out
    pairs = PairedImages(tmp_path / "pairs", 64)
    assert pairs.prompts == list(CAPTIONS.values())
    for i, name in enumerate(CAPTIONS):
        picture = fit_image(open_image(pictures / name), 64)
        assert (pairs.image(i) - (picture * 2 - 1)).abs().max() < 1e-5
        assert torch.equal(pairs.hint(i), detector("canny", 20)(picture)) and pairs.hint(i).any()
    assert Image.open(tmp_path / "pairs" / "contact-sheet.png").size == (MARGIN + 3 * 64, 2 * 64 + 76)


def test_missing_captions_are_listed_before_anything_is_made(pictures, tmp_path, monkeypatch):
    write_texts(pictures, {"b.jpg": "another disc"}, "utf-16")
    with pytest.raises(UserError, match="2 of 3 entries are broken") as error:
        make(monkeypatch, pictures, tmp_path / "pairs")
    first, second = error.value.args[1:]
    assert "a.png: no caption: write it into a.txt beside it" in first and "more/a.png" in second
    assert not (tmp_path / "pairs").exists()


def test_going_on_after_an_interruption(pictures, tmp_path, monkeypatch):
    """What was made is not made again; what could not be read is, and so is what has changed since."""
    write_texts(pictures)
    whole, output = (pictures / "a.png").read_bytes(), tmp_path / "pairs"
    (pictures / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="pictures/a.png is damaged or no picture"):
        make(monkeypatch, pictures, output)
    made = times(output)
    assert len(made) == 4 and not (output / "prompt.json").exists()
    (output / "source" / "b.jpg.png").unlink()  # as if it had been stopped before this hint, the last of its pair
    (pictures / "a.png").write_bytes(whole)
    (pictures / "a.txt").write_text("a better caption")
    make(monkeypatch, pictures, output)
    assert {path.name for path, time in made.items() if times(output)[path] != time} == {"b.jpg.png"}
    assert PairedImages(output, 64).prompts == ["a better caption", *list(CAPTIONS.values())[1:]]
    made = times(output)
    later = (output / "source" / "b.jpg.png").stat().st_mtime + 1
    os.utime(pictures / "b.jpg", (later, later))
    make(monkeypatch, pictures, output)
    assert {path.name for path, time in times(output).items() if made[path] != time} == {"b.jpg.png"}


def test_what_is_in_the_folder_stays(pictures, tmp_path, monkeypatch):
    write_texts(pictures)
    make(monkeypatch, pictures, tmp_path / "pairs")
    shutil.copytree(SAMPLE, tmp_path / "own")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for folder, detect in (("pairs", "scribble"), ("own", "canny")):
        with pytest.raises(UserError, match=f"{folder} holds other files, or pairs made with other options: choose"):
            make(monkeypatch, pictures, tmp_path / folder, "--detect", detect)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
