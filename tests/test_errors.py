"""Users' mistakes: each ends in one line on stderr that says what, where and what to do, with exit status 2."""

import argparse
import errno
import importlib
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import support.command
from support.command import run_command_line

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from standin import ROOT, HostilePickle, equal

from controlnet import ControlNet
from data import PairedImages
from support import options
from support.errors import UserError, reading
from support.files import read_tensors
from support.hub import locate
from weights import save_controlnet

TRAP = ROOT / "tests" / "trap"  # made if a pickle is opened


@pytest.fixture(scope="module")
def place(tmp_path_factory, nano, unet):
    """A folder with what can be wrong with a command's files."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, size in (("a.png", (64, 64)), ("wide.png", (128, 64))):
        Image.new("RGB", size).save(folder / name)
    (folder / "a_file").write_text("")
    (folder / "cut.safetensors").write_bytes(nano.read_bytes()[:100_000])
    for copy in ("full", "lite"):
        save_controlnet(ControlNet.from_unet(unet, (4, 4, 4, 4), copy=copy), folder / f"{copy}.safetensors")
    return folder


# command ({} is the folder above, NANO a base) -> what the line has to say: cause or place, and remedy
CONTROL, TWO = "--base NANO --controlnet {}/full.safetensors --hint {}/a.png", "--controlnet {}/full.safetensors --hint"
MISTAKES = {
    "train --max-train-steps 0": "--max-train-steps 0: must be .* above 0 .*train.py --help",
    "train --device cuda:77": "--device cuda:77 is not there .* take cpu",
    f"train --output-dir {'a' * 300}": "too long.* choose another --output-dir",
    "train --base {}/nowhere.safetensors": "nowhere.safetensors: no such file",
    "train --base {}/cut.safetensors": "cut.safetensors is damaged.* fetch it again",
    "sample --controlnet x": "1 --controlnet but 0 --hint: each needs its own",
    "sample --output out.jpg": "--output out.jpg: must end in .png",
    "sample --base NANO --output {}/a_file/out.png --resolution 64": "a_file .*choose another folder",
    "sample --control-start 0.6 --control-end 0.4": "--control-start 0.6 is after --control-end 0.4: swap",
    f"sample {CONTROL} {TWO} {{}}/wide.png": "different shapes.* crop them alike",
    "data --from-pictures {}/pictures --output {}/out": "--detect canny or scribble.* its own target",
    "data --from-pictures {}/nowhere --detect canny --output {}/out": "nowhere has no pictures: .*PNG",
    "tools.convert {}/lite.safetensors {}/out --layout diffusers": "lite.safetensors.* ControlNet-lite",
    "convergence --controlnet {}/full.safetensors --pairs 1": "--pairs 1: .* above 1",
    "tools.verify --base NANO --controlnet {}/lite.safetensors": "no other program can read .*a ControlNet-lite",
}


def one_line(capsys, main, *less_memory) -> str:
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        run_command_line(main, *less_memory)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.mark.parametrize("line", MISTAKES)
def test_one_line(line, place, nano, tmp_path, monkeypatch, capsys):
    program, *arguments = [word.replace("{}", str(place)).replace("NANO", str(nano)) for word in line.split()]
    monkeypatch.chdir(tmp_path)
    for fetching in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, fetching, None)  # nothing is asked of the network
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *arguments])
    module = importlib.import_module(program)
    assert re.search(MISTAKES[line], one_line(capsys, getattr(module, "main", None) or module.make_pairs))
    assert not list(tmp_path.rglob("*.json*"))  # nothing was begun


@pytest.mark.parametrize(
    "accepts, good, bad, told",
    [
        (options.positive_int, "3", ["0", "-1", "two", "1.5"], "above 0"),
        (options.seed, "4294967294", ["-1", "4294967295"], "below 2^32 - 1"),
        (options.positive_float, "1e-05", ["0", "-1", "nan", "inf"], "above 0"),
        (options.fraction, "1.0", ["-0.1", "1.5", "nan"], "from 0 to 1"),
        (options.side, "128", ["100", "0", "63", "-64"], "a multiple of 64"),
    ],
)
def test_types_of_options(accepts, good, bad, told):
    assert str(accepts(good)) == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text}: .*{re.escape(told)}"):
            accepts(text)


@pytest.mark.parametrize("ending", ["> /dev/full 2>&1", "2>&1 | true", "> ascii.txt"])
def test_nobody_reads_the_output(ending, tmp_path):
    """Or a terminal that knows ASCII alone does: the work goes on."""
    (tmp_path / "work.py").write_text(
        "import sys; from tqdm import tqdm; from support.command import run_command_line\n"
        "run_command_line(lambda: [print('β', i) for i in tqdm(range(9999))] and open('done', 'w'))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    line = ["bash", "-o", "pipefail", "-c", f"{sys.executable} work.py {ending}"]
    assert subprocess.run(line, cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "done").exists()
    assert "ascii" not in ending or (tmp_path / "ascii.txt").read_text().endswith("\\u03b2 9998\n")


def raising(error: Exception):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, told",
    [
        (OSError(errno.ENOSPC, "No space left", "some/file"), "some/file: no space left; correct the path"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "): try a smaller --size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "--num-workers 0"),
    ],
)
def test_what_the_machine_refuses(error, told, capsys):
    """No room, no rights, no memory: one line that says where and what to do, from anywhere."""
    assert told in one_line(capsys, raising(error), "a smaller --size")


def test_a_bug_keeps_its_traceback():
    for error in (RuntimeError("a bug"), TypeError("a bug")):
        with pytest.raises(type(error), match="a bug"):
            run_command_line(raising(error))
    with pytest.raises(TypeError, match="a bug"), reading("a.file", "file"):
        raise TypeError("a bug")


def test_processes_without_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert "torchrun" in one_line(capsys, importlib.import_module("train").main)


def test_many_broken_entries(tmp_path, capsys):
    """The first twenty and their number, each on its line."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    good = json.dumps({"source": "a.png", "target": "a.png", "prompt": ""})
    (tmp_path / "prompt.json").write_text("\n".join([good] * 3 + ["{"] * 25 + [good]))
    with pytest.raises(SystemExit):
        run_command_line(lambda: PairedImages(tmp_path, 64))
    *details, last = capsys.readouterr().err.strip().splitlines()
    assert [f"prompt.json line {i}:" in line for i, line in enumerate(details, start=4)] == [True] * 20
    assert "25 of 29 entries are broken" in last


