import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from standin import SAMPLE, refusal

from data import DRAWN_HELD_OUT, DRAWN_PAIRS, DrawnImages, PairedImages, draw_fill50k, open_pairs
from metrics import is_circle_task, prompt_colours
from support.errors import UserError
from support.hub import fetch_folder


def test_drawing_is_reproducible():
    """That hint, picture and prompt are of one disc, test_metrics.py tells."""
    for index in range(2):
        hint, target, prompt = draw_fill50k(index, 512, seed=3)
        again = draw_fill50k(index, 512, seed=3)
        assert (hint.tobytes(), target.tobytes(), prompt) == (again[0].tobytes(), again[1].tobytes(), again[2])
        assert set(np.unique(hint)) == {0, 255}
        assert draw_fill50k(index, 64, seed=3)[2] == prompt  # the same scene at any size
    assert draw_fill50k(0)[2] != draw_fill50k(1)[2]


def test_reading_the_real_layout():
    pairs = PairedImages(SAMPLE, 128)
    assert len(pairs) == 4 and pairs.prompts[0] == "coral circle with blue background"
    hint, image = pairs.hint(0), pairs.image(0)  # test_metrics.py tells that they belong together
    assert hint.shape == image.shape == (3, 128, 128)
    assert hint.min() == 0
    assert 0.9 < hint.max() <= 1  # the ring, 5 px wide at 512, is hardly more than one here


def test_palettes_show_the_two_colours_of_the_same_pictures(monkeypatch):
    monkeypatch.setitem(DRAWN_PAIRS, "drawn-palette", 5)
    rings, palettes = DrawnImages(5, 64, seed=1), open_pairs("drawn-palette", 64, seed=1, held_out=1)[0]
    assert palettes.prompts == rings.prompts
    for i in range(5):
        assert torch.equal(palettes.image(i), rings.image(i))
        hint, colours = palettes.hint(i), prompt_colours(palettes.prompts[i])
        for stripe, columns in enumerate(hint.split(4, dim=2)):  # sixteen, the shape's colour first
            assert torch.equal(columns, colours[stripe % 2, :, None, None].expand(3, 64, 4).float())
        assert palettes.content(i) != rings.content(i)
    assert not is_circle_task(palettes.hint(0)[None], palettes.prompts[:1])


def test_held_out_pairs_are_not_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DRAWN_PAIRS, "drawn", 5)
    training, held_out = open_pairs("drawn", 64, seed=0, held_out=3)
    assert (len(training), len(held_out)) == (5, 3)
    assert held_out.prompts == DrawnImages(3, 64, DRAWN_HELD_OUT).prompts

    entries = (SAMPLE / "prompt.json").read_text().splitlines() * 10
    shutil.copytree(SAMPLE, tmp_path / "data")
    (tmp_path / "data" / "prompt.json").write_text("\n".join(entries))
    training, held_out = open_pairs(tmp_path / "data", 64, seed=0, held_out=8)
    assert (len(training), len(held_out)) == (36, 4)  # a tenth at most
    assert training.name(35).endswith("line 36") and held_out.name(0).endswith("line 37")
    assert torch.equal(held_out.hint(1), training.hint(1))  # the listing repeats after four lines

    training, held_out = open_pairs(SAMPLE, 64, seed=0, held_out=3)
    assert (len(training), len(held_out)) == (4, 3) and "none is held out" in capsys.readouterr().out


ENTRIES = [json.loads(line) for line in (SAMPLE / "prompt.json").read_text().splitlines()]


def renamed(target, hint, prompt, wrap=str):
    return [dict(zip((target, hint, prompt), (e["target"], e["source"], wrap(e["prompt"])))) for e in ENTRIES]


def lines(entries, end="\n", encoding="utf-8"):
    return "".join(json.dumps(entry) + end for entry in entries).encode(encoding)


def table(entries):
    return "".join(",".join(row) + "\n" for row in (entries[0], *(entry.values() for entry in entries))).encode()


def assert_like_sample(folder):
    ours, expected = PairedImages(folder, 64), PairedImages(SAMPLE, 64)
    assert ours.prompts == expected.prompts
    assert all(torch.equal(ours.hint(i), expected.hint(i)) for i in range(4))
    assert all(torch.equal(ours.image(i), expected.image(i)) for i in range(4))


@pytest.mark.parametrize(
    "name, content, third",
    [
        ("metadata.jsonl", lines(renamed("file_name", "conditioning_image", "text")), "line 3"),
        ("metadata.jsonl", lines(renamed("image_file_name", "conditioning_image_file_name", "caption")), "line 3"),
        ("metadata.jsonl", lines(renamed("image", "conditioning_image", "text", lambda p: [p, "disc"])), "line 3"),
        ("metadata.csv", table(renamed("file_name", "conditioning_image", "text")), "line 4"),
        ("prompt.json", json.dumps(ENTRIES).encode(), "entry 3"),
        ("prompt.json", json.dumps({"data": ENTRIES}, indent=2).encode(), "entry 3"),
        ("prompt.json", lines(ENTRIES, "\r\n", "utf-16"), "line 3"),
        ("prompt.json", lines(ENTRIES, "\r\n\r\n", "utf-8-sig"), "line 5"),
    ],
)
def test_layouts_of_listings(name, content, third, tmp_path):
    shutil.copytree(SAMPLE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "prompt.json").unlink()
    (tmp_path / name).write_bytes(content)
    assert_like_sample(tmp_path)
    assert PairedImages(tmp_path, 64).name(2) == f"{tmp_path / name} {third}"


