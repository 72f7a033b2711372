"""Users' mistakes: each ends in one line on stderr that says what, where and what to do, with exit status 2."""

import argparse
import ast
import contextlib
import errno
import importlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import stat
import subprocess
import sys

import support.command
from support.command import run_command_line

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from standin import ROOT, SAMPLE, HostilePickle

from controlnet import ControlNet
from data import PairedImages
from stable_diffusion import StableDiffusion
from support import options
from support.devices import usable_cpus
from support.errors import UserError, reading, warn
from support.files import read_json, read_tensors, save_json
from support.hub import locate
from support.pictures import fit_image, open_image
from weights import load_controlnet, save_controlnet

HINT = SAMPLE / "source" / "0.png"
TRAP = ROOT / "tests" / "trap"  # made if a pickle is opened
LONG = "a" * 300
GOOD = {"source": "a.png", "target": "a.png", "prompt": ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory, nano):
    """A folder with what can be wrong with a command's files."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, size in (("a.png", (64, 64)), ("wide.png", (128, 64))):
        Image.new("RGB", size).save(folder / name)
    (folder / "cut.png").write_bytes(HINT.read_bytes()[:500])
    for name in ("cut", "wide"):
        (folder / name).mkdir()
        for picture in ("a", name):
            shutil.copy(folder / f"{picture}.png", folder / name)
        (folder / name / "prompt.json").write_text(json.dumps(GOOD | {"target": f"{name}.png"}))
    for name in ("run", "nothing"):
        (folder / name).mkdir()
    for name in ("run/log.jsonl", "a_file"):
        (folder / name).write_text("")
    (folder / "cut.safetensors").write_bytes(nano.read_bytes()[:100_000])
    unet = StableDiffusion.load(nano).unet
    for copy in ("full", "lite"):
        save_controlnet(ControlNet.from_unet(unet, (4, 4, 4, 4), copy=copy), folder / f"{copy}.safetensors")
    return folder


# command ({} is the folder above, NANO a base) -> what the line has to say: cause or place, and remedy
CONTROL, TWO = "--base NANO --controlnet {}/full.safetensors --hint {}/a.png", "--controlnet {}/full.safetensors --hint"
MISTAKES = {
    "train --max-train-steps 0": "--max-train-steps 0: must be .* above 0 .*train.py --help",
    "train --device cuda:77": "--device cuda:77 is not there .* take cpu",
    "train --resume-from-checkpoint latest": "has no checkpoint.* leave --resume-from-checkpoint out",
    "train --output-dir {}/run": "run holds a run already.*--resume-from-checkpoint latest",
    "train --output-dir {}/a_file/out": "a_file/out.* choose another --output-dir",
    f"train --output-dir {LONG}": "too long.* choose another --output-dir",
    "train --base {}/nowhere.safetensors": "nowhere.safetensors: no such file",
    "train --base {}/cut.safetensors": "cut.safetensors is damaged.* fetch it again",
    "train --base NANO --data {}/nowhere": "nowhere/prompt.json: no such file.*metadata.jsonl",
    "train --base NANO --data {}/cut": "prompt.json line 1: .*cut.png is damaged or no picture .* save it again",
    "train --base NANO --data {}/wide": "prompt.json line 1: .*64x64.*128x64; crop them alike",
    "sample --controlnet x": "1 --controlnet but 0 --hint: each needs its own",
    "sample --controlnet x --hint {}/a.png --strength 1 --strength 2": "2 --strength, 1 --controlnet: give one",
    "sample --output out.jpg": "--output out.jpg: must end in .png",
    "sample --base NANO --output {}/a_file/out.png --resolution 64": "a_file .*choose another folder",
    "sample --base NANO --vae {}/nowhere.safetensors": "nowhere.safetensors: no such file",
    "sample --control-start 0.6 --control-end 0.4": "--control-start 0.6 is after --control-end 0.4: swap",
    "sample --base NANO --controlnet runs/nowhere --hint {}/a.png": "runs/nowhere: no such file",
    "sample --base NANO --controlnet NANO --hint {}/a.png": "a base model, not a ControlNet: pass it as the base",
    "sample --base NANO --controlnet {}/nothing --hint {}/a.png": "nothing: no diffusion_pytorch_model.*; pass",
    f"sample {CONTROL} {TWO} {{}}/wide.png": "different shapes.* crop them alike",
    "data --from-pictures {}/run --output {}/out": "--detect canny or scribble.* its own target",
    "data --from-pictures {}/nowhere --detect canny --output {}/out": "nowhere has no pictures: .*PNG",
    "data --from-pictures {} --detect canny --output {}/out": "out lies in .*outside",
    "tools.convert {}/full.safetensors {}/out.bin --layout official": "out.bin.*.safetensors",
    "tools.convert {}/lite.safetensors {}/out --layout diffusers": "lite.safetensors.* ControlNet-lite",
    "convergence --controlnet {}/full.safetensors --pairs 1": "--pairs 1: .* above 1",
    "tools.verify --base {}/nowhere.safetensors": "nowhere.safetensors: no such file",
    "tools.pretrain vea": "'vea'.*vae",
}


def command(line: str, place, nano) -> list[str]:
    return [word.replace("{}", str(place)).replace("NANO", str(nano)) for word in line.split()]


def one_line(capsys, main, *less_memory) -> str:
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        run_command_line(main, *less_memory)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.mark.parametrize("line", MISTAKES)
def test_one_line(line, place, nano, tmp_path, monkeypatch, capsys):
    program, *arguments = command(line, place, nano)
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
        (options.count_or_zero, "0", ["-1", "x"], "0 or more"),
        (options.seed, "4294967294", ["-1", "4294967295"], "below 2^32 - 1"),
        (options.port, "65535", ["0", "65536"], "from 1 to 65535"),
        (options.positive_float, "1e-05", ["0", "-1", "nan", "inf"], "above 0"),
        (options.finite_float, "-2.5", ["nan", "inf", "x"], "a finite number"),
        (options.fraction, "1.0", ["-0.1", "1.5", "nan"], "from 0 to 1"),
        (options.side, "128", ["100", "0", "63", "-64"], "a multiple of 64"),
        (options.png, "a.png", ["a.jpg"], "must end in .png"),
    ],
)
def test_types_of_options(accepts, good, bad, told):
    assert str(accepts(good)) == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text}: .*{re.escape(told)}"):
            accepts(text)


@pytest.mark.parametrize("ending", ["> /dev/full 2>&1", "2>&1 | true", ">&- 2>&-", "> ascii.txt"])
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
        (
            OSError(errno.ENOSPC, "No space left", "some/file"),
            "some/file: no space left; correct the path",
        ),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "): try a smaller --size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("could not create a primitive"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "--num-workers 0"),
    ],
)
def test_what_the_machine_refuses(error, told, capsys):
    """No room, no rights, no memory: one line that says where and what to do, from anywhere."""
    assert told in one_line(capsys, raising(error), "a smaller --size")


def test_compiling_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "none"),))
    told = one_line(capsys, lambda: torch.compile(lambda x: x.sin() + 1)(torch.ones(8)))
    assert told.startswith("--compile does not work here (InvalidCxxCompiler: No working C++ compiler")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), AttributeError("a bug"), TypeError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        run_command_line(raising(error))
    if not isinstance(error, RuntimeError):  # which readers raise
        with pytest.raises(type(error), match="a bug"), reading("a.file", "file"):
            raise error


def test_processes_without_torchrun(nano, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train.py", "--base", str(nano)])
    assert "torchrun" in one_line(capsys, importlib.import_module("train").main)


def test_many_broken_entries(tmp_path, capsys):
    """The first twenty and their number, each on its line."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    lines = [json.dumps(GOOD)] * 3 + ["{"] * 25 + [json.dumps(GOOD)]
    (tmp_path / "prompt.json").write_text("\n".join(lines))
    with pytest.raises(SystemExit):
        run_command_line(lambda: PairedImages(tmp_path, 64))
    *details, last = capsys.readouterr().err.strip().splitlines()
    assert [f"prompt.json line {i}:" in line for i, line in enumerate(details, start=4)] == [True] * 20
    assert "25 of 29 entries are broken" in last


def test_a_warning_is_said_once(capsys):
    for message in ("one", "one", "two"):
        warn(f"{message} of {__file__}")
    assert capsys.readouterr().err == f"warning: one of {__file__}\nwarning: two of {__file__}\n"


def test_what_is_local_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or tmp_path)
    monkeypatch.setattr("support.hub.fetch", lambda repo, file, advice: asked.append((repo, file)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    paths = "runs/nosuch folder/nosuch ./owner/repo ../nosuch /nosuch/x owner/a.safetensors nosuch"
    for path in paths.split():
        assert str(locate(path, [], "")) == path.removeprefix("./")
    assert asked == []
    locate("owner/repo", [], "")
    locate("owner/repo:part/a.safetensors", [], "")
    assert asked == ["owner/repo", ("owner/repo", "part/a.safetensors")]


def test_a_file_is_what_its_first_bytes_say(nano, tmp_path):
    """A safetensors file or a pickle, whatever its ending; tensors in the parts where trainers keep them."""
    tensors, metadata = read_tensors(nano)
    for name in ("a.ckpt", "A.SAFETENSORS", "blob"):
        shutil.copy(nano, tmp_path / name)
        read, about = read_tensors(tmp_path / name)
        assert read.keys() == tensors.keys() and about == metadata
    some = {name: tensors[name] for name in list(tensors)[:3]}
    contents = some, {"state_dict": some, "step": 1}, {"module": some}, {"model": some | {5: torch.ones(1)}}
    for content, zipped in itertools.product(contents, (True, False)):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        read, about = read_tensors(tmp_path / "a.pt")
        assert read.keys() == some.keys() and all(torch.equal(read[name], some[name]) for name in some)
        assert about == {}


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "no file of weights"),
        (bytes(range(256)), "no file of weights: .*.safetensors"),
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
    with pytest.raises(UserError, match=f"a.ckpt .*{told}"):
        read_tensors(path)
    with pytest.raises(UserError, match="b.safetensors "):  # by which name PyTorch takes another reader
        read_tensors(path.rename(tmp_path / "b.safetensors"))
    assert not TRAP.exists()  # no pickle ran


def mutants(original: bytes, rng: random.Random, count: int):
    """Copies cut short, with a bit flipped, or with bytes put in."""
    for i in range(count):
        content, at = bytearray(original), rng.randrange(min(len(original), 4000))
        if i % 3 == 0:
            del content[at:]
        elif i % 3 == 1:
            content[at] ^= 1 << rng.randrange(8)
        else:
            content[at:at] = rng.randbytes(rng.randrange(1, 30))
        yield bytes(content)


READERS = {
    "control.safetensors": lambda path, unet: load_controlnet(path, unet),
    "weights.pt": lambda path, unet: read_tensors(path),
    "a.png": lambda path, unet: fit_image(open_image(path), 64),
    "a.jpg": lambda path, unet: fit_image(open_image(path), 64),
    "config.json": lambda path, unet: read_json(path),
    "prompt.json": lambda path, unet: PairedImages(path.parent, 64),
}


def test_mutated_files_end_in_one_line(place, nano, tmp_path):
    """Whatever is in a file: read, or refused with a UserError; anything else fails this test."""
    shutil.copy(place / "full.safetensors", tmp_path / "control.safetensors")
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pt")
    shutil.copy(HINT, tmp_path / "a.png")
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(tmp_path / "a.jpg")
    (tmp_path / "prompt.json").write_text("\n".join([json.dumps(GOOD)] * 3))
    save_json({"attention_head_dim": 4, "norm_num_groups": 8}, tmp_path / "config.json")
    unet, rng = StableDiffusion.load(nano).unet, random.Random(0)
    for name, read in READERS.items():
        original, refused = (tmp_path / name).read_bytes(), 0
        for mutant in mutants(original, rng, 60):
            (tmp_path / name).write_bytes(mutant)
            try:
                read(tmp_path / name, unet)
            except UserError:
                refused += 1
        assert refused > 10, name  # most of those that were cut short
        (tmp_path / name).write_bytes(original)


@pytest.mark.parametrize("number, written", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_flushes_no_folders(number, written, tmp_path, monkeypatch):
    flush = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    with contextlib.nullcontext() if written else pytest.raises(UserError, match="can't write .*a.json"):
        save_json({"a": 1}, tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_cores(monkeypatch):
    assert usable_cpus() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1


def test_waiting_threads_do_not_spin_for_long(monkeypatch):
    """Unless the user has chosen; and each command imports this first, before torch loads OpenMP."""
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        importlib.reload(support.command)
        assert os.environ.get("GOMP_SPINCOUNT") == expected
    programs = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
    commands = [path for path in programs if "run_command_line" in path.read_text()]
    assert ROOT / "train.py" in commands
    for path in commands:
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = [getattr(node, "module", None) or node.names[0].name for node in nodes]
        assert next(name for name in modules if name.split(".")[0] not in sys.stdlib_module_names) == "support.command"