def test_what_is_local_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for path in ("runs/nosuch", "folder/nosuch", "./owner/repo", "../nosuch", "owner/a.safetensors", "nosuch"):
        assert str(locate(path, [], "")) == path.removeprefix("./")


def test_a_file_is_what_its_first_bytes_say(nano, tmp_path):
    """A safetensors file or a pickle, whatever its ending; tensors in the parts where trainers keep them."""
    tensors, metadata = read_tensors(nano)
    shutil.copy(nano, tmp_path / "a.ckpt")
    read, about = read_tensors(tmp_path / "a.ckpt")
    assert read.keys() == tensors.keys() and about == metadata
    some = {name: tensors[name] for name in list(tensors)[:3]}
    contents = some, {"state_dict": some, "step": 1}, {"module": some}, {"model": some | {5: torch.ones(1)}}
    for content, zipped in itertools.product(contents, (True, False)):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        read, about = read_tensors(tmp_path / "a.pt")
        assert equal(read, some) and about == {}


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "no file of weights"),
        (save({"a": torch.ones(3)}) + bytes(7), "is longer or shorter than its header says"),
        (save({"a": torch.ones(3)})[:-5], "is longer or shorter than its header says"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer.* git lfs pull"),
        (b"\n<!DOCTYPE html>", "a web page.* download the file itself"),
        ([1, 2], "no named tensors: pass a checkpoint"),
        ({"settings": {"weight": torch.ones(1)}}, "no named tensors: save its part 'settings' alone"),
        ({"weight": torch.ones(1), "callbacks": HostilePickle(TRAP)}, "more than tensors.* its .safetensors version"),
        (pickle.dumps(HostilePickle(TRAP), protocol=2), "more than tensors.* its .safetensors version"),
    ],
)
def test_files_without_weights(content, told, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=f"a.ckpt.* {told}"):
        read_tensors(path)
    with pytest.raises(UserError, match="b.safetensors "):  # by which name PyTorch takes another reader
        read_tensors(path.rename(tmp_path / "b.safetensors"))
    assert not TRAP.exists()  # no pickle ran


def test_waiting_threads_do_not_spin_for_long(monkeypatch):
    """Unless the user has chosen. (ruff's isort has every command import it first, before torch loads OpenMP.)"""
    for given, expected in ((None, "1000"), ("active", None)):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        monkeypatch.setenv("OMP_WAIT_POLICY", given) if given else monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        importlib.reload(support.command)
        assert os.environ.get("GOMP_SPINCOUNT") == expected