def test_pairs_by_name(tmp_path):
    """Without a listing: equal names, whatever their endings, and the prompt beside the target."""
    shutil.copytree(SAMPLE, tmp_path, dirs_exist_ok=True)
    (tmp_path / "prompt.json").unlink()
    for i, entry in enumerate(ENTRIES):
        (tmp_path / f"target/{i}.txt").write_text(entry["prompt"] + "\n")
    Image.open(tmp_path / "source/0.png").save(tmp_path / "source/0.bmp")
    (tmp_path / "source/0.png").unlink()
    assert_like_sample(tmp_path)
    (tmp_path / "target/1.txt").unlink()
    (tmp_path / "source/2.png").unlink()
    with pytest.raises(UserError, match="2 of 4 entries") as refused:
        PairedImages(tmp_path, 64)
    assert "target/1.png: no caption: write it into 1.txt" in refused.value.args[1]
    assert "target/2.png: no picture of that name in" in refused.value.args[2]


GOOD = '"target": "a.png", "prompt": ""}'


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("prompt.json", "", "has no entries: add"),
        ("prompt.json", '{"source": "a.png", "target', "line 1: no JSON .* expected"),
        ("prompt.json", '{"source": "a.png", "prompt": ""}', 'line 1: no text under "target"; expected'),
        ("prompt.json", "[" * 100_000, "begins as a JSON array, but is none: correct it"),
        ("prompt.json", '{"source": "é"}', "damaged or no text .*save it again as UTF-8"),
        ("prompt.json", '{"source": "b.png", ' + GOOD, "b.png: no such file; correct the path"),
        ("prompt.json", '{"source": "../a.png", ' + GOOD, "'../a.png' lies outside the folder"),
        ("metadata.csv", "file_name,text\na.png,x\n", 'line 2: no text under "conditioning_image"; expected'),
        ("train/metadata.csv", "", "data has no listing, but .*data/train has one: pass that folder"),
        ("data/train.parquet", "PAR1", "has parquet files: unpack them .*python -c .*load_dataset.'.*/data'"),
        ("a.txt", "", "prompt.json: no such file; .*metadata.jsonl"),
    ],
)
def test_broken_listings(name, content, told, tmp_path):
    (tmp_path / "data" / name).parent.mkdir(parents=True)
    (tmp_path / "data" / name).write_text(content, encoding="latin-1")
    for path in (tmp_path / "data" / "a.png", tmp_path / "a.png"):
        Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(UserError, match=told):
        PairedImages(tmp_path / "data", 64)


def test_links_are_followed(tmp_path):
    """What counts is the path as written, not where links lead: the hub's cache, and folders on another disk.

    One that leads nowhere but to itself is named.
    """
    for folder in ("files/source", "files/target", "folders"):
        (tmp_path / folder).mkdir(parents=True)
    for path in ("source", "target", "prompt.json"):
        (tmp_path / "folders" / path).symlink_to(SAMPLE / path)
    for path in SAMPLE.rglob("*.*"):
        (tmp_path / "files" / path.relative_to(SAMPLE)).symlink_to(path)
    (tmp_path / "itself").symlink_to(SAMPLE)
    for folder in ("files", "folders", "itself"):
        assert_like_sample(tmp_path / folder)
    (tmp_path / "files/source/1.png").unlink()
    (tmp_path / "files/source/1.png").symlink_to("1.png")
    told = refusal(PairedImages, tmp_path / "files", 64)
    assert "line 2: " in told and "source/1.png: no such file" in told


@pytest.mark.parametrize("inside", ["fill50k/", "", "../", "/"])
def test_fill50k_is_fetched_and_unpacked(inside, tmp_path, monkeypatch):
    """Whatever the names in the archive: nothing is written outside the folder."""
    archive = tmp_path / "fill50k.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in SAMPLE.rglob("*.*"):
            file.write(path, f"{inside}{path.relative_to(SAMPLE)}")
    asked = []
    monkeypatch.setattr("support.hub.fetch", lambda repo, file, advice: asked.append((repo, file)) or archive)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        open_pairs("fill50k", 64, seed=0, held_out=1)
        assert asked == [("lllyasviel/ControlNet", "training/fill50k.zip")]  # once: then it is there
    assert_like_sample("fill50k")
    assert [path.name for path in Path().glob("[!.]*")] == ["fill50k"] and len(list(tmp_path.iterdir())) == 2


def test_damaged_zip(tmp_path, monkeypatch):
    (tmp_path / "bad.zip").write_bytes(b"PK" + bytes(100))
    monkeypatch.setattr("support.hub.fetch", lambda *_: tmp_path / "bad.zip")
    assert "bad.zip is damaged" in refusal(fetch_folder, "a/b", "c.zip", tmp_path / "fill50k", "prompt.json", "")
